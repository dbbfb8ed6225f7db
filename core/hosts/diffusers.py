"""A backbone of diffusers and transformers modules, for SD1.5, SD2, SDXL and the embedded base."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ConceptError
from ..model.backbone import TextEncoder
from ..model.checkpointing import recomputed
from ..model.context import Context
from ..model.processor import AttentionProcessor, HostAttention, SiteCall
from ..model.schedule import NoiseSchedule
from ..model.sites import PROJECTIONS, Site, SiteLayout, unet_layout
from .modules import ModuleBackbone, multi_head
from .quick_gelu import quick_gelu

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import Attention
    from transformers import CLIPTextModel, CLIPTokenizer

# the blocks that gradient checkpointing recomputes
_RECOMPUTED = ("BasicTransformerBlock", "ResnetBlock2D")


def layout_of(unet: UNet2DConditionModel, text_widths: tuple[tuple[str, int], ...]) -> SiteLayout:
    """The sites of a UNet2DConditionModel."""
    modules = {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}
    return unet_layout({name: (attention.heads, attention.to_q.out_features, attention.to_k.in_features)
                        for name, attention in modules.items()}, text_widths)


class _SiteProcessor:
    """The diffusers attention processor of one site: selects the site's layer copy and runs a `SiteCall`.

    `site_processor` comes from the `cross_attention_kwargs` of the UNet call, so no state of a call stays in
    the model, and gradient checkpointing recomputes a block with the same processor.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.attention = HostAttention(partial(multi_head, heads=site.heads))

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor,
                 attention_mask=None, site_processor: AttentionProcessor | None = None, **_) -> Tensor:
        copies = encoder_hidden_states.shape[1]
        text = encoder_hidden_states[:, self.site.copy if copies > 1 else 0]
        to_q, to_k, to_v, to_out = (_linear(attn, projection) for projection in PROJECTIONS)
        if site_processor is None:
            return to_out(self.attention(to_q(hidden_states), to_k(text), to_v(text)))
        call = SiteCall(site_processor, self.site, hidden_states, text, text)
        call.enter()
        text = text if call.reads_text else text[:, :0]
        query = call.project("to_q", to_q(call.hidden))
        key = call.project("to_k", to_k(text))
        value = call.project("to_v", to_v(text))
        return call.finish(to_out(call.attend(query, key, value, self.attention)))


class _SelfProcessor:
    """Self-attention of a site's block: diffusers' processor, unless our attention processor changes it."""

    def __init__(self, site: Site, original) -> None:
        self.site, self.original = site, original

    def __call__(self, attn: Attention, hidden_states: Tensor, *args,
                 site_processor: AttentionProcessor | None = None, **kwargs) -> Tensor:
        if site_processor is None or not site_processor.changes_self_attention:
            return self.original(attn, hidden_states, *args, **kwargs)
        to_q, to_k, to_v, to_out = (_linear(attn, projection) for projection in PROJECTIONS)
        query, key, value = to_q(hidden_states), to_k(hidden_states), to_v(hidden_states)
        return to_out(site_processor.self_attention(self.site, query, key, value,
                                                    partial(multi_head, heads=attn.heads)))


def _linear(attn: Attention, projection: str) -> nn.Linear:
    return attn.to_out[0] if projection == "to_out" else getattr(attn, projection)


