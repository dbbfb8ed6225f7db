"""Weights in eight bits, so that a base file of many weights stays small."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = ".scale"  # suffix of a packed weight's scales
SMALLEST = 4096  # tensors with fewer numbers stay in fp16
SHARES = (1.0, 0.9, 0.8, 0.7)  # of a row's largest number, which a scale can represent


def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stores matrices and convolutions as int8 with one fp16 scale per output row, all others as fp16.

    Args:
        tensors: weights by name.

    Returns:
        The same names; the scales `[rows]` of a packed weight are under its name with `.scale` at the end.
    """
    packed = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.numel() < SMALLEST:
            packed[name] = tensor.half().contiguous()
            continue
        codes, scale = _codes(tensor.float().flatten(1))
        packed[name], packed[name + SCALE] = codes.view(tensor.shape).contiguous(), scale.half()
    return packed


def _codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[R, N]` int8 and scales `[R]` of `rows` `[R, N]`.

    Each row takes the scale of `SHARES` with the smallest squared error. Otherwise one large weight would
    make all other weights of its row coarse.
    """
    largest = rows.abs().amax(1).clamp(min=1e-8)
    least_error = torch.full_like(largest, torch.inf)
    scale, codes = largest.clone(), torch.zeros_like(rows)
    for share in SHARES:
        candidate = (share * largest / 127).half().float().clamp(min=2**-24)
        rounded = (rows / candidate[:, None]).round().clamp(-127, 127)
        error = (rounded * candidate[:, None] - rows).square().sum(1)
        better = error < least_error
        least_error, scale = torch.where(better, error, least_error), torch.where(better, candidate, scale)
        codes = torch.where(better[:, None], rounded, codes)
    return codes.to(torch.int8), scale


def unpack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 weights from what `pack` stored, or from plain fp16."""
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE) and name[: -len(SCALE)] in tensors:
            continue
        weights[name] = tensor.float()
        if name + SCALE in tensors:
            weights[name] *= tensors[name + SCALE].float().view(-1, *[1] * (tensor.ndim - 1))
    return weights
