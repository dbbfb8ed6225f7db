"""Temporarily prepares ComfyUI's CLIP for gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from comfy.clip_model import ACTIVATIONS, CLIPLayer
from torch import nn

from ..hosts.quick_gelu import quick_gelu


@contextmanager
def fit_for_gradients(clip) -> Iterator[None]:
    """Context manager in which gradients can pass through a loaded CLIP, with less time and memory. Its
    outputs do not change.
    """
    text = clip.cond_stage_model
    layers = [layer for layer in getattr(text, "inner", text).modules()
              if type(layer).__name__ == "CLIPLayer"]
    on_cpu = clip.patcher.load_device.type == "cpu"
    with _inputs_retained(layers), _lean_activations(layers), _cast_once(layers if on_cpu else ()):
        yield


@contextmanager
def _inputs_retained(layers: Sequence[CLIPLayer]) -> Iterator[None]:
    """ComfyUI's CLIP layers write into the inputs that their norms store for the backward pass. In this
    context the norms store copies instead.
    """
    hooks = [norm.register_forward_pre_hook(_copied) for layer in layers
             for norm in (layer.layer_norm1, layer.layer_norm2)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _copied(_module, inputs: tuple) -> tuple:
    return (inputs[0].clone(), *inputs[1:]) if inputs[0].requires_grad else inputs


@contextmanager
def _lean_activations(layers: Sequence[CLIPLayer]) -> Iterator[None]:
    """Context manager in which layers use our quick GELU instead of ComfyUI's. Layers with other activations
    are unchanged.
    """
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
def _cast_once(layers: Sequence[CLIPLayer]) -> Iterator[None]:
    """Context manager in which weights are float32.

    ComfyUI stores a CLIP in half precision and computes in float32. Every forward pass casts all weights, and
    the casts stay in memory until the backward pass. This is only used on the CPU: on a graphics card casts
    are fast, and smaller in mixed precision.
    """
    linears = [part for layer in layers for part in layer.modules() if isinstance(part, nn.Linear)]
    changed = [(linear, linear.weight.dtype) for linear in linears
               if type(linear.weight.data) is torch.Tensor
               and linear.weight.dtype in (torch.float16, torch.bfloat16)]
    try:
        for linear, _ in changed:
            linear.weight.data = linear.weight.data.float()
        yield
    finally:
        # cast back instead of restored, because the host may have reloaded the weights
        for linear, dtype in changed:
            if linear.weight.dtype == torch.float32:
                linear.weight.data = linear.weight.data.to(dtype)
