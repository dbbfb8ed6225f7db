"""Transformers with joint attention of text and picture: Flux.1, Flux.2 Klein, Chroma, and the embedded one.

Every double and single block is a site. Text and picture share one softmax there, and both change by it. Only
the rows of the picture see a concept: the attention that they pay to the rows of the concept's words is
divided among its slots. The rows of the text keep the host's attention; otherwise other words would read the
concept. So do those of reference pictures, which stand behind the picture's own.

Two of the host's patches reach the blocks. `Begin` (attn1 patch) gets queries and keys after their norm and
before their rotary positions. It computes the picture's rows with the processor and leaves those of the text
to the host. `Finish` (attn1 output patch) puts both together. So no attention is computed twice.

Projections are rows of fused layers, and patches do not see their inputs. While learning, core calls the
blocks itself and changes the layers' outputs (see `fused`). While the host samples, deltas are patches of a
part of the weight. So they act whenever the MODEL runs. Slots need no projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import comfy.ldm.chroma.model
import comfy.ldm.flux.layers
import comfy.ldm.flux.model
import comfy.model_sampling
import torch
from comfy.ldm.flux.math import apply_rope
from torch import Tensor, nn

from ...attention.token_lora import with_delta
from ...errors import ConceptError
from ...model.backbone import TextEncoder
from ...model.context import Context
from ...model.flow import FlowSchedule
from ...model.fused import Change, Offset, Projection, offset_of, path_of, projecting
from ...model.joint_rows import attend_picture, fill_bias, put_together, restarted, without_picture
from ...model.processor import AttentionProcessor
from ...model.sites import PROJECTIONS, Site, joint_layout
from ..noun_clip import RowText
from ..sites import DELTAS, PROCESSOR
from ..text import QWEN, ROWS, ComfyText, row_name
from .base import EMBEDDED_TEXT, Family, append_once, computation_type

_BEFORE, _AFTER = "attn1_patch", "attn1_output_patch"      # the host's keys of patches
_REFERENCES = "reference_image_num_tokens"      # the host's key of their numbers of rows
_PICTURE = "continual_concepts_picture"      # the attended picture, in the options of one block call
_HAS_PATCHES = _AFTER in comfy.ldm.flux.layers.DoubleStreamBlock.forward.__code__.co_consts
_KINDS = (comfy.ldm.flux.model.Flux, comfy.ldm.chroma.model.Chroma)
_QWEN_LAYERS = 3      # whose states are one row of text, side by side
_TIMESTEPS = 1000      # of training; the host's table may have more
_DISTILLED = ("Flux.1 dev and schnell are distilled models, and learning treats them as undistilled ones; if "
              "the result is weak, learn on an undistilled relative such as Chroma and use the concept here")
# Values of the distilled guidance while learning: 1 as other trainers of Flux.1 dev; Chroma's own is 0.
_GUIDANCE, _CHROMA_GUIDANCE = 1.0, 0.0


class Flux(Family):
    """Flux.1, Flux.2 Klein or Chroma, for pictures from text."""

    names: ClassVar[str] = "Flux.1, Flux.2 Klein, Chroma (text to image)"
    recomputed: ClassVar[tuple[str, ...]] = ("DoubleStreamBlock", "SingleStreamBlock")
    guides_attention: ClassVar[bool] = False
    learns_in_text = False

    def __init__(self, model, text_widths: tuple[tuple[str, int], ...]) -> None:
        self.model, self.denoiser = model, model.model.diffusion_model
        kind, params = type(model.model).__name__, self.denoiser.params
        if not _HAS_PATCHES:
            raise ConceptError(f"the model's class is {kind}, whose blocks have no attention patches in this "
                               "version of ComfyUI; update ComfyUI to 0.33 or newer")
        widths = [(name, _QWEN_LAYERS * width if name in QWEN else width) for name, width in text_widths]
        self._is_embedded = text_widths == ((EMBEDDED_TEXT, params.context_in_dim),)
        read = [width for name, width in widths if name in (ROWS, *QWEN)]
        if not self._is_embedded and read != [params.context_in_dim]:
            names = ", ".join(f"{name} of width {width}" for name, width in widths)
            raise ConceptError(f"the model's class is {kind} with texts of width {params.context_in_dim}, "
                               f"but the CLIP has the text encoders {names}; connect the model's own CLIP")
        if self.reads_picture:
            raise ConceptError(f"the model's class is {kind}, which reads a picture beside text; allowed: "
                               f"checkpoints of {self.names}")
        self.layout = joint_layout(len(self.denoiser.double_blocks), len(self.denoiser.single_blocks),
                                   params.num_heads, params.hidden_size, text_widths)
        self._flow = self.schedule()
        self.reads_pooled = getattr(self.denoiser, "vector_in", None) is not None
        if params.vec_in_dim is not None and not self._is_chroma:      # Klein's weights do not show it
            self.learning_notes = (_DISTILLED,)

    @property
    def _is_chroma(self) -> bool:
        return isinstance(self.denoiser, comfy.ldm.chroma.model.Chroma)

    @classmethod
    def knows(cls, model) -> bool:
        # not of classes derived from them
        return type(getattr(model.model, "diffusion_model", None)) in _KINDS

    def path(self, site: Site, projection: str) -> str:
        return path_of(site, projection)

    def patch_key(self, site: Site, projection: str) -> str | tuple[str, Offset]:
        key, offset = self.key(site, projection), offset_of(site, projection)
        return key if offset is None else (key, offset)

    def project(self, site: Site, projection: str, x: Tensor) -> Tensor:
        self.layout.refuse_joint("projecting text is")
        return x

    @property
    def channels(self) -> int:
        return self.denoiser.img_in.weight.shape[1] // self.denoiser.patch_size**2

    def schedule(self) -> FlowSchedule:
        sampling = self.model.get_model_object("model_sampling")
        if not isinstance(sampling, comfy.model_sampling.CONST):
            raise ConceptError(f"the model samples by {type(sampling).__name__}; allowed: a flow")
        sigmas = sampling.sigmas.detach().float().cpu()
        step = max(1, len(sigmas) // _TIMESTEPS)
        return FlowSchedule(sigmas[step - 1::step].clone())

    def text_encoders(self, clip, load: Callable[[], None]) -> tuple[TextEncoder, ...]:
        if self._is_embedded:
            return (ComfyText(EMBEDDED_TEXT, clip, load),)

        def vectors() -> Tensor:
            return getattr(clip.cond_stage_model, row_name(clip)).transformer.get_input_embeddings().weight

        return (RowText(clip, vectors, self.rows, self.reads_pooled),)

    # Sampling

    def hook(self, clone, self_attention: bool = False) -> None:
        for name, patches in self.own_options()["patches"].items():
            append_once(clone, name, patches[0])

    def add_layer_copies(self, clone) -> None:
        """Nothing to do: all sites read the same text."""

    def is_alone(self, options: dict) -> bool:
        return False      # the text changes from block to block, so nothing that is read from it can be kept

    def reads_own_text(self, options: dict) -> bool:
        return False

    def has_foreign_self_attention(self, options: dict) -> bool:
        return any(not isinstance(patch, Begin) for patch in options.get("patches", {}).get(_BEFORE, []))

    @contextmanager
    def attached(self, denoiser: Any = None, learns: bool = False) -> Iterator[None]:
        """Where gradients flow, blocks and their norms run on copies of what they are given. Where core
        calls the denoiser itself, blocks run the processor's projections."""
        denoiser = denoiser or self.denoiser
        blocks = [*denoiser.double_blocks, *denoiser.single_blocks]
        norms = [norm for block in blocks for norm in _norms(block)]
        is_attached = isinstance(norms[0].__dict__.get("forward"), _OnCopies)
        if is_attached or not (learns or torch.is_grad_enabled()):
            yield
            return
        before = [module.__dict__.get("forward") for module in (*norms, *blocks)]
        try:
            for norm in norms:
                norm.__dict__["forward"] = _OnCopies(norm.forward)
            for block, site in zip(blocks, self.layout.sites, strict=True):
                own = [Projection(site, name, denoiser.get_submodule(path_of(site, name)))
                       for name in PROJECTIONS]
                block.__dict__["forward"] = _RunBlock(block.forward, own if learns else [])
            yield
        finally:
            for module, forward in zip((*norms, *blocks), before, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward

    def rows(self, states: Tensor, extra: Mapping[str, Any]) -> Tensor:
        return states.to(self.model.load_device)

    # Learning

    def own_options(self) -> Mapping[str, Any]:
        return {"patches": {_BEFORE: [Begin(self)], _AFTER: [Finish()]}}

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
        times = self.model.get_model_object("model_sampling").timestep(self._flow.sigma(timesteps))
        return self.denoiser(latents.to(dtype), times.float(), context=text, guidance=guidance,
                             transformer_options=options, **given)


def _norms(block: nn.Module) -> list[nn.Module]:
    names = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm")
    return [getattr(block, name) for name in names if hasattr(block, name)]


class _OnCopies:
    """Runs a module on copies of the rows that it is given. The host's blocks write into their inputs, but
    autograd needs what a norm has read, and recomputation what a block has read."""

    def __init__(self, forward: Callable) -> None:
        self.forward = forward

    def __call__(self, *rows: Tensor, **given):
        if not torch.is_grad_enabled():
            return self.forward(*rows, **given)
        given |= {name: given[name].clone() for name in ("img", "txt") if name in given}
        return self.forward(*(row.clone() for row in rows), **given)


class _RunBlock(_OnCopies):
    """The same for a block, whose projections the processor of the call may change.

    Args:
        forward: The block's own.
        projections: Those of its site; none where the host samples.
    """

    def __init__(self, forward: Callable, projections: Sequence[Projection]) -> None:
        super().__init__(forward)
        self.projections = projections

    def __call__(self, *rows: Tensor, **given):
        options = given.get("transformer_options") or {}
        processor: AttentionProcessor | None = options.get(PROCESSOR)
        changes: list[Change] = [partial(with_delta, deltas) for deltas in options.get(DELTAS, ())]
        changes += [] if processor is None else [processor.project]
        with projecting(self.projections, changes):
            return super().__call__(*rows, **given)


class Begin:
    """The last attn1 patch: attends from the picture's rows with the processor, and leaves the other rows to
    the host."""

    def __init__(self, sites: Flux) -> None:
        self.sites = {site.name: site for site in sites.layout.sites}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pe: Tensor | None = None,
                 attn_mask: Tensor | None = None, extra_options: dict | None = None) -> dict:
        options = extra_options or {}
        processor: AttentionProcessor | None = options.get(PROCESSOR)
        site = self.sites.get(f"{options.get('block_type')}_blocks.{options.get('block_index')}")
        if processor is None or site is None:
            return {}
        if options["patches"][_BEFORE][-1] is not self:
            raise ConceptError("another node patches the model's attention behind the concepts; put that "
                               "node before Apply Concepts")
        count = options["img_slice"][0]
        rows = count, q.shape[2] - sum(options.get(_REFERENCES) or ())
        turned_q, turned_k = (q, k) if pe is None else apply_rope(q, k, restarted(pe, processor.prompts, 2))
        picture, mask = attend_picture(processor, site, q, (turned_q, turned_k, v), rows, attn_mask)
        options[_PICTURE] = count, picture
        return {"q": without_picture(turned_q, rows), "k": turned_k, "pe": None, "attn_mask": mask}


class Finish:
    """attn1 output patch: puts the rows of text, picture and references together."""

    def __call__(self, attended: Tensor, options: dict) -> Tensor:
        if _PICTURE not in options:
            return attended
        count, picture = options.pop(_PICTURE)
        return put_together(attended, picture, count)
