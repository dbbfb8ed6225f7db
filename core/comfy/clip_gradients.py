"""The host's CLIP while learning passes gradients through it. Everything is found again as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from comfy.clip_model import ACTIVATIONS
from torch import nn

from ..hosts.quick_gelu import quick_gelu


@contextmanager
def fit_for_gradients(clip) -> Iterator[None]:
    """Inside, a loaded CLIP computes what it always does, with gradients, in less time and memory."""
    text = clip.cond_stage_model
    layers = [layer for layer in getattr(text, "inner", text).modules() if type(layer).__name__ == "CLIPLayer"]
    on_processor = clip.patcher.load_device.type == "cpu"
    with _no_writing_over(layers), _lean_activations(layers), _cast_once(layers if on_processor else ()):
        yield


@contextmanager
def _no_writing_over(layers: Sequence[nn.Module]) -> Iterator[None]:
    """The host's CLIP layers add in place to what their norms have kept for the backward pass; inside, norms keep a copy of their own."""
    hooks = [norm.register_forward_pre_hook(_copied) for layer in layers for norm in (layer.layer_norm1, layer.layer_norm2)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _copied(_module, inputs: tuple) -> tuple:
    return (inputs[0].clone(), *inputs[1:]) if inputs[0].requires_grad else inputs


@contextmanager
def _lean_activations(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Our quick GELU in place of the host's; layers with another activation keep it."""
    theirs = ACTIVATIONS["quick_gelu"]
    changed = [layer.mlp for layer in layers if layer.mlp.activation is theirs]
    try:
        for mlp in changed:
            mlp.activation = quick_gelu
        yield
    finally:
        for mlp in changed:
            mlp.activation = theirs


@contextmanager
def _cast_once(layers: Sequence[nn.Module]) -> Iterator[None]:
    """The host stores a CLIP in half precision and computes in float32: every pass casts all weights anew, and their casts stay in memory
    until the backward pass. Inside, the weights are float32 and so need no cast. On a graphics card casts are quick, and in mixed precision
    they are the smaller ones; there nothing is done."""
    linears = [part for layer in layers for part in layer.modules() if isinstance(part, nn.Linear)]
    changed = [(linear, linear.weight.dtype) for linear in linears
               if type(linear.weight.data) is torch.Tensor and linear.weight.dtype in (torch.float16, torch.bfloat16)]
    try:
        for linear, _ in changed:
            linear.weight.data = linear.weight.data.float()
        yield
    finally:
        for linear, dtype in changed:      # cast back, not put back: the host may have loaded the weights anew meanwhile
            if linear.weight.dtype == torch.float32:
                linear.weight.data = linear.weight.data.to(dtype)
