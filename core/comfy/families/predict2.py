"""Transformers with cross-attention to text: Anima and Cosmos Predict2.

ComfyUI offers no place between a site's projections and its attention, and older versions none at all. So a
site's module runs a function of ours during calls of the denoiser, and its own again afterwards (`attached`).
Where no processor acts, ours calls the module's own. Nothing stays in the model between calls.

The text of Anima is what its adapter makes of a CONDITIONING: one row per T5 token (see `noun_clip`). The
adapter is a part of the model. The embedded transformer reads CLIP's states, as UNets do.
"""

from __future__ import annotations

import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import comfy.ldm.cosmos.predict2
import comfy.model_management as management
import comfy.model_sampling
import torch
from torch import Tensor

from ...errors import ConceptError
from ...model.backbone import TextEncoder
from ...model.context import Context
from ...model.flow import FlowSchedule
from ...model.processor import AttentionProcessor, HostAttention, SiteCall
from ...model.sites import Site, transformer_layout
from ..noun_clip import RowText
from ..sites import ALONE, PROCESSOR, host_attention
from ..text import ROWS, ComfyText
from .base import EMBEDDED_TEXT, Family, computation_type, is_plain

_NORMS = {"to_q": "q_norm", "to_k": "k_norm"}
_CROSS, _SELF = "attn2_patch", "attn1_patch"      # the host's keys of other nodes' patches, since 0.33
_HAS_ANIMA = importlib.util.find_spec("comfy.ldm.anima") is not None      # older hosts take it for Cosmos
_COSMOS = getattr(comfy.model_sampling, "COSMOS_RFLOW", ())


