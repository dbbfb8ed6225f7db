"""UNets: Stable Diffusion 1.x, 2.x and SDXL. ComfyUI's attn2 patches reach their
sites.

A site's call is spread over three hooks of a transformer block: `Begin` (attn2 patch), `Replace` (attn2
replacement) and `Finish` (attn2 output patch). The hooks pass the `SiteCall` on in the options of the block
call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import comfy.model_base
import comfy.model_sampling
import comfy.utils
import torch
from torch import Tensor

from ...errors import ConceptError
from ...model.backbone import TextEncoder
from ...model.context import Context
from ...model.processor import AttentionProcessor, HostAttention, SiteCall
from ...model.schedule import NoiseSchedule
from ...model.sites import Site, unet_layout
from ..sites import ALONE, OFFSETS, PROCESSOR, host_attention
from ..text import ROW_NAMES, ComfyText, encoder_names
from .base import Family, append_once, computation_type, is_plain

_CALL = "continual_concepts_call"           # the SiteCall, in the options of one block call

# ComfyUI's name of a transformer block: input | middle | output, number, index inside
Address = tuple[str, int, int]


def _address(path: str) -> Address:
    """`input_blocks.1.1.transformer_blocks.0` -> ("input", 1, 0)."""
    parts = path.split(".")
    number = 0 if parts[0] == "middle_block" else int(parts[1])
    return parts[0].removesuffix("_blocks").removesuffix("_block"), number, int(parts[-1])


class UNet(Family):
    """A UNet.

    Attributes:
        paths: Site index -> module path of its transformer block.
        addresses: ComfyUI's name of each site's block -> the site.
    """

    names: ClassVar[str] = "Stable Diffusion 1.x, 2.x, SDXL"
    recomputed: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock", "ResBlock")

    def __init__(self, model, text_widths: tuple[tuple[str, int], ...]) -> None:
        self.model, self.denoiser = model, model.model.diffusion_model
        if text_widths[0][0] in ROW_NAMES:
            raise ConceptError(f"the model's class is {type(model.model).__name__}, but the CLIP has the "
                               f"text encoder {text_widths[0][0]}; connect the model's own CLIP")
        self.reads_pooled = isinstance(model.model, comfy.model_base.SDXL)
        names = _site_names(model)
        attentions = {name: self.denoiser.get_submodule(f"{path}.attn2") for name, path in names.items()}
        shapes = {name: (attention.heads, attention.to_q.weight.shape[0], attention.to_k.weight.shape[1])
                  for name, attention in attentions.items()}
        self.layout = unet_layout(shapes, text_widths)
        self.paths = tuple(names[site.name] for site in self.layout.sites)
        self.addresses = {_address(path): site
                          for path, site in zip(self.paths, self.layout.sites, strict=True)}

    @classmethod
    def knows(cls, model) -> bool:
        return bool(_site_names(model))

    def path(self, site: Site, projection: str) -> str:
        inner = "to_out.0" if projection == "to_out" else projection
        return f"{self.paths[site.index]}.attn2.{inner}"

    def schedule(self) -> NoiseSchedule:
        """The MODEL's noise schedule. Raises ConceptError for prediction types other than epsilon and v."""
        sampling = self.model.get_model_object("model_sampling")
        # V is a subclass of EPS
        kinds = ((comfy.model_sampling.V_PREDICTION, "v_prediction"), (comfy.model_sampling.EPS, "epsilon"))
        prediction = next((name for kind, name in kinds if isinstance(sampling, kind)), None)
        is_other = isinstance(sampling, (comfy.model_sampling.EDM, comfy.model_sampling.X0))
        if prediction is None or is_other or not hasattr(sampling, "sigmas"):
            raise ConceptError(f"the model samples by {type(sampling).__name__}; allowed: "
                               "epsilon and v prediction")
        sigmas = sampling.sigmas.detach().double().cpu()
        return NoiseSchedule((1 / (1 + sigmas.square())).float(), prediction)

    def text_encoders(self, clip, load: Callable[[], None]) -> tuple[TextEncoder, ...]:
        return tuple(ComfyText(name, clip, load) for name in encoder_names(clip))

    def hook(self, clone, self_attention: bool = False) -> None:
        replaced = clone.model_options["transformer_options"].get("patches_replace", {})
        patches = self._patches(replaced.get("attn2"))
        others = replaced.get("attn1", {})
        for address, replace in patches["patches_replace"]["attn2"].items():
            clone.set_model_attn2_replace(replace, *address)
        if self_attention:
            for address, site in self.addresses.items():
                own = ReplaceSelf(site, others.get(address) or others.get(address[:2]))
                clone.set_model_patch_replace(own, "attn1", *address)
        for name, ours in patches["patches"].items():
            for patch in ours:
                append_once(clone, name, patch)

    def add_layer_copies(self, clone) -> None:
        append_once(clone, "attn2_patch", AddOffsets(self.addresses))

    def is_alone(self, options: dict) -> bool:
        patches, replaced = options.get("patches", {}), options.get("patches_replace", {}).get("attn2", {})
        before, after = patches.get("attn2_patch", []), patches.get("attn2_output_patch", [])
        return (bool(before) and isinstance(before[-1], Begin)
                and all(isinstance(patch, Finish) for patch in after)
                and all(isinstance(patch, Replace) and patch.previous is None for patch in replaced.values()))

    def reads_own_text(self, options: dict) -> bool:
        return all(isinstance(patch, (AddOffsets, Begin)) for patch in options["patches"]["attn2_patch"])

    def has_foreign_self_attention(self, options: dict) -> bool:
        replaced = options.get("patches_replace", {}).get("attn1", {})
        return any(not isinstance(patch, ReplaceSelf) or patch.previous is not None
                   for patch in replaced.values())

    def own_options(self) -> Mapping[str, Any]:
        return self._patches()

    def evaluate(self, latents: Tensor, timesteps: Tensor, context: Context, options: dict,
                 pixels: int) -> Tensor:
        dtype = computation_type(self.model.model)
        hidden = context.hidden.to(dtype)
        mean = hidden.mean(1)
        if hidden.shape[1] > 1:
            options = {**options, OFFSETS: hidden - mean.unsqueeze(1)}
        y = self._size_and_pooled(latents, context, pixels)
        if self.denoiser.in_channels != latents.shape[1]:
            latents = torch.cat([latents, self._extra(latents)], 1)
        return self.denoiser(latents.to(dtype), timesteps, context=mean, y=None if y is None else y.to(dtype),
                             transformer_options=options)

    def _extra(self, latents: Tensor) -> Tensor:
        """What an inpainting or InstructPix2Pix model reads besides latents, for a picture that is drawn from
        text alone: what the host gives it when no picture and no mask is connected.
        """
        extra = self.model.model.concat_cond(noise=latents, latent_image=torch.zeros_like(latents),
                                             device=latents.device)
        if extra is None:
            raise ConceptError(f"the model is a {type(self.model.model).__name__} that reads more than "
                               "latents and text; allowed: Stable Diffusion 1.x, 2.x and SDXL checkpoints")
        return extra

    def _size_and_pooled(self, latents: Tensor, context: Context, pixels: int) -> Tensor | None:
        """SDXL's vector conditioning: the pooled text and the picture's size."""
        if getattr(self.denoiser, "num_classes", None) is None:
            return None
        height, width = (side * pixels for side in latents.shape[-2:])
        return self.model.model.encode_adm(pooled_output=context.pooled, device=self.model.load_device,
                                           height=height, width=width, noise=latents, seed=0)

    def _patches(self, previous: dict | None = None) -> dict:
        """The hooks of all sites as transformer options. previous: existing attn2 replacements."""
        previous = previous or {}
        replace = {address: Replace(site, previous.get(address) or previous.get(address[:2]))
                   for address, site in self.addresses.items()}
        return {"patches": {"attn2_patch": [AddOffsets(self.addresses), Begin(self)],
                            "attn2_output_patch": [Finish()]},
                "patches_replace": {"attn2": replace}}


