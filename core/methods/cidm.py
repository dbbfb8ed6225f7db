"""CIDM: concept-incremental diffusion (Dong et al., NeurIPS 2024, arXiv 2410.17594).

Trained: layer-wise tokens and rank-4 deltas on q, k, v, out of every site. Loss: denoising + gamma1 R1
(task-specific: orthogonal subspaces) + gamma2 R2 (task-shared: a common subspace W*), alternating with a step
on W* and H (cidm_losses). The first task uses the denoising term only. Elastic weight aggregation gives every
concept of the bank a weight at inference (Eq. 3, see model.aggregation).

The released code (JiahuaDong/CIFC) differs from the paper. It has no R2. In place of R1 it takes 0.1 times
`orthogonality_released`, a mean where the paper has a sum. It adds the attention regulariser of Mix-of-Show,
which drops out where the mask of a picture is full, as without object masks and padding; and it stops the
words at a length. Its aggregation has another power, norm and scale. `orthogonality="released"`,
`shared="off"` and the aggregation mode `released` are its training and sampling; `orthogonality="aa"`,
`shared="gradient"`, `attention_weight=0`, `token_norm_stop=0` and the mode `paper` are the paper's.

Where we deviate: R1's default is the r×r reading, because the printed one is zero only for A_g = 0. W* and H
default to closed-form alternating least squares in low-rank algebra. W* is bounded to rank `shared_rank`:
with the paper's full-rank W* and H, R2 has a trivial zero once all old row spaces fit side by side. R1 and R2
are quadratic in deltas, whose size grows with the learning rate. The gammas were published for the rate 1e-4,
so they are multiplied by (`gamma_lr` / lr)^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.adapters import adapter_key
from ..attention.maps import MapProcessor, attention_regulariser
from ..conditioning.learned_words import LearnedWords
from ..model.deltas import DeltaKey, LowRankDelta
from ..model.processor import AttentionProcessor
from ..settings import between, one_of, setting
from . import cidm_losses as losses
from .base import Forward, Task, low_rank_deltas, register, total
from .low_rank import LowRankConfig, LowRankMethod

ORTHOGONALITIES = ("rr", "aa", "released", "off")
SHARED = ("als", "gradient", "off")


@dataclass(frozen=True)
class CIDMConfig(LowRankConfig):
    """Rank, layer-wise words and both learning rates are the paper's. The code's attention_weight is 0.01,
    its first_std 0.011 to 0.020 for SD1.5. Its token_norm_stop is absolute: 0.55, about 1.4 times SD1.5's
    usual length. gamma_lr: the learning rate that the gammas hold for; 0 = every rate."""

    gamma1: float = setting(0.1, "Weight of the task-specific loss R1; 0 = off. Paper: 0.1.",
                            0.0, 100.0, 0.01)
    gamma2: float = setting(1.0, "Weight of the task-shared loss R2; 0 = off. Paper: 1.", 0.0, 100.0, 0.1)
    orthogonality: str = setting("rr", "Reading of R1. rr compares r x r products (ours), aa a x a products "
                                       "(as printed), released as in the paper's code.",
                                 choices=ORTHOGONALITIES)
    shared: str = setting("als", "How the common subspace W* and H are found: als solves for them, "
                                 "gradient takes the paper's step.", choices=SHARED)
    shared_rank: int = setting(8, "Rank of the common subspace W*: its rows per projection.", 1, 256)
    attention_weight: float = setting(0.01, "Weight of the attention regulariser; 0 = off.", 0.0, 10.0, 0.01)
    token_norm_stop: float = setting(1.4, "Words are no longer trained once their mean norm is this many "
                                          "times the class noun's; 0 = never.", 0.0, 100.0, 0.1)
    gamma_lr: float = 1e-4

    limits = {"orthogonality": one_of(ORTHOGONALITIES), "shared": one_of(SHARED),
              "shared_rank": between(1, 256)}


@register("cidm", CIDMConfig, "layer-wise tokens and prompt-activated low-rank deltas with consolidation "
          "losses; nothing learned is ever overwritten")
class CIDM(LowRankMethod):
    """old_up: the old A_i of each projection, as the chosen reading of R1 takes them; common: W* and H."""

    extra_key = "shared._extra_state"
    published_mode = "paper"
    refinable = True
    config: CIDMConfig
    words: LearnedWords

    def begin(self, task: Task) -> None:
        super().begin(task)
        c, device = self.config, task.backbone.device
        self.norm_limit, self.tokens_stopped = c.token_norm_stop * self._class_norm(), False
        self.maps = MapProcessor(super().processor()) if c.attention_weight > 0 else None
        earlier = task.earlier(self.name) if c.orthogonality != "off" or c.shared != "off" else []
        old = {key: [d.to(device) for d in low_rank_deltas(earlier, key)] for key in self.adapters.keys}
        old = {key: deltas for key, deltas in old.items() if deltas}
        self.old_up = {key: self._stacked_ups(deltas) for key, deltas in old.items()}
        self.common = self._common(old, task.bank.shared.get(self.name, {}))

    def _common(self, tasks: Mapping[DeltaKey, list[LowRankDelta]], carried: Mapping[str, Tensor],
                ) -> Mapping[DeltaKey, losses.LowRankCommon | losses.DenseCommon]:
        """W* and H of some tasks, by projection."""
        c, kinds = self.config, {"als": losses.LowRankCommon, "gradient": losses.DenseCommon}
        return {key: kinds[c.shared](deltas, carried.get(adapter_key(*key)), c.shared_rank)
                for key, deltas in tasks.items() if c.shared != "off"}

    def _stacked_ups(self, deltas: list[LowRankDelta]) -> Tensor:
        """The old A_i for the chosen reading of R1: side by side `[a, sum r]`, or stacked `[g - 1, a, R]`."""
        ups = [losses.stored_up(delta) for delta in deltas]
        if self.config.orthogonality == "rr":
            return torch.cat(ups, dim=1)
        rank = max(up.shape[1] for up in ups)
        return torch.stack([F.pad(up, (0, rank - up.shape[1])) for up in ups])

    def _class_norm(self) -> float:
        norms = [encoder.vectors(ids).norm(dim=-1).mean() for encoder in self.task.backbone.text
                 if (ids := encoder.ids(self.task.class_noun))]
        return float(torch.stack(norms).mean()) if norms else float("inf")

    @property
    def matched(self) -> float:
        """Factor on the gammas for this learning rate; 1 at the published one."""
        c = self.config
        return (c.gamma_lr / c.lr) ** 2 if c.gamma_lr > 0 and c.lr > 0 else 1.0

    def processor(self) -> AttentionProcessor:
        return self.maps or super().processor()

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """The attention regulariser; from the second task on also R1 and R2, weighted."""
        c, terms = self.config, {}
        if self.maps is not None:
            positions = [words.get(self.task.name, ()) for words in seen.context.words]
            value = attention_regulariser(self.maps.take(), positions, seen.batch.masks)
            if value is not None:
                terms["attention"] = c.attention_weight * value
        if self.old_up and c.orthogonality != "off":
            terms["specific"] = c.gamma1 * self.specific()
        if self.common:
            terms["shared"] = c.gamma2 * self.matched * self.shared()
        return terms

    def specific(self) -> Tensor:
        """R1 over all sites and projections, for this learning rate; 0 for the first task."""
        ups = {key: self.adapters.scaled(key)[0] for key in self.old_up}
        if self.config.orthogonality == "released":      # a mean, with a term that is not quadratic in A_g
            return total(losses.orthogonality_released(old, ups[key])
                         for key, old in self.old_up.items()) / max(1, len(ups))
        r1 = losses.orthogonality_rr if self.config.orthogonality == "rr" else losses.orthogonality_aa
        return self.matched * total(r1(old, ups[key]) for key, old in self.old_up.items())

    def shared(self) -> Tensor:
        """The part of R2 that reaches this task's deltas, with W* and H held fixed."""
        return total(common.loss(*self.adapters.scaled(key)) for key, common in self.common.items())

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Stops the words at their limit, then moves W* and H with this task's deltas held fixed."""
        super().after_step(step)
        if not self.tokens_stopped and self.norm_limit > 0 and self.words.mean_norm() >= self.norm_limit:
            self.tokens_stopped = True
            self.words.requires_grad_(False)
            for vector in self.words.vectors.values():
                vector.grad = None      # the optimiser skips parameters without a gradient
        for key, common in self.common.items():
            common.step(*self.adapters.scaled(key), self.config.lr)

    @torch.no_grad()
    def shared_state(self) -> dict[str, Tensor]:
        """W* of every projection; after the first task it is that task's own."""
        own = {key: [LowRankDelta(*self.adapters.scaled(key))] for key in self.adapters.keys}
        common = self.common if self.old_up else self._common(own, {})
        return {adapter_key(*key): getattr(c, c.trained[0]).cpu().clone() for key, c in common.items()}

    def extra_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"stopped": self.tokens_stopped}
        for key, common in self.common.items():
            for name in common.trained:
                state.setdefault(name, {})[adapter_key(*key)] = getattr(common, name)
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.tokens_stopped = bool(state["stopped"])
        self.words.requires_grad_(not self.tokens_stopped)
        for key, common in self.common.items():
            for name in common.trained:
                setattr(common, name, state[name][adapter_key(*key)].to(getattr(common, name)))