class Predict2(Family):
    """Anima, Cosmos Predict2 or the embedded transformer, for pictures."""

    names: ClassVar[str] = "Anima, Cosmos Predict2 (text to image)"
    recomputed: ClassVar[tuple[str, ...]] = ("Block",)
    guides_attention: ClassVar[bool] = False

    def __init__(self, model, text_widths: tuple[tuple[str, int], ...]) -> None:
        self.model, self.denoiser = model, model.model.diffusion_model
        kind, width = type(model.model).__name__, self.denoiser.blocks[0].cross_attn.k_proj.weight.shape[1]
        self.learns_in_text = text_widths == ((EMBEDDED_TEXT, width),)
        if not self.learns_in_text and text_widths != ((ROWS, width),):
            names = ", ".join(name for name, _ in text_widths)
            hint = "" if _HAS_ANIMA else "; if it is Anima, which this ComfyUI does not know, update ComfyUI"
            raise ConceptError(f"the model's class is {kind}, but the CLIP has the text encoders {names}; "
                               f"connect the model's own CLIP{hint}")
        if self.reads_picture or getattr(model.model, "image_to_video", False):
            raise ConceptError(f"the model's class is {kind}, for video from pictures; allowed: checkpoints "
                               f"of {self.names}")
        attentions = {f"blocks.{number}.cross_attn": block.cross_attn
                      for number, block in enumerate(self.denoiser.blocks)}
        shapes = {name: (site.n_heads, site.q_proj.weight.shape[0], site.k_proj.weight.shape[1])
                  for name, site in attentions.items()}
        self.layout = transformer_layout(shapes, text_widths)
        self._flow = self.schedule()
        self.skips_text = all(is_plain(self.linear(site, name)) for site in self.layout.sites
                              for name in ("to_k", "to_v"))

    @classmethod
    def knows(cls, model) -> bool:
        kind = comfy.ldm.cosmos.predict2.MiniTrainDIT
        return isinstance(getattr(model.model, "diffusion_model", None), kind)

    def path(self, site: Site, projection: str) -> str:
        return site.path(projection)

    def normalised(self, site: Site, projection: str, y: Tensor) -> Tensor:
        return _normalised(self.denoiser.get_submodule(site.name), projection, y)

    def schedule(self) -> FlowSchedule:
        sampling = self.model.get_model_object("model_sampling")
        sigmas = sampling.sigmas.detach().double().cpu()
        if isinstance(sampling, _COSMOS):      # the noise is scaled, not mixed: s / (1 - s)
            return FlowSchedule((sigmas / (1 + sigmas)).float())
        if isinstance(sampling, comfy.model_sampling.CONST):
            return FlowSchedule(sigmas.float())
        raise ConceptError(f"the model samples by {type(sampling).__name__}; allowed: a flow")

    def text_encoders(self, clip, load: Callable[[], None]) -> tuple[TextEncoder, ...]:
        if self.learns_in_text:
            return (ComfyText(EMBEDDED_TEXT, clip, load),)

        def vectors() -> Tensor:
            adapter = getattr(self.denoiser, "llm_adapter", None)
            if adapter is not None:
                return adapter.embed.weight
            return getattr(clip.cond_stage_model, ROWS).transformer.get_input_embeddings().weight

        return (RowText(clip, vectors, self.rows),)

    # Sampling

    def hook(self, clone, self_attention: bool = False) -> None:
        """Nothing to do: the sites are hooked during calls, see `attached`."""

    def add_layer_copies(self, clone) -> None:
        """Nothing to do: all sites read the same text."""

    def is_alone(self, options: dict) -> bool:
        return not options.get("patches", {}).get(_CROSS)

    def reads_own_text(self, options: dict) -> bool:
        return True

    def has_foreign_self_attention(self, options: dict) -> bool:
        return bool(options.get("patches", {}).get(_SELF))

    @contextmanager
    def attached(self, denoiser: Any = None, learns: bool = False) -> Iterator[None]:
        blocks = [(denoiser or self.denoiser).blocks[site.index] for site in self.layout.sites]
        modules = [module for block in blocks for module in (block.cross_attn, block.self_attn)]
        if isinstance(modules[0].__dict__.get("forward"), _Run):      # by a call around this one
            yield
            return
        before = [module.__dict__.get("forward") for module in modules]
        try:
            for block, site in zip(blocks, self.layout.sites, strict=True):
                block.cross_attn.forward = _RunSite(block.cross_attn, site, self.skips_text)
                block.self_attn.forward = _RunSelf(block.self_attn, site)
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward

    def rows(self, states: Tensor, extra: Mapping[str, Any]) -> Tensor:
        ids, device = extra.get("t5xxl_ids"), self.model.load_device
        if ids is None:
            return states.to(device)
        management.load_models_gpu([self.model])
        dtype = computation_type(self.model.model)
        weights = extra["t5xxl_weights"].view(1, -1, 1).to(device, dtype)
        return self.denoiser.preprocess_text_embeds(states.to(device, dtype), ids.unsqueeze(0).to(device),
                                                    t5xxl_weights=weights)

    # Learning

    def own_options(self) -> Mapping[str, Any]:
        return {}

    def evaluate(self, latents: Tensor, timesteps: Tensor, context: Context, options: dict,
                 pixels: int) -> Tensor:
        """As in `Family`. The denoiser's time axis has one frame."""
        sampling, times = self.model.get_model_object("model_sampling"), self._flow.sigma(timesteps)
        if not isinstance(sampling, _COSMOS):
            times = sampling.timestep(times)
        dtype = computation_type(self.model.model)
        text = context.hidden[:, 0].to(latents.device, dtype)
        output = self.denoiser(latents.unsqueeze(2).to(dtype), times.float(), context=text,
                               transformer_options=options)
        return output[:, :, 0]


def _normalised(attention: Any, projection: str, y: Tensor) -> Tensor:
    """The norm of a site's queries or keys `[..., a]`, heads apart."""
    norm = getattr(attention, _NORMS[projection])
    return norm(y.unflatten(-1, (attention.n_heads, attention.head_dim))).flatten(-2)


class _Run(ABC):
    """Runs a module of a block. Arguments of calls as for the host's `Attention.forward`."""

    def __init__(self, attention: Any, site: Site) -> None:
        self.attention, self.site, self.original = attention, site, attention.forward

    def __call__(self, x: Tensor, context: Tensor | None = None, rope_emb: Tensor | None = None,
                 transformer_options: dict | None = None) -> Tensor:
        options = transformer_options or {}
        processor: AttentionProcessor | None = options.get(PROCESSOR)
        if not self.is_changed(processor, x):
            more = {} if transformer_options is None else {"transformer_options": transformer_options}
            return self.original(x, context, rope_emb=rope_emb, **more)
        return self.run(processor, x, context, rope_emb, options)

    def is_changed(self, processor: AttentionProcessor | None, x: Tensor) -> bool:
        """Whether the host's own code must not run."""
        return processor is not None

    @abstractmethod
    def run(self, processor: Any, x: Tensor, context: Tensor | None, rope_emb: Tensor | None,
            options: dict) -> Tensor:
        """The module's output with a processor."""

    def out(self, attended: Tensor) -> Tensor:
        return self.attention.output_dropout(self.attention.output_proj(attended))


