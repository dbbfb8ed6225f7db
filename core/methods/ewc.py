"""EWC: sequential finetuning with an elastic penalty (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796).

From the paper: `L + lambda / 2 sum_k F_k (theta_k - theta*_k)^2`, theta* the weights after the last task and
F the diagonal of the Fisher information, squared gradients of the loss. Online form (Schwarz et al., ICML
2018): one running F for all old tasks, see fisher.py; the normalisation is that paper's advice, as recalled.

Here theta are the two factors of the one adapter that `finetune` trains on: the same capacity, only the
penalty is new. Words belong to one concept each and are not tied. CIDM's table lists EWC without saying what
is trained or how strong the penalty is. C-LoRA's appendix is recalled to use lambda 1e6, for full weights and
an unnormalised Fisher, which does not carry over to factors and a Fisher of mean 1.

Ours: F_t comes from the gradients that training computes anyway, per sample, over about the last
`fisher_window` steps. It is an exponential mean, so that a run may end at any step. lambda and decay are ours
too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.adapters import adapter_key
from ..attention.gradients import GradientHook
from ..data.batch import Batch
from ..model.deltas import DeltaKey
from ..model.processor import AttentionProcessor
from ..settings import at_least, between
from .base import Forward, Task, register, total
from .finetune import Finetune
from .fisher import running_fisher, stored_fisher
from .low_rank import LowRankConfig


@dataclass(frozen=True)
class EWCConfig(LowRankConfig):
    """tie: lambda, for a Fisher of mean 1; decay: of the running Fisher per task, 1 = old tasks never fade;
    fisher_window: steps at the end of a task over which its Fisher is averaged, approximately."""

    tie: float = 0.1
    decay: float = 1.0
    fisher_window: int = 100

    limits = {"decay": between(0, 1), "fisher_window": at_least(1)}


def squared_gradients(gradient: Tensor, x: Tensor, up: Tensor, down: Tensor,
                      scale: float) -> tuple[Tensor, Tensor]:
    """Squared gradients of both factors in `y = scale x down^T up^T`, summed over samples.

    Each sample's gradient is the product of its own two slices, so no backward pass per sample is needed.

    Args:
        gradient: of the loss with respect to y, `[B, S, a]`.
        x: `[B, S, b]`.
        up: `[a, r]`; down: `[r, b]`.

    Returns:
        Of `up` `[a, r]` and of `down` `[r, b]`.
    """
    hidden = scale * x @ down.T
    of_up = gradient.transpose(1, 2) @ hidden
    of_down = (scale * gradient @ up).transpose(1, 2) @ x
    return of_up.square().sum(0), of_down.square().sum(0)


@register("ewc", EWCConfig,
          "sequential finetuning with a penalty on changing weights that old concepts depend on")
class EWC(Finetune):
    """factors: the adapter's, by name such as `up.3-to_k`; fisher, anchor: F and theta*, empty at first;
    pending, mean: squared gradients of the step under way, and their exponential mean over this task."""

    learns_alone = True      # the Fisher is of the pictures that a process saw
    extra_key = "gathered._extra_state"
    config: EWCConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.is_own = torch.ones(0)
        self.mean: dict[str, Tensor] = {}
        self.pending: dict[str, Tensor] = {}
        self.factors = dict(self.adapters.named_parameters())
        stored = stored_fisher(task.bank.shared.get(self.name, {}), task.backbone.device)
        # with another rank there is no theta*, and training starts anew
        fits = all(name in stored and stored[name].shape == factor.shape
                   for name, factor in self.factors.items())
        self.fisher = stored if fits and self.undone else {}
        self.anchor = {name: self.factors[name].detach().clone() for name in self.fisher}

    def processor(self) -> AttentionProcessor:
        return GradientHook(self.adapters.keys, super().processor(), self._note)

    def begin_step(self) -> None:
        super().begin_step()
        self.pending = {}

    def on_batch(self, batch: Batch) -> Batch:
        self.is_own = ~batch.is_prior
        return batch

    @torch.no_grad()
    def _note(self, key: DeltaKey, x: Tensor, gradient: Tensor) -> None:
        delta, own = self.adapters.delta(key), self.is_own.to(gradient).view(-1, 1, 1)
        both = squared_gradients((own * gradient).float(), x.float(), delta.up, delta.down, delta.scale)
        for factor, squares in zip(("up", "down"), both, strict=True):
            name = f"{factor}.{adapter_key(*key)}"
            self.pending[name] = squares + self.pending.get(name, 0)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        super().after_step(step)
        finite = [torch.isfinite(squares).all() for squares in self.pending.values()]
        if finite and bool(torch.stack(finite).all()):      # else the loss was scaled too high for fp16
            share = 1.0 / min(step, self.config.fisher_window)
            for name, squares in self.pending.items():
                mean = self.mean.get(name)
                self.mean[name] = squares if mean is None else share * squares + (1 - share) * mean
        self.pending = {}

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """`lambda / 2 sum_k F_k (theta_k - theta*_k)^2`, from the second task on."""
        if not self.fisher or self.config.tie == 0:
            return {}
        squares = total((fisher * (self.factors[name] - self.anchor[name]).square()).sum()
                        for name, fisher in self.fisher.items())
        return {"tie": self.config.tie / 2 * squares}

    @torch.no_grad()
    def shared_state(self) -> dict[str, Tensor]:
        squares = {name: self.mean.get(name, torch.zeros_like(p)) for name, p in self.factors.items()}
        return {**super().shared_state(), **running_fisher(self.fisher, squares, self.config.decay)}

    def extra_state(self) -> dict[str, Any]:
        return {"mean": dict(self.mean)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        device = self.task.backbone.device
        self.mean = {name: squares.to(device) for name, squares in state["mean"].items()}
