"""The sites of a ComfyUI UNet. Layer-wise words and attention processors reach them through ComfyUI's own
attn2 patches.

A site's call is spread over three hooks of a transformer block: `Begin` (attn2 patch), `Replace` (attn2
replacement) and `Finish` (attn2 output patch). The hooks pass the `SiteCall` on in the options of the block
call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import comfy.conds
import comfy.utils
import torch
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import ConceptError
from ..model.processor import AttentionProcessor, HostAttention, SiteCall
from ..model.sites import Site, SiteLayout, unet_layout
from .prompt_marks import MARKS

# keywords of the UNet call and keys in transformer_options:
OFFSETS = "continual_concepts_offsets"      # layer copies minus their mean, `[B, L, N, D]`
WORDS = "continual_concepts_words"          # codes of the concepts at each token, or 0, `[B, S, N, 1]`
STRENGTHS = "continual_concepts_strengths"  # factors on their deltas, `[B, S, N, 1]`
# keys in transformer_options only:
PROCESSOR = "continual_concepts_processor"  # the attention processor of this UNet call
TEXT = "continual_concepts_text"            # prompts, offsets, words, strengths; None if not constant
_ALONE = "continual_concepts_alone"         # whether no other code reads the cells between to_q and to_out
_CALL = "continual_concepts_call"           # the SiteCall, in the options of one block call
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)
ATTENTION = "optimized_attention_override"  # the host's key for an attention override

# ComfyUI's name of a transformer block: input | middle | output, number, index inside
Address = tuple[str, int, int]
# (transformer options, latents of a UNet call) -> attention processor
ProcessorSource = Callable[[dict, Tensor], "AttentionProcessor | None"]


def _address(path: str) -> Address:
    """`input_blocks.1.1.transformer_blocks.0` -> ("input", 1, 0)."""
    parts = path.split(".")
    number = 0 if parts[0] == "middle_block" else int(parts[1])
    return parts[0].removesuffix("_blocks").removesuffix("_block"), number, int(parts[-1])


@dataclass(frozen=True)
class UNetSites:
    """The sites of a ComfyUI UNet.

    Attributes:
        unet: ComfyUI's module.
        layout: The sites with diffusers' names, as in every host.
        paths: Site index -> module path of its transformer block.
    """

    unet: nn.Module
    layout: SiteLayout
    paths: tuple[str, ...]

    @property
    def addresses(self) -> dict[Address, Site]:
        return {_address(path): site for path, site in zip(self.paths, self.layout.sites, strict=True)}

    def linear(self, site: Site, projection: str) -> nn.Linear:
        """The module of a projection."""
        inner = "to_out.0" if projection == "to_out" else projection
        return cast(nn.Linear, self.unet.get_submodule(f"{self.paths[site.index]}.attn2.{inner}"))

    def key(self, site: Site, projection: str) -> str:
        """Name of a projection's weight in a MODEL, as `add_patches` expects it."""
        inner = "to_out.0" if projection == "to_out" else projection
        return f"diffusion_model.{self.paths[site.index]}.attn2.{inner}.weight"

    def project(self, site: Site, projection: str, x: Tensor) -> Tensor:
        """Applies the projection's currently loaded weights: x `[..., b]` to `[..., a]`."""
        return self.linear(site, projection)(x)

    def normalised(self, site: Site, projection: str, y: Tensor) -> Tensor:
        """These UNets have no norm of queries and keys."""
        return y


def find_sites(model, text_widths: tuple[tuple[str, int], ...]) -> UNetSites:
    """The sites of a MODEL. Raises ConceptError unless it is a UNet of the Stable Diffusion 1, 2 or XL
    families."""
    unet, config = model.model.diffusion_model, model.model.model_config.unet_config
    suffix = ".attn2.to_q.weight"
    mapping = comfy.utils.unet_to_diffusers(config) if "transformer_depth" in config else {}
    names = {theirs.removesuffix(".to_q.weight"): ours.removesuffix(suffix)
             for theirs, ours in mapping.items() if theirs.endswith(suffix)}
    if not names:
        raise ConceptError(f"the model is a {type(model.model).__name__}, "
                           "which has no text cross-attention sites; "
                           "allowed: Stable Diffusion 1.x, 2.x and SDXL checkpoints")
    attentions = {name: unet.get_submodule(f"{path}.attn2") for name, path in names.items()}
    shapes = {name: (attention.heads, attention.to_q.weight.shape[0], attention.to_k.weight.shape[1])
              for name, attention in attentions.items()}
    layout = unet_layout(shapes, text_widths)
    return UNetSites(unet, layout, tuple(names[site.name] for site in layout.sites))