class ClipText(TextEncoder):
    """A transformers CLIP text model.

    A hook at the token embedding inserts learned vectors. Position embeddings, causal mask, search for the
    end token and pooled output remain those of the installed transformers version.

    Args:
        name: See `TextEncoder`.
        model: CLIPTextModel, or CLIPTextModelWithProjection for a pooled output.
        tokenizer: The model's tokenizer.
        length: Tokens per chunk.
        penultimate: Whether the UNet reads the states before the last layer (SDXL) instead of the last ones.
    """

    encodes_prefixes = True

    def __init__(self, name: str, model: CLIPTextModel, tokenizer: CLIPTokenizer, length: int = 77,
                 penultimate: bool = False) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.length, self.penultimate = length, penultimate
        self.embedding = model.get_input_embeddings()
        self.width = self.embedding.embedding_dim
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    def vectors(self, ids: list[int]) -> Tensor:
        return self.embedding.weight[torch.tensor(ids, dtype=torch.long,
                                                  device=self.embedding.weight.device)].detach().float()

    def encode(self, ids: Tensor, slots: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        def insert(_module, _inputs, embedded: Tensor) -> Tensor:
            return embedded.masked_scatter(slots.unsqueeze(-1), vectors.to(embedded.dtype))

        hook = self.embedding.register_forward_hook(insert) if vectors.numel() else None
        # ours needs less memory in training; used for this call only
        activations = [part for part in self.model.modules()
                       if type(part).__name__ == "QuickGELUActivation" and "forward" not in part.__dict__]
        try:
            for activation in activations:
                activation.forward = quick_gelu
            output = self.model(ids, output_hidden_states=self.penultimate)
        finally:
            for activation in activations:
                activation.__dict__.pop("forward", None)
            if hook is not None:
                hook.remove()
        hidden = output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        return hidden, getattr(output, "text_embeds", None)


class DiffusersBackbone(ModuleBackbone):
    """A backbone of diffusers and transformers modules.

    Args:
        unet: Its attention processors are replaced by equivalent ones.
        vae: The autoencoder.
        text: One encoder (SD1.5, SD2) or two (SDXL: clip_l, clip_g).
        schedule: The noise schedule that the UNet was trained with.
    """

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, text: tuple[ClipText, ...],
                 schedule: NoiseSchedule) -> None:
        for encoder in text:
            encoder.model.requires_grad_(False).eval()
        layout = layout_of(unet, tuple((encoder.name, encoder.width) for encoder in text))
        self.unet = unet
        super().__init__(unet, vae, text, schedule, layout)
        self._extra_channels = unet.config.in_channels - self.latent_channels
        self._blank: dict[tuple[int, int], Tensor] = {}
        for site in self.layout.sites:
            unet.get_submodule(site.name).set_processor(_SiteProcessor(site))
            self_attention = unet.get_submodule(f"{site.name.removesuffix('attn2')}attn1")
            self_attention.set_processor(_SelfProcessor(site, self_attention.processor))

    @property
    def picture_size(self) -> int:
        return self.unet.config.sample_size * self.picture_multiple

    def _linear(self, site: Site, projection: str) -> nn.Linear:
        return _linear(self.unet.get_submodule(site.name), projection)

    def predict(self, latents: Tensor, timesteps: Tensor, context: Context,
                processor: AttentionProcessor | None = None) -> Tensor:
        dtype = self.dtype
        extra: dict[str, object] = {"cross_attention_kwargs": {"site_processor": processor}}
        if self.unet.config.addition_embed_type == "text_time":
            if context.pooled is None:
                raise ConceptError("the base reads a pooled text (SDXL), "
                                   "and the prompts were encoded without one")
            extra["added_cond_kwargs"] = {"text_embeds": context.pooled.to(dtype),
                                          "time_ids": self._time_ids(latents)}
        if processor is not None:
            processor.prepare(context)
        if self._extra_channels:
            latents = torch.cat([latents, self._extra(latents)], 1)
        return self.unet(latents.to(dtype), timesteps, context.hidden.to(dtype), return_dict=False,
                         **extra)[0].float()

    def _extra(self, latents: Tensor) -> Tensor:
        """What an inpainting or InstructPix2Pix UNet reads besides latents `[B, C, h, w]`, for a picture that
        is drawn from text alone.

        Returns:
            Inpainting: a mask of ones and a grey picture, `[B, 1 + C, h, w]`. InstructPix2Pix: zeros, which
            stand for no picture, `[B, C, h, w]`.
        """
        if self._extra_channels == self.latent_channels:
            return torch.zeros_like(latents)
        size = (latents.shape[-2], latents.shape[-1])
        if size not in self._blank:
            sides = [side * self.picture_multiple for side in size]
            with torch.no_grad():
                self._blank[size] = self.encode_images(torch.zeros(1, 3, *sides))
        grey = self._blank[size].to(latents).expand(len(latents), -1, -1, -1)
        return torch.cat([torch.ones_like(latents[:, :1]), grey], 1)

    def _time_ids(self, latents: Tensor) -> Tensor:
        """SDXL's size conditioning `[B, 6]`: original size, crop corner and target size. All are those of the
        uncropped picture.
        """
        height, width = latents.shape[-2] * self.picture_multiple, latents.shape[-1] * self.picture_multiple
        row = torch.tensor([height, width, 0, 0, height, width], device=latents.device, dtype=self.dtype)
        return row.expand(latents.shape[0], -1)

    def gradient_checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        return recomputed(self.unet, _RECOMPUTED if enabled else ())
