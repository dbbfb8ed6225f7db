"""Muon (Jordan et al. 2024): momentum with orthogonalised updates, for matrices and convolutions.

Measured on the embedded base, 300 steps on the same pictures and noise from the same weights: the smoothed
loss was 0.171 against AdamW's 0.180, at 1.2 to 1.4 times the seconds per step. `torch.optim.Muon` only
supports matrices, but most of a UNet is convolutions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of the reference implementation
MOMENTUM = 0.95


def orthogonalise(gradient: Tensor, steps: int = 5) -> Tensor:
    """Approximates U V^T of the SVD U S V^T of `gradient`, reshaped to `[out, everything else]`.

    The result's singular values are in 0.7..1.2.
    """
    x = gradient.flatten(1)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = (x / (x.norm() + 1e-7)).bfloat16()      # a third faster; the iteration was designed for it
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(gradient.dtype).reshape(gradient.shape)


class Muon(torch.optim.Optimizer):
    """Updates are scaled to the typical size of AdamW's (0.2 per weight, Liu et al. 2025), so that both can
    use the same learning rate.

    With n processes, each orthogonalises every n-th matrix and receives the results of the others.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _updates(self, params: list[nn.Parameter]) -> list[Tensor]:
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        updates = []
        for i, p in enumerate(params):
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 1 - MOMENTUM)
            is_own = i % processes == rank
            updates.append(orthogonalise(p.grad.lerp(momentum, MOMENTUM)) if is_own else torch.zeros_like(p))
        if processes > 1:
            flat = torch.cat([u.flatten() for u in updates])
            dist.all_reduce(flat)
            updates = [part.view_as(u)
                       for part, u in zip(flat.split([u.numel() for u in updates]), updates, strict=True)]
        return updates

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p, update in zip(params, self._updates(params), strict=True):
                size = 0.2 * max(p.flatten(1).shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)


def split(modules: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits parameters into those for Muon, and those for AdamW (embeddings, norms and biases)."""
    embeddings = {id(m.weight) for m in modules.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in modules.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in modules.parameters() if id(p) not in chosen]
