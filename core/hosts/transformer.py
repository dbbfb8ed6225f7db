"""A backbone of a diffusion transformer with cross-attention, in the form of Cosmos-Predict2 and Anima."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ..model.checkpointing import recomputed
from ..model.context import Context
from ..model.flow import FlowSchedule
from ..model.processor import AttentionProcessor, HostAttention, SiteCall
from ..model.sites import Site, SiteLayout, transformer_layout
from .diffusers import ClipText
from .modules import ModuleBackbone

MODULES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "output_proj"}
_NORMS = {"to_q": "q_norm", "to_k": "k_norm"}


def layout_of(transformer: nn.Module, text_widths: tuple[tuple[str, int], ...]) -> SiteLayout:
    """The sites of a transformer."""
    modules = {name: module for name, module in transformer.named_modules() if name.endswith(".cross_attn")}
    return transformer_layout({name: (module.n_heads, module.q_proj.out_features, module.k_proj.in_features)
                               for name, module in modules.items()}, text_widths)


class TransformerBackbone(ModuleBackbone):
    """A backbone of a transformer that predicts the velocity of a flow.

    Args:
        transformer: Called with latents, times, text states and a function that runs its attention layers,
            see `demo.transformer.DiffusionTransformer`.
        vae: The autoencoder.
        text: Its text encoder. A context has one copy, because all sites read the same text.
        schedule: The flow's schedule.
        picture_size: Side in pixels of the pictures that it was trained on.
        time_scale: The transformer's time is the share of noise times this.
    """

    def __init__(self, transformer: nn.Module, vae: Any, text: ClipText, schedule: FlowSchedule,
                 picture_size: int, time_scale: float = 1000.0) -> None:
        text.model.requires_grad_(False).eval()
        layout = layout_of(transformer, ((text.name, text.width),))
        super().__init__(transformer, vae, (text,), schedule, layout)
        self._flow, self._picture_size, self._time_scale = schedule, picture_size, time_scale
        self._sites: dict[nn.Module, Site] = {}      # self-attention and cross-attention of every block
        for site in layout.sites:
            block = transformer.get_submodule(site.name.removesuffix(".cross_attn"))
            self._sites |= {block.get_submodule(part): site for part in ("self_attn", "cross_attn")}

    @property
    def picture_size(self) -> int:
        return self._picture_size

    def _linear(self, site: Site, projection: str) -> nn.Linear:
        linear = self.denoiser.get_submodule(f"{site.name}.{MODULES[projection]}")
        assert isinstance(linear, nn.Linear)
        return linear

    def normalised(self, site: Site, projection: str, y: Tensor) -> Tensor:
        norm = self.denoiser.get_submodule(f"{site.name}.{_NORMS[projection]}")
        return norm(y.unflatten(-1, (site.heads, -1)).float()).flatten(-2).to(y.dtype)

    def predict(self, latents: Tensor, timesteps: Tensor, context: Context,
                processor: AttentionProcessor | None = None) -> Tensor:
        dtype = self.dtype
        if processor is not None:
            processor.prepare(context)

        def run(attention: Any, x: Tensor, text: Tensor | None, table: Any) -> Tensor:
            x = x.to(dtype)
            site = self._sites[attention]
            if processor is not None and text is not None:
                return self._cross_attention(attention, site, processor, x, text)
            if processor is not None and processor.changes_self_attention:
                return _self_attention(attention, site, processor, x, table)
            return attention(x, text, table)

        times = self._flow.sigma(timesteps) * self._time_scale
        return self.denoiser(latents.to(dtype), times, context.hidden[:, 0].to(dtype), run).float()

    def _cross_attention(self, attention: Any, site: Site, processor: AttentionProcessor, hidden: Tensor,
                         text: Tensor) -> Tensor:
        call = SiteCall(processor, site, hidden, text, text)
        call.enter()
        text = text if call.reads_text else text[:, :0]
        query = self.normalised(site, "to_q", call.project("to_q", attention.q_proj(call.hidden)))
        key = self.normalised(site, "to_k", call.project("to_k", attention.k_proj(text)))
        value = call.project("to_v", attention.v_proj(text))
        attended = call.attend(query, key, value, HostAttention(attention.plain))
        return call.finish(attention.output_proj(attended))

    def gradient_checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        return recomputed(self.denoiser, ("Block",) if enabled else ())


def _self_attention(attention: Any, site: Site, processor: AttentionProcessor, x: Tensor,
                    table: Any) -> Tensor:
    query, key, value = (part.transpose(1, 2).flatten(2) for part in attention.projected(x, x, table))
    return attention.output_proj(processor.self_attention(site, query, key, value, attention.plain))