def _site_names(model) -> dict[str, str]:
    """Site name as in diffusers -> module path of its transformer block; empty for another family."""
    config = model.model.model_config.unet_config
    suffix = ".attn2.to_q.weight"
    mapping = comfy.utils.unet_to_diffusers(config) if "transformer_depth" in config else {}
    return {theirs.removesuffix(".to_q.weight"): ours.removesuffix(suffix)
            for theirs, ours in mapping.items() if theirs.endswith(suffix)}


class AddOffsets:
    """attn2 patch: adds the offsets of each site's layer copy."""

    def __init__(self, addresses: dict[Address, Site]) -> None:
        self.addresses = addresses

    def __call__(self, n, context, value, options):
        site = _site_of(self.addresses, options)
        offsets = options.get(OFFSETS)
        if offsets is not None and site is not None:
            copy = site.copy if offsets.shape[1] > 1 else 0      # words may be the same for all layers
            offset = offsets[:, copy].to(context)
            value = context + offset if value is context else value + offset
            context = context + offset
        return n, context, value


class Begin:
    """The last attn2 patch: begins the site's call and changes the inputs of the frozen projections."""

    def __init__(self, sites: UNet) -> None:
        self.addresses = sites.addresses
        self.skips_text = all(is_plain(sites.linear(site, name)) for site in sites.layout.sites
                              for name in ("to_k", "to_v"))

    def __call__(self, n, context, value, options):
        processor, site = options.get(PROCESSOR), _site_of(self.addresses, options)
        if processor is None or site is None:
            return n, context, value
        call = options[_CALL] = SiteCall(processor, site, n, context, value)
        if options.get(ALONE):
            call.enter()
        if not call.reads_text and self.skips_text:
            context, value = context[:, :0], value[:, :0]
        return call.hidden, context, value


