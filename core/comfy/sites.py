"""What a call of a ComfyUI model carries for its sites: layer copies, words, the attention processor.

How the sites of a family are reached is in `families`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import comfy.conds
import torch
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ConceptError
from ..model.processor import AttentionProcessor
from .prompt_marks import MARKS

# keywords of the denoiser's call and keys in transformer_options:
OFFSETS = "continual_concepts_offsets"      # layer copies minus their mean, `[B, L, N, D]`
WORDS = "continual_concepts_words"          # codes of the concepts at each token, or 0, `[B, S, N, 1]`
STRENGTHS = "continual_concepts_strengths"  # factors on their deltas, `[B, S, N, 1]`
# keys in transformer_options only:
PROCESSOR = "continual_concepts_processor"  # the attention processor of this call
DELTAS = "continual_concepts_deltas"        # deltas that act as if they were folded into the weights
TEXT = "continual_concepts_text"            # prompts, offsets, words, strengths; None if not constant
ALONE = "continual_concepts_alone"          # whether no other code reads the cells between to_q and to_out
ATTENTION = "optimized_attention_override"  # the host's key for an attention override

# (transformer options, latents of a call) -> attention processor
ProcessorSource = Callable[[dict, Tensor], "AttentionProcessor | None"]


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
                           "put that node before Apply Concepts")
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


class Hooks(Protocol):
    """What `DiffusionWrapper` asks of a family."""

    def is_alone(self, options: dict) -> bool:
        """Whether no other node's code runs between to_q and to_out of the sites."""

    def reads_own_text(self, options: dict) -> bool:
        """Whether no other node changes the text of the sites. Asked only if `is_alone`."""

    def attached(self, denoiser: Any = None) -> AbstractContextManager[None]:
        """Context manager around calls of the denoiser, in which its sites run attention processors."""


class DiffusionWrapper:
    """ComfyUI wrapper around the denoiser's call: puts offsets, words and the attention processor into the
    transformer options.

    Args:
        hooks: The MODEL's family.
        processor: Called with the transformer options and the latents before every call; returns the
            attention processor, or None to leave the call unchanged.
    """

    def __init__(self, hooks: Hooks, processor: ProcessorSource | None = None) -> None:
        self.hooks, self.processor = hooks, processor

    def __call__(self, executor, x, timesteps, context, *args, **kwargs):
        # UNets and Flux get the options as their last argument, transformers with cross-attention by name
        is_last = len(args) > 2
        options = dict((args[-1] if is_last else kwargs.get("transformer_options")) or {})
        offsets = kwargs.pop(OFFSETS, None)
        if offsets is not None:
            options[OFFSETS] = fit_offsets(offsets, context)
        for key in (WORDS, STRENGTHS):
            values = kwargs.pop(key, None)
            if values is not None:
                options[key] = fit_offsets(values, context)
        options[MARKS] = kwargs.pop(MARKS, None)
        if self.processor is not None:
            options[ALONE], options[TEXT] = self.hooks.is_alone(options), None
            if options[ALONE] and self.hooks.reads_own_text(options):
                options[TEXT] = context, *(options.get(key) for key in (OFFSETS, WORDS, STRENGTHS))
            processor = options[PROCESSOR] = self.processor(options, x)
            context = context if processor is None else processor.extended(context)
        if is_last:
            args = *args[:-1], options
        else:
            kwargs["transformer_options"] = options
        with self.hooks.attached(getattr(executor, "class_obj", None)):
            return executor(x, timesteps, context, *args, **kwargs)


def host_attention(heads: int, options: dict, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The host's attention of a site, with heads concatenated."""
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
