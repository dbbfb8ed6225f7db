"""EWC: sequential finetuning with an elastic tie (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796; online form: Schwarz et al., ICML 2018).

The papers': `L + lambda / 2 sum_k F_k (theta_k - theta*_k)^2`, theta* the weights after the last task and F the diagonal of the Fisher
information, squared gradients of the loss. Online: one running F for all old tasks, `F <- decay F + F_t`, each task's F_t normalised so
that no task counts more for its size (the ICML paper's advice, as recalled).

Here theta are the two factors of the one adapter that `finetune` trains on and on: the same capacity, the tie alone is new. Words belong
to one concept each and are not tied. CIDM's table has EWC without saying what is trained or how strong the tie is; C-LoRA's appendix is
recalled to use lambda 1e6, for full weights and a Fisher as it comes, which says nothing about factors and a Fisher of mean 1.
Ours: F_t from the gradients that training computes anyway, per sample, over about the last `fisher_window` steps (an exponential
mean, so that no step need be the last that was planned), normalised to mean 1 over all entries; lambda and decay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..model.deltas import DeltaKey
from .base import Forward, Outcome, Task, adapter_key, register, require
from .finetune import Finetune, FinetuneConfig, _Continued

_FISHER = "fisher."


@dataclass(frozen=True)
class EWCConfig(FinetuneConfig):
    """tie: lambda, for a Fisher of mean 1; decay: of the running Fisher per task, 1 = old tasks never fade; fisher_window: steps at the
    end of a task that its Fisher is, about, the mean of."""

    tie: float = 0.1
    decay: float = 1.0
    fisher_window: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tie >= 0, "tie", self.tie, "0 or more")
        require(0 <= self.decay <= 1, "decay", self.decay, "0 to 1")
        require(self.fisher_window >= 1, "fisher_window", self.fisher_window, "1 or more")


def squared_gradients(gradient: Tensor, x: Tensor, up: Tensor, down: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sums over samples of the squared gradients of `up` `[a, r]` and `down` `[r, b]` in `y = scale x down^T up^T`.

    gradient: of the loss to y `[B, S, a]`, x `[B, S, b]`. Each sample's gradient is the product of its own two slices: no pass per sample.
    """
    hidden = scale * x @ down.T
    of_up = gradient.transpose(1, 2) @ hidden
    of_down = (scale * gradient @ up).transpose(1, 2) @ x
    return of_up.square().sum(0), of_down.square().sum(0)


class _Watched(_Continued):
    """Tells `note` the gradient that comes back to every projection's output, and its input."""

    def __init__(self, adapters, start, note: Callable[[DeltaKey, Tensor, Tensor], None]) -> None:
        super().__init__(adapters, start)
        self.note = note

    def project(self, site, projection, x, y):
        changed, key = super().project(site, projection, x, y), (site.index, projection)
        if changed.requires_grad and adapter_key(*key) in self.adapters.up:
            changed.register_hook(partial(self._note, key, x.detach()))      # fires once, also where checkpointing runs this again
        return changed

    def _note(self, key: DeltaKey, x: Tensor, gradient: Tensor) -> None:
        self.note(key, gradient, x)


class EWC(Finetune):
    learns_alone = True      # the Fisher is of the pictures that a process saw

    config: EWCConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.task, self.steps, self.own = task, 0, None
        self.mean: dict[str, Tensor] = {}      # exponential mean of this task's squared gradients, a tensor per factor
        self.pending: dict[str, Tensor] = {}      # those of the step under way
        state, device = task.bank.shared.get(self.name, {}), task.backbone.device
        factors = self._factors()
        saved = {name: state[_FISHER + name] for name in factors if _FISHER + name in state}
        fits = self.start and all(name in saved and saved[name].shape == factors[name].shape for name in factors)
        self.fisher = {name: saved[name].to(device, torch.float32) for name in factors} if fits else {}
        self.anchor = {name: p.detach().clone() for name, p in factors.items()} if fits else {}

    def _factors(self) -> dict[str, Tensor]:
        """Every factor of the adapter by name, `up.3-to_k`."""
        return dict(self.adapters.named_parameters())

    def processor(self) -> _Watched:
        return _Watched(self.adapters, self.start, self._note)

    def on_batch(self, batch: Batch) -> Batch:
        self.own = ~batch.is_prior
        return batch

    @torch.no_grad()
    def _note(self, key: DeltaKey, gradient: Tensor, x: Tensor) -> None:
        delta, own = self.adapters.delta(*key), self.own.to(gradient).view(-1, 1, 1)
        found = squared_gradients((own * gradient).float(), x.float(), delta.up, delta.down, delta.scale)
        for name, squares in zip(("up", "down"), found, strict=True):
            name = f"{name}.{adapter_key(*key)}"
            self.pending[name] = squares if name not in self.pending else self.pending[name] + squares

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self.steps = step
        finite = [torch.isfinite(squares).all() for squares in self.pending.values()]
        if finite and bool(torch.stack(finite).all()):      # else a loss scaled too high for fp16
            share = 1.0 / min(step, self.config.fisher_window)
            for name, squares in self.pending.items():
                self.mean[name] = share * squares + (1 - share) * self.mean[name] if name in self.mean else squares
        self.pending = {}

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """The tie; from the second task on. Its price does not depend on how many tasks there were."""
        if not self.fisher or self.config.tie == 0:
            return {}
        factors = self._factors()
        weighted = sum((f * (factors[name] - self.anchor[name]).square()).sum() for name, f in self.fisher.items())
        return {"tie": self.config.tie / 2 * weighted}

    @torch.no_grad()
    def running_fisher(self) -> dict[str, Tensor]:
        """`decay F + F_t`, F_t of mean 1 over all entries; F where this task has seen no gradient."""
        total = sum(float(squares.sum()) for squares in self.mean.values())
        if total == 0:
            return dict(self.fisher)
        count = sum(parameter.numel() for parameter in self._factors().values())
        running = {}
        for name, parameter in self._factors().items():
            new = self.mean.get(name, torch.zeros_like(parameter)) * (count / total)
            running[name] = new + self.config.decay * self.fisher[name] if self.fisher else new
        return running

    def finish(self) -> Outcome:
        outcome = super().finish()
        fisher = {_FISHER + name: f.cpu().clone() for name, f in self.running_fisher().items()}
        return Outcome(outcome.tokens, outcome.deltas, {**outcome.shared, **fisher})

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({**super().modules(), "gathered": _Gathered(self)})


class _Gathered(nn.Module):
    """Lets a checkpoint carry this task's Fisher so far; that of a step that was broken off is left out."""

    def __init__(self, method: EWC) -> None:
        super().__init__()
        self.method = [method]

    def get_extra_state(self) -> dict:
        return {"steps": self.method[0].steps, "mean": dict(self.method[0].mean)}

    def set_extra_state(self, state: dict) -> None:
        method = self.method[0]
        # copies: views into a file lie at odd addresses, where sums may round otherwise
        method.steps, method.pending = int(state["steps"]), {}
        method.mean = {name: squares.to(method.task.backbone.device, copy=True) for name, squares in state["mean"].items()}


register("ewc", EWCConfig, EWC, "sequential finetuning, each factor held the more the old concepts' loss depends on it")
