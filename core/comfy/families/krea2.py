"""Krea 2: one stream of blocks, in which text and picture share all layers. What is common to joint attention
is in `joint`.

Several heads of the query share keys and values. A part of the model, `txtfusion`, mixes the rows of a text
before the first block, and the model takes no attention mask. So `txtfusion` runs a function of ours during
calls: texts that stand side by side are mixed one by one, and rows that only fill up are left out. For the
blocks, the mask is given to the attention patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ConceptError
from ...model.context import Context
from ...model.processor import AttentionProcessor
from ...model.sites import Site, one_stream_layout
from ..sites import PROCESSOR
from .base import computation_type
from .joint import FILLS, Around, Joint

try:
    from comfy.ldm.krea2.model import SingleStreamDiT
except ImportError:      # older hosts have no Krea 2
    SingleStreamDiT = None

_ENCODER = "qwen3vl_4b"
_MODULES = {"to_q": "wq", "to_k": "wk", "to_v": "wv", "to_out": "wo"}


class Krea2(Joint):
    """Krea 2 (Raw or Turbo), for pictures from text."""

    names: ClassVar[str] = "Krea 2 (text to image)"
    recomputed: ClassVar[tuple[str, ...]] = ("SingleStreamBlock",)
    reads_weights = False

    def __init__(self, model, text_widths: tuple[tuple[str, int], ...]) -> None:
        self.model, self.denoiser = model, model.model.diffusion_model
        kind, width = type(model.model).__name__, self.denoiser.txtdim
        if text_widths != ((_ENCODER, width),):
            names = ", ".join(f"{name} of width {found}" for name, found in text_widths)
            raise ConceptError(f"the model's class is {kind} with texts of {_ENCODER} of width {width}, "
                               f"but the CLIP has the text encoders {names}; connect the model's own CLIP")
        attention = self.denoiser.blocks[0].attn
        self.layout = one_stream_layout(len(self.denoiser.blocks), attention.heads,
                                        attention.heads * attention.headdim,
                                        attention.kvheads * attention.headdim, text_widths)
        self.flow = self.schedule()

    @classmethod
    def knows(cls, model) -> bool:
        # not of classes derived from it
        return type(getattr(model.model, "diffusion_model", None)) is SingleStreamDiT

    def blocks(self, denoiser: Any) -> list[nn.Module]:
        return list(denoiser.blocks)

    def path(self, site: Site, projection: str) -> str:
        return f"{site.name}.attn.{_MODULES[projection]}"

    @property
    def channels(self) -> int:
        return self.denoiser.channels

    def forwards(self, denoiser: Any, learns: bool) -> dict[nn.Module, Around]:
        return {**super().forwards(denoiser, learns),
                denoiser.txtfusion: _MixAlone(denoiser.txtfusion.forward)}

    def evaluate(self, latents: Tensor, timesteps: Tensor, context: Context, options: dict,
                 pixels: int) -> Tensor:
        """As in `Family`. Rows that only fill a text up are not read."""
        dtype, fills = computation_type(self.model.model), context.fills()
        text = context.hidden[:, 0].to(latents.device, dtype)
        given = options if fills is None else {**options, FILLS: fills.to(text.device)}
        return self.denoiser(latents.to(dtype), self.times(timesteps), text, transformer_options=given)


class _MixAlone(Around):
    """Mixes the rows of texts one by one, each text without the rows that only fill it up."""

    def __call__(self, x: Tensor, mask: Tensor | None = None, transformer_options: dict | None = None):
        """x: `[B, N, l, D]`, states of l layers, to `[B, N, D]`."""
        options = transformer_options or {}
        processor = options.get(PROCESSOR) or AttentionProcessor()
        fills = processor.fills if processor.masks_texts else options.get(FILLS)
        lengths = processor.prompts or (x.shape[1],)
        if fills is None:
            if len(lengths) == 1:
                return self.forward(x, mask=mask, transformer_options=options)
            fills = torch.zeros(x.shape[:2], dtype=torch.bool)
        texts = zip(x.split(lengths, 1), fills.split(lengths, 1), strict=True)
        return torch.cat([self._mixed(text, (~fill).sum(1).tolist(), options) for text, fill in texts], 1)

    def _mixed(self, text: Tensor, counts: Sequence[int], options: dict) -> Tensor:
        """counts: the number of rows of each text; the others stay zero. Texts of one length are mixed in
        one call."""
        mixed = text.new_zeros(*text.shape[:2], text.shape[-1])
        for count in sorted(set(counts)):
            rows = torch.tensor([row for row, own in enumerate(counts) if own == count], device=text.device)
            mixed[rows, :count] = self.forward(text[rows, :count], mask=None, transformer_options=options)
        return mixed
