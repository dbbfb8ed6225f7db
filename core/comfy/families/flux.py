"""Transformers with double and single blocks: Flux.1, Flux.2 Klein, Chroma, and the embedded one.

Projections are rows of fused layers (see `fused`). What is common to joint attention is in `joint`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import comfy.ldm.chroma.model
import comfy.ldm.flux.layers
import comfy.ldm.flux.model
import torch
from torch import Tensor, nn

from ...errors import ConceptError
from ...model.backbone import TextEncoder
from ...model.context import Context
from ...model.fused import Offset, offset_of, path_of
from ...model.joint_rows import fill_bias
from ...model.sites import Site, joint_layout
from ..text import ROWS, ComfyText
from .base import EMBEDDED_TEXT, computation_type
from .joint import AFTER, Around, Joint

HAS_PATCHES = AFTER in comfy.ldm.flux.layers.DoubleStreamBlock.forward.__code__.co_consts
_KINDS = (comfy.ldm.flux.model.Flux, comfy.ldm.chroma.model.Chroma)
_QWEN = ("qwen3_4b", "qwen3_8b")
_QWEN_LAYERS = 3      # whose states are one row of text, side by side
_DISTILLED = ("Flux.1 dev and schnell are distilled models, and learning treats them as undistilled ones; if "
              "the result is weak, learn on an undistilled relative such as Chroma and use the concept here")
# Values of the distilled guidance while learning: 1 as other trainers of Flux.1 dev; Chroma's own is 0.
_GUIDANCE, _CHROMA_GUIDANCE = 1.0, 0.0


class Flux(Joint):
    """Flux.1, Flux.2 Klein or Chroma, for pictures from text."""

    names: ClassVar[str] = "Flux.1, Flux.2 Klein, Chroma (text to image)"
    recomputed: ClassVar[tuple[str, ...]] = ("DoubleStreamBlock", "SingleStreamBlock")

    def __init__(self, model, text_widths: tuple[tuple[str, int], ...]) -> None:
        self.model, self.denoiser = model, model.model.diffusion_model
        kind, params = type(model.model).__name__, self.denoiser.params
        if not HAS_PATCHES:
            raise ConceptError(f"the model's class is {kind}, whose blocks have no attention patches in this "
                               "version of ComfyUI; update ComfyUI to 0.33 or newer")
        widths = [(name, _QWEN_LAYERS * width if name in _QWEN else width) for name, width in text_widths]
        self._is_embedded = text_widths == ((EMBEDDED_TEXT, params.context_in_dim),)
        read = [width for name, width in widths if name in (ROWS, *_QWEN)]
        if not self._is_embedded and read != [params.context_in_dim]:
            names = ", ".join(f"{name} of width {width}" for name, width in widths)
            raise ConceptError(f"the model's class is {kind} with texts of width {params.context_in_dim}, "
                               f"but the CLIP has the text encoders {names}; connect the model's own CLIP")
        if self.reads_picture:
            raise ConceptError(f"the model's class is {kind}, which reads a picture beside text; allowed: "
                               f"checkpoints of {self.names}")
        self.layout = joint_layout(len(self.denoiser.double_blocks), len(self.denoiser.single_blocks),
                                   params.num_heads, params.hidden_size, text_widths)
        self.flow = self.schedule()
        self.reads_pooled = getattr(self.denoiser, "vector_in", None) is not None
        self.reads_weights = not any(name in _QWEN for name, _ in text_widths)
        if params.vec_in_dim is not None and not self._is_chroma:      # Klein's weights do not show it
            self.learning_notes = (_DISTILLED,)

    @property
    def _is_chroma(self) -> bool:
        return isinstance(self.denoiser, comfy.ldm.chroma.model.Chroma)

    @classmethod
    def knows(cls, model) -> bool:
        # not of classes derived from them
        return type(getattr(model.model, "diffusion_model", None)) in _KINDS

    def blocks(self, denoiser: Any) -> list[nn.Module]:
        return [*denoiser.double_blocks, *denoiser.single_blocks]

    def path(self, site: Site, projection: str) -> str:
        return path_of(site, projection)

    def offset(self, site: Site, projection: str) -> Offset | None:
        return offset_of(site, projection)

    @property
    def channels(self) -> int:
        return self.denoiser.img_in.weight.shape[1] // self.denoiser.patch_size**2

    def text_encoders(self, clip, load: Callable[[], None]) -> tuple[TextEncoder, ...]:
        if self._is_embedded:
            return (ComfyText(EMBEDDED_TEXT, clip, load),)
        return super().text_encoders(clip, load)

    def forwards(self, denoiser: Any, learns: bool) -> dict[nn.Module, Around]:
        """Where gradients flow, blocks and their norms run on copies of what they are given, too."""
        if not (learns or torch.is_grad_enabled()):
            return {}
        own, blocks = super().forwards(denoiser, learns), self.blocks(denoiser)
        norms = [norm for block in blocks for norm in _norms(block)]
        return {module: _OnCopies(own.get(module, module.forward)) for module in (*norms, *blocks)}

    def evaluate(self, latents: Tensor, timesteps: Tensor, context: Context, options: dict,
                 pixels: int) -> Tensor:
        """As in `Family`. Rows that only fill a text up are not read."""
        dtype, given = computation_type(self.model.model), {}
        text = context.hidden[:, 0].to(latents.device, dtype)
        fills = context.fills()
        if fills is not None:
            patch = self.denoiser.patch_size
            cells = -(-latents.shape[-2] // patch) * -(-latents.shape[-1] // patch)
            given["attention_mask"] = fill_bias(fills.to(text.device), cells).to(dtype)
        if context.pooled is not None:
            given["y"] = context.pooled.to(latents.device, dtype)
        guidance = latents.new_full((len(latents),), _CHROMA_GUIDANCE if self._is_chroma else _GUIDANCE)
        return self.denoiser(latents.to(dtype), self.times(timesteps), context=text, guidance=guidance,
                             transformer_options=options, **given)


def _norms(block: nn.Module) -> list[nn.Module]:
    names = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm")
    return [getattr(block, name) for name in names if hasattr(block, name)]


class _OnCopies(Around):
    """Runs a module on copies of the rows that it is given. The host's blocks write into their inputs, but
    autograd needs what a norm has read, and recomputation what a block has read."""

    def __call__(self, *rows: Tensor, **given: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*rows, **given)
        given |= {name: given[name].clone() for name in ("img", "txt") if name in given}
        return self.forward(*(row.clone() for row in rows), **given)