class _RunSite(_Run):
    """Cross-attention with a processor. skips_text: whether to_k and to_v may be given an empty text."""

    def __init__(self, attention: Any, site: Site, skips_text: bool) -> None:
        super().__init__(attention, site)
        self.skips_text = skips_text

    def run(self, processor: Any, x: Tensor, context: Tensor | None, rope_emb: Tensor | None,
            options: dict) -> Tensor:
        attention = self.attention
        call = SiteCall(processor, self.site, *self._patched(x, context, rope_emb, options))
        if options.get(ALONE):
            call.enter()
        key_text, value_text = call.key_text, call.value_text
        if not call.reads_text and self.skips_text:
            key_text, value_text = key_text[:, :0], value_text[:, :0]
        query = _normalised(attention, "to_q", call.project("to_q", attention.q_proj(call.hidden)))
        key = _normalised(attention, "to_k", call.project("to_k", attention.k_proj(key_text)))
        value = call.project("to_v", attention.v_proj(value_text))
        host = HostAttention(partial(host_attention, self.site.heads, options))
        return call.finish(self.out(call.attend(query, key, value, host)))

    def _patched(self, x: Tensor, context: Tensor | None, rope_emb: Tensor | None,
                 options: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of to_q, to_k and to_v, with other nodes' patches."""
        text = x if context is None else context
        given: dict[str, Any] = {"q": x, "k": text, "v": text, "pe": rope_emb}
        more = {**options, "n_heads": self.attention.n_heads, "dim_head": self.attention.head_dim}
        for patch in options.get("patches", {}).get(_CROSS, []):
            given |= patch(given["q"], given["k"], given["v"], pe=given["pe"], attn_mask=None,
                           extra_options=more)
        return given["q"], given["k"], given["v"]


class _RunSelf(_Run):
    """Self-attention of a site's block, for a processor that changes it, and for gradients, which the host's
    norm and rotation may lack."""

    def is_changed(self, processor: AttentionProcessor | None, x: Tensor) -> bool:
        return x.requires_grad or (processor is not None and processor.changes_self_attention)

    def run(self, processor: Any, x: Tensor, context: Tensor | None, rope_emb: Tensor | None,
            options: dict) -> Tensor:
        query, key, value = (part.flatten(2) for part in self._projected(x, rope_emb, options))
        attention = partial(host_attention, self.site.heads, options)
        if processor is None or not processor.changes_self_attention:
            return self.out(attention(query, key, value))
        return self.out(processor.self_attention(self.site, query, key, value, attention))

    def _projected(self, x: Tensor, rope_emb: Tensor | None, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each `[B, S, H, d]`."""
        attention: Any = self.attention
        if not x.requires_grad:
            takes_options = "transformer_options" in inspect.signature(attention.compute_qkv).parameters
            more = {"transformer_options": options} if takes_options else {}
            return attention.compute_qkv(x, None, rope_emb=rope_emb, **more)
        query, key, value = (projection(x).unflatten(-1, (attention.n_heads, attention.head_dim))
                             for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
        query, key = attention.q_norm(query), attention.k_norm(key)
        if rope_emb is not None:
            query, key = _rotated(query, rope_emb), _rotated(key, rope_emb)
        return query, key, value


def _rotated(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotates pairs of the two halves of each head.

    Args:
        x: `[B, S, H, d]`.
        rotations: `[1, S, 1, d / 2, 2, 2]`.
    """
    first, second = x.float().chunk(2, -1)
    turned = [rotations[..., row, 0] * first + rotations[..., row, 1] * second for row in (0, 1)]
    return torch.cat(turned, -1).to(x.dtype)
