"""C-LoRA: continual diffusion with self-regularised low-rank adaptation (Smith et al., TMLR 2024, arXiv 2304.06027).

The paper's (eqs. 1 to 3): only `to_k` and `to_v` of the sites learn, `W_t = W_init + sum_{t'<t} A_t' B_t' + A_t B_t`, with the loss
`L_diffusion + lambda || |sum_{t'<t} A_t' B_t'| (.) (A_t B_t) ||_F^2`, (.) entry by entry: what earlier tasks changed should be left alone.
The concept is one new word that starts random, without its class noun. No replay; after the task the product joins the sum.

Recalled from its appendix, not verified: rank 16, learning rate 5e-4, lambda 1e8 (hence a sum over entries, not a mean; in float32, since
the products are of the size 1e-10). Unknown: the word's learning rate and spread, which are ours; weight decay is the loop's.

Its known flaw: a new product of zero minimises the penalty, and training pushes later tasks there. `monitors` tells ||A_t B_t||_F over all
projections after every step, and the bank keeps each task's last one (`norm.<concept>`).

The past sum is read off the bank's concepts when a task begins, and not carried beside them: a second copy in the bank would be a dense
matrix per projection (1.4 GB for SDXL), and would still hold a concept that was deleted. While a task runs it is in memory, and a step
builds the a×b products that the formula asks for; neither grows with the bank. Of several words all but the first start at the class noun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..bank.bank import ConceptBank
from ..bank.composition import SUM
from ..bank.tokens import TokenGroup
from ..model.backbone import AttentionProcessor
from ..model.deltas import DeltaKey, LowRankDelta, weighted_sum
from .base import AdapterProcessor, Forward, LearnedWords, LowRankAdapters, Method, Outcome, Task, register, require, stored_dtype

KEYS_AND_VALUES = ("to_k", "to_v")


@dataclass(frozen=True)
class CLoRAConfig:
    """rank, lr, forget (lambda): recalled from the paper's appendix; layerwise off and one word: the paper's; token_lr: ours."""

    rank: int = 16
    scale: float = 1.0
    forget: float = 1e8
    lr: float = 5e-4
    token_lr: float = 1e-3
    layerwise: bool = False
    first_std: float = 0.0
    stored: str = "float16"

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 128, "rank", self.rank, "1 to 128")
        for name in ("forget", "lr", "token_lr", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


def past_changes(bank: ConceptBank, method: str, device) -> dict[DeltaKey, Tensor]:
    """`|sum_{t'<t} A_t' B_t'|` of one method's concepts, `[a, b]` float32 per projection that any of them changed."""
    parts: dict[DeltaKey, list] = {}
    for name, info in bank.infos.items():
        if info.method == method:
            for key, delta in bank[name].deltas.items():
                parts.setdefault(key, []).append((1.0, delta))
    return {key: weighted_sum(found).dense().abs().to(device) for key, found in parts.items()}


def forgetting(past: Mapping[DeltaKey, Tensor], product) -> Tensor:
    """`sum || past (.) product ||_F^2` over projections, eq. 3. product: key -> `[a, b]`, as trained now."""
    return sum((past[key] * product(key).float()).square().sum() for key in past)


class _Changed(torch.autograd.Function):
    """`|| past (.) (A B) ||_F^2` of factors. Autograd would keep a×b matrices of all projections until the backward pass; the gradients for
    A and B are a task's size and known at once."""

    @staticmethod
    def forward(ctx, past: Tensor, up: Tensor, down: Tensor) -> Tensor:
        kept = (up @ down).float().mul_(past)
        loss = kept.flatten().dot(kept.flatten())
        kept.mul_(past).mul_(2)
        ctx.save_for_backward((kept @ down.float().T).to(up.dtype), (up.float().T @ kept).to(down.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, *(gradient * saved for saved in ctx.saved_tensors)


class CLoRA(Method):
    composition = SUM
    word_count = 1

    def __init__(self, config: CLoRAConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, self.task = self.config, task
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.adapters = LowRankAdapters(task.backbone.layout, c.rank, c.scale, task.generator, task.backbone.device, KEYS_AND_VALUES)
        self.past = past_changes(task.bank, self.name, task.backbone.device) if c.forget > 0 else {}

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr},
                {"params": list(self.adapters.parameters()), "lr": self.config.lr}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        return AdapterProcessor(self.adapters)

    def product(self, key: DeltaKey) -> Tensor:
        """`A_t B_t` of a projection, `[a, b]` with gradient."""
        return self.adapters.delta(*key).dense()

    def forgotten(self) -> Tensor:
        """Eq. 3 without lambda."""
        deltas = ((key, self.adapters.delta(*key)) for key in self.past)
        return sum(_Changed.apply(self.past[key], delta.up, delta.down) * delta.scale**2 for key, delta in deltas)

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        return {"forget": self.config.forget * self.forgotten()} if self.past else {}

    @torch.no_grad()
    def monitors(self) -> dict[str, float]:
        """norm: ||A_t B_t||_F over all projections. Near zero in a later task, the penalty has kept it from learning."""
        return {"norm": float(self.norm())}

    @torch.no_grad()
    def norm(self) -> Tensor:
        """From r×r matrices; the products are not built."""
        deltas = [self.adapters.delta(*key) for key in self.adapters.keys]
        squares = [d.scale**2 * ((d.up.T @ d.up) * (d.down @ d.down.T)).sum() for d in deltas]
        return torch.stack(squares).sum().clamp(min=0).sqrt()

    def _recorded(self) -> Mapping[DeltaKey, LowRankDelta]:
        return self.adapters.stored(stored_dtype(self.config.stored))

    def finish(self) -> Outcome:
        norms = {name: norm.clone() for name, norm in self.task.bank.shared.get(self.name, {}).items() if name.startswith("norm.")}
        norms[f"norm.{self.task.name}"] = self.norm().cpu().clone()
        return Outcome(self.words.stored(stored_dtype(self.config.stored)), self._recorded(), norms)

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters})


register("clora", CLoRAConfig, CLoRA,
         "low-rank keys and values in one set of weights; what earlier tasks changed is left alone")
