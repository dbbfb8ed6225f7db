"""C-LoRA: continual diffusion with self-regularised low-rank adaptation (Smith et al., TMLR 2024, arXiv
2304.06027).

From the paper (Eqs. 1 to 3): only `to_k` and `to_v` of the sites are trained,
`W_t = W_init + sum_{t'<t} A_t' B_t' + A_t B_t`, with the loss
`L_diffusion + lambda || |sum_{t'<t} A_t' B_t'| (.) (A_t B_t) ||_F^2`, (.) entry by entry: what earlier tasks
changed should be left alone. The concept is one new word that starts at random, without its class noun. There
is no replay, and after the task the product joins the sum.

Recalled from its appendix, not verified: rank 16, learning rate 5e-4, lambda 1e8. The penalty is therefore a
sum over entries, not a mean, and computed in float32, since the products are about 1e-10. Unknown: learning
rate and spread of the word (ours), and weight decay (the trainer's).

Known weakness: a new product of zero minimises the penalty, and training drives later tasks towards it. The
norm ||A_t B_t||_F is therefore monitored, and the bank keeps each task's last one (`norm.<concept>`). The
penalty grows with the fourth power of the deltas, and the deltas with the learning rate and the steps, so a
lambda holds for one rate and one size of base. Where it is too large, later tasks learn their word alone, on
a base that the first task has changed for every prompt.

The past sum is computed from the bank's concepts when a task begins. A second copy in the bank would be a
dense matrix per projection (1.4 GB for SDXL) and would still contain deleted concepts. While a task runs, the
sum is in memory and a step builds the a×b products of the formula; neither grows with the bank. Of several
words, all but the first start at the class noun.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.composition import SUM
from ..model.deltas import DeltaKey
from ..model.known_gradients import with_gradients
from .base import Forward, Task, register, total
from .low_rank import KEYS_AND_VALUES, LowRankConfig, LowRankMethod


@dataclass(frozen=True)
class CLoRAConfig(LowRankConfig):
    """forget: lambda."""

    rank: int = 16
    lr: float = 5e-4
    layerwise: bool = False
    forget: float = 1e8


def forgetting(past: Mapping[DeltaKey, Tensor], product: Callable[[DeltaKey], Tensor]) -> Tensor:
    """`sum || past (.) product ||_F^2` over projections, Eq. 3. product: key -> A_t B_t `[a, b]`."""
    return total((past[key] * product(key).float()).square().sum() for key in past)


def forgetting_of_factors(past: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`|| past (.) (A B) ||_F^2` of one projection, with gradient for A `[a, r]` and B `[r, b]`."""
    with torch.no_grad():
        weighted = (up @ down).float().mul_(past)
        loss = weighted.flatten().dot(weighted.flatten())
        weighted.mul_(past).mul_(2)
        gradients = {up: (weighted @ down.float().T).to(up.dtype),
                     down: (up.float().T @ weighted).to(down.dtype)}
    return with_gradients(loss, gradients)


@register("clora", CLoRAConfig,
          "low-rank keys and values in one set of weights; a penalty protects what earlier tasks changed")
class CLoRA(LowRankMethod):
    """past: `|sum_{t'<t} A_t' B_t'|` `[a, b]` float32, by projection; empty in the first task."""

    composition = SUM
    word_count = 1
    projections = KEYS_AND_VALUES
    config: CLoRAConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        earlier = task.earlier_sum(self.name) if self.config.forget > 0 else {}
        self.past = {key: delta.dense().abs().to(task.backbone.device) for key, delta in earlier.items()}

    def forgotten(self) -> Tensor:
        """Eq. 3 without lambda."""
        deltas = {key: self.adapters.delta(key) for key in self.past}
        return total(forgetting_of_factors(self.past[key], delta.up, delta.down) * delta.scale**2
                     for key, delta in deltas.items())

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        return {"forget": self.config.forget * self.forgotten()} if self.past else {}

    @torch.no_grad()
    def monitors(self) -> dict[str, float]:
        """norm: near zero in a later task, the penalty has prevented learning."""
        return {"norm": float(self.norm())}

    @torch.no_grad()
    def norm(self) -> Tensor:
        """||A_t B_t||_F over all projections, from r×r matrices; the products are not built."""
        squares = [d.scale**2 * ((d.up.T @ d.up) * (d.down @ d.down.T)).sum()
                   for d in self.adapters.deltas().values()]
        return torch.stack(squares).sum().clamp(min=0).sqrt()

    def shared_state(self) -> dict[str, Tensor]:
        """The norms of all tasks so far."""
        state = self.task.bank.shared.get(self.name, {})
        norms = {name: norm.clone() for name, norm in state.items() if name.startswith("norm.")}
        return norms | {f"norm.{self.task.name}": self.norm().cpu().clone()}