class OffsetCond(comfy.conds.CONDRegular):
    """Differences of a prompt's layer copies from their mean, `[B, L, N, D]`. Prompts of different lengths
    share a batch by repetition, as in ComfyUI's CONDCrossAttn.
    """

    def can_concat(self, other) -> bool:
        if not isinstance(other, OffsetCond) or self.cond.device != other.cond.device:
            return False
        a, b = self.cond.shape, other.cond.shape
        return (a[0], a[1], a[3]) == (b[0], b[1], b[3]) and math.lcm(a[2], b[2]) <= 4 * min(a[2], b[2])

    def concat(self, others) -> Tensor:
        conds = [self.cond, *(other.cond for other in others)]
        length = math.lcm(*(cond.shape[2] for cond in conds))
        return torch.cat([cond.repeat(1, 1, length // cond.shape[2], 1) for cond in conds])


class SlotCond(OffsetCond):
    """Values at every token in S slots, `[B, S, N, 1]`. Prompts with fewer slots get empty ones."""

    def can_concat(self, other) -> bool:
        return isinstance(other, SlotCond) and OffsetCond(self.cond[:, :1]).can_concat(
            OffsetCond(other.cond[:, :1]))

    def concat(self, others) -> Tensor:
        slots = max(cond.cond.shape[1] for cond in (self, *others))
        filled = [OffsetCond(pad(cond.cond, (0, 0, 0, 0, 0, slots - cond.cond.shape[1])))
                  for cond in (self, *others)]
        return filled[0].concat(filled[1:])


def fit_offsets(offsets: Tensor, context: Tensor) -> Tensor:
    """Fits offsets `[B, L, n, D]` to a context `[B, N, D]` that other nodes may have changed.

    Offsets are repeated like the context (batching). They are zero for appended tokens (Conditioning Concat)
    and where the context is zero (Conditioning Zero Out).

    Returns:
        `[B, L, N, D]`.

    Raises:
        ConceptError: The context has another number of rows.
    """
    if offsets.shape[0] != context.shape[0]:
        raise ConceptError(f"layer-wise words came for {offsets.shape[0]} prompts, "
                           f"but another node made {context.shape[0]} of them; "
                           "put that node before ElasticWeightAggregate")
    n, length = offsets.shape[2], context.shape[1]
    times = -(-length // n)
    offsets = offsets.repeat(1, 1, times, 1)[:, :, :length]
    if times > 1:
        whole = context[:, :length - length % n].unflatten(1, (-1, n))
        repeated = (whole == whole[:, :1]).all(-1).all(-1).all(-1) & (length % n == 0)
        first = torch.arange(length, device=context.device) < n
        offsets = offsets * (repeated[:, None, None, None] | first[:, None])
    return offsets * (context != 0).any(-1).any(-1)[:, None, None, None]


def progress_of(options: dict) -> float:
    """Share of completed sampling steps, computed from the noise level: 0 at the first step, 1 at the last.
    """
    sigmas, sigma = options.get("sample_sigmas"), options.get("sigmas")
    if sigmas is None or sigma is None or len(sigmas) < 3:
        return 0.0
    done = int((sigmas[:-1] > sigma.flatten()[0].to(sigmas) + 1e-6).sum())
    return min(1.0, done / (len(sigmas) - 2))


class DiffusionWrapper:
    """ComfyUI wrapper around the UNet call: puts offsets, words and the attention processor into the
    transformer options.

    Args:
        processor: Called with the transformer options and the latents before every UNet call; returns the
            attention processor, or None to leave the call unchanged.
    """

    def __init__(self, processor: ProcessorSource | None = None) -> None:
        self.processor = processor

    def __call__(self, executor, x, timesteps, context, y=None, control=None, transformer_options=None,
                 **kwargs):
        offsets = kwargs.pop(OFFSETS, None)
        options = dict(transformer_options or {})
        if offsets is not None:
            options[OFFSETS] = fit_offsets(offsets, context)
        for key in (WORDS, STRENGTHS):
            values = kwargs.pop(key, None)
            if values is not None:
                options[key] = fit_offsets(values, context)
        options[MARKS] = kwargs.pop(MARKS, None)
        if self.processor is not None:
            options[_ALONE], options[TEXT] = _is_alone(options), None
            if options[_ALONE] and all(isinstance(patch, (AddOffsets, Begin))
                                       for patch in options["patches"]["attn2_patch"]):
                options[TEXT] = context, *(options.get(key) for key in (OFFSETS, WORDS, STRENGTHS))
            options[PROCESSOR] = self.processor(options, x)
        return executor(x, timesteps, context, y, control, options, **kwargs)


class AddOffsets:
    """attn2 patch: adds the offsets of each site's layer copy."""

    def __init__(self, addresses: dict[Address, Site]) -> None:
        self.addresses = addresses

    def __call__(self, n, context, value, options):
        site = _site_of(self.addresses, options)
        offsets = options.get(OFFSETS)
        if offsets is not None and site is not None:
            offset = offsets[:, site.copy].to(context)
            value = context + offset if value is context else value + offset
            context = context + offset
        return n, context, value


class Begin:
    """The last attn2 patch: begins the site's call and changes the inputs of the frozen projections."""

    def __init__(self, sites: UNetSites) -> None:
        self.addresses = sites.addresses
        self.skips_text = all(_is_plain(sites.linear(site, name)) for site in sites.layout.sites
                              for name in ("to_k", "to_v"))

    def __call__(self, n, context, value, options):
        processor, site = options.get(PROCESSOR), _site_of(self.addresses, options)
        if processor is None or site is None:
            return n, context, value
        call = options[_CALL] = SiteCall(processor, site, n, context, value)
        if options.get(_ALONE):
            call.enter()
        if not call.reads_text and self.skips_text:
            context, value = context[:, :0], value[:, :0]
        return call.hidden, context, value


def _is_plain(linear: nn.Module) -> bool:
    """Whether a projection is an ordinary torch linear layer. Other kinds of layers may fail on an empty
    text.
    """
    weight = linear.weight
    is_own = type(weight) in (Tensor, nn.Parameter) and weight.device.type in ("cpu", "cuda")
    return is_own and weight.dtype in _PLAIN


def _is_alone(options: dict) -> bool:
    """Whether no other node's code runs between to_q and to_out of the sites."""
    patches, replaced = options.get("patches", {}), options.get("patches_replace", {}).get("attn2", {})
    before, after = patches.get("attn2_patch", []), patches.get("attn2_output_patch", [])
    return (bool(before) and isinstance(before[-1], Begin)
            and all(isinstance(patch, Finish) for patch in after)
            and all(isinstance(patch, Replace) and patch.previous is None for patch in replaced.values()))


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
        attention = HostAttention(partial(_attention, self.site.heads, options), others)
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
        attention = partial(_attention, self.site.heads, options)
        if processor is None or not processor.changes_self_attention:
            return attention(q, k, v)
        return processor.self_attention(self.site, q, k, v, attention)


def _replaced(replacement: Callable, options: dict, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return replacement(query, key, value, options)


def _attention(heads: int, options: dict, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return differentiable_attention(None, query, key, value, heads)
    return optimized_attention(query, key, value, heads, attn_precision=options.get("attn_precision"),
                               transformer_options=options)


def differentiable_attention(_host, *args, **kwargs) -> Tensor:
    """Torch's attention, used instead of the host's. The host's may have no gradient (SageAttention). Its
    split and sub-quadratic forms, used without a graphics card, are slower and store full attention matrices
    for the backward pass.
    """
    return attention_pytorch(*args, **kwargs)


class Finish:
    """attn2 output patch: ends the site's call and lets the processor change the output of to_out."""

    def __call__(self, y, options):
        call: SiteCall | None = options.pop(_CALL, None)
        return y if call is None else call.finish(y)


def processor_patches(sites: UNetSites, previous: dict | None = None) -> dict:
    """The hooks of all sites as transformer options. previous: existing attn2 replacements."""
    previous = previous or {}
    replace = {address: Replace(site, previous.get(address) or previous.get(address[:2]))
               for address, site in sites.addresses.items()}
    return {"patches": {"attn2_patch": [AddOffsets(sites.addresses), Begin(sites)],
                        "attn2_output_patch": [Finish()]},
            "patches_replace": {"attn2": replace}}