def _site_of(addresses: dict[Address, Site], options: dict) -> Site | None:
    block = options.get("block")
    return None if block is None else addresses.get((block[0], block[1], options.get("block_index", 0)))


class Replace:
    """attn2 replacement of one site: the processor's attention.

    Args:
        site: The site.
        previous: Another node's replacement, which is applied on top of ours. A replacement of our own is
            dropped, because processors do not stack.
    """

    def __init__(self, site: Site, previous: Callable | None = None) -> None:
        self.site = site
        self.previous: Callable | None = previous.previous if isinstance(previous, Replace) else previous

    def __call__(self, q, k, v, options):
        others = None if self.previous is None else partial(_replaced, self.previous, options)
        attention = HostAttention(partial(host_attention, self.site.heads, options), others)
        call: SiteCall | None = options.get(_CALL)
        if call is None:
            return attention(q, k, v)
        query, key, value = (call.project(name, y) for name, y in (("to_q", q), ("to_k", k), ("to_v", v)))
        return call.attend(query, key, value, attention)


class ReplaceSelf:
    """attn1 replacement of a site's block: the processor's self-attention. Another node's replacement,
    `previous`, takes precedence."""

    def __init__(self, site: Site, previous: Callable | None = None) -> None:
        self.site = site
        self.previous: Callable | None = previous.previous if isinstance(previous, ReplaceSelf) else previous

    def __call__(self, q, k, v, options):
        if self.previous is not None:
            return self.previous(q, k, v, options)
        processor: AttentionProcessor | None = options.get(PROCESSOR)
        attention = partial(host_attention, self.site.heads, options)
        if processor is None or not processor.changes_self_attention:
            return attention(q, k, v)
        return processor.self_attention(self.site, q, k, v, attention)


def _replaced(replacement: Callable, options: dict, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return replacement(query, key, value, options)


class Finish:
    """attn2 output patch: ends the site's call and lets the processor change the output of to_out."""

    def __call__(self, y, options):
        call: SiteCall | None = options.pop(_CALL, None)
        return y if call is None else call.finish(y)
