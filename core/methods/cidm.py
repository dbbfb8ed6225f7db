"""CIDM: concept-incremental diffusion (Dong et al., NeurIPS 2024, arXiv 2410.17594).

Trained: layer-wise tokens and rank-4 deltas on q, k, v, out of every site. Loss: denoising + gamma1 R1 (task-specific: orthogonal
subspaces) + gamma2 R2 (task-shared: a common subspace W*), alternating with a step on W* and H (see cidm_losses), + the attention
regulariser of the released code. The first task uses the denoising and attention terms only.

Where we deviate: R1's default is the r×r reading (`orthogonality="aa"` is the printed one); W* and H default to closed-form
alternating least squares in low-rank algebra (`shared="gradient"` is the paper's step). W* is bounded to rank `shared_rank`: with
the paper's full-rank W* and H the loss R2 has a trivial zero as soon as all old row spaces fit side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.maps import MapProcessor, attention_regulariser
from ..bank.composition import PROMPT
from ..bank.tokens import TokenGroup
from ..model.backbone import AttentionProcessor
from ..model.deltas import DeltaKey, LowRankDelta
from ..settings import setting
from . import cidm_losses as losses
from .base import (
    AdapterProcessor,
    Forward,
    LearnedWords,
    LowRankAdapters,
    Method,
    Outcome,
    Task,
    adapter_key,
    register,
    require,
    stored_dtype,
)

ORTHOGONALITIES = ("rr", "aa", "off")
SHARED = ("als", "gradient", "off")


@dataclass(frozen=True)
class CIDMConfig:
    """Paper: rank 4, token_lr 1e-3, lr 1e-4, gamma1 0.1, gamma2 1.0. Code: attention_weight 0.01, token_norm_stop 0.55.

    first_std: spread of the first word's start, 0 = that of the vocabulary (the code uses 0.011 to 0.020 for SD1.5);
    token_norm_stop: the code's absolute 0.55 is about 1.4 times SD1.5's usual length; stored: type of the bank's tensors.
    """

    rank: int = setting(4, "Rank of the deltas. Paper: 4.", 1, 128)
    scale: float = setting(1.0, "Factor on the deltas; 1 = none.", 0.01, 16.0, 0.05)
    lr: float = 1e-4
    token_lr: float = 1e-3
    layerwise: bool = setting(True, "One vector per word and layer (the paper's), or one for all layers, which exports as an embedding.")
    gamma1: float = setting(0.1, "Weight of the task-specific loss R1; 0 = off. Paper: 0.1.", 0.0, 100.0, 0.01)
    gamma2: float = setting(1.0, "Weight of the task-shared loss R2; 0 = off. Paper: 1.", 0.0, 100.0, 0.1)
    orthogonality: str = setting("rr", "How R1 is read: rr compares r x r products (ours), aa a x a products (as printed).",
                                 choices=ORTHOGONALITIES)
    shared: str = setting("als", "How W* and H are found: als solves for them, gradient takes the paper's step.", choices=SHARED)
    shared_rank: int = setting(8, "Rank of the common subspace W*: its rows per projection.", 1, 256)
    attention_weight: float = setting(0.01, "Weight of the attention regulariser; 0 = off.", 0.0, 10.0, 0.01)
    token_norm_stop: float = setting(1.4, "Words stop learning once their mean length reaches this many times the class noun's; 0 = never.",
                                     0.0, 100.0, 0.1)
    first_std: float = 0.0
    stored: str = "float16"

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 128, "rank", self.rank, "1 to 128")
        require(self.orthogonality in ORTHOGONALITIES, "orthogonality", self.orthogonality, ", ".join(ORTHOGONALITIES))
        require(self.shared in SHARED, "shared", self.shared, ", ".join(SHARED))
        require(1 <= self.shared_rank <= 256, "shared_rank", self.shared_rank, "1 to 256")
        for name in ("lr", "token_lr", "gamma1", "gamma2", "attention_weight", "token_norm_stop", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


class CIDM(Method):
    composition = PROMPT

    def __init__(self, config: CIDMConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, self.task = self.config, task
        layout, device = task.backbone.layout, task.backbone.device
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.adapters = LowRankAdapters(layout, c.rank, c.scale, task.generator, device)
        self.norm_limit = c.token_norm_stop * self._class_norm()
        self.tokens_stopped = False
        self.maps = MapProcessor(AdapterProcessor(self.adapters)) if c.attention_weight > 0 else None
        wanted = c.orthogonality != "off" or c.shared != "off"
        mine = [task.bank.passing(name) for name, info in task.bank.infos.items() if wanted and info.method == self.name]
        old = {key: [d.to(device) for concept in mine if isinstance(d := concept.deltas.get(key), LowRankDelta)]
               for key in self.adapters.keys}
        old = {key: deltas for key, deltas in old.items() if deltas}
        self.old_up = {key: self._stacked_ups(deltas) for key, deltas in old.items()}
        self._begin_shared(old, task.bank.shared.get(self.name, {}))

    def _stacked_ups(self, deltas: list[LowRankDelta]) -> Tensor:
        """The old A_i as the chosen reading of R1 wants them: side by side `[a, sum r]`, or stacked `[g - 1, a, R]`; in the type that they
        are stored in where that is exact, which with many concepts is half the memory."""
        ups = [d.up if d.scale == 1 else d.up.float() * d.scale for d in deltas]
        if self.config.orthogonality != "aa":
            return torch.cat(ups, dim=1)
        rank = max(up.shape[1] for up in ups)
        return torch.stack([F.pad(up, (0, rank - up.shape[1])) for up in ups])

    def _class_norm(self) -> float:
        norms = [encoder.vectors(ids).norm(dim=-1).mean() for encoder in self.task.backbone.text
                 if (ids := encoder.ids(self.task.class_noun))]
        return float(torch.stack(norms).mean()) if norms else float("inf")

    def _begin_shared(self, old: Mapping[DeltaKey, list[LowRankDelta]], state: Mapping[str, Tensor]) -> None:
        """W* for every projection: carried over from the bank, else made from the old deltas."""
        self.grams, self.basis, self.dense = {}, {}, {}
        for key, deltas in old.items():
            saved = state.get(adapter_key(*key))
            if self.config.shared == "als":
                self.grams[key] = losses.Gram.of(deltas)
                fits = saved is not None and saved.shape == (self.config.shared_rank, deltas[0].shape[1])
                self.basis[key] = (saved.to(self.grams[key].inner) if fits else
                                   losses.initial_basis(torch.cat([losses.weighted_rows(d) for d in deltas]), self.config.shared_rank))
            elif self.config.shared == "gradient":
                stacked = torch.stack([d.dense() for d in deltas])
                fits = saved is not None and saved.shape == stacked.shape[1:]
                self.dense[key] = losses.DenseCommon.start(stacked, saved.to(stacked) if fits else None)

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr},
                {"params": list(self.adapters.parameters()), "lr": self.config.lr}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        return self.maps or AdapterProcessor(self.adapters)

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        c, terms = self.config, {}
        if self.maps is not None:
            positions = [words.get(self.task.name, ()) for words in seen.context.words]
            value = attention_regulariser(self.maps.take(), positions, seen.batch.masks)
            if value is not None:
                terms["attention"] = c.attention_weight * value
        if not self.old_up:
            return terms
        if c.orthogonality != "off":
            terms["specific"] = c.gamma1 * self.specific()
        if c.shared != "off":
            terms["shared"] = c.gamma2 * self.shared()
        return terms

    def specific(self) -> Tensor:
        """R1 over all sites and projections; 0 for the first task."""
        total = torch.zeros((), device=self.task.backbone.device)
        for key, old_up in self.old_up.items():
            up = self.adapters.up[adapter_key(*key)]
            total = total + (losses.orthogonality_rr if self.config.orthogonality == "rr" else losses.orthogonality_aa)(old_up, up)
        return total

    def shared(self) -> Tensor:
        """The part of R2 that reaches this task's deltas, W* and H held fixed."""
        total = torch.zeros((), device=self.task.backbone.device)
        for key in self.old_up:
            up, down = self._factors(key)
            if key in self.basis:
                basis = self.basis[key]
                projected = losses.project_onto(up.detach(), down.detach(), basis)
                total = total + losses.residual(up, down, projected, basis)
            else:
                total = total + self.dense[key].loss(up @ down)
        return total

    def _factors(self, key) -> tuple[Tensor, Tensor]:
        name = adapter_key(*key)
        return self.adapters.up[name] * self.config.scale, self.adapters.down[name]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if not self.tokens_stopped and self.norm_limit > 0 and self.words.mean_norm() >= self.norm_limit:
            self.tokens_stopped = True
            self.words.requires_grad_(False)
            for vector in self.words.vectors.values():
                vector.grad = None      # the optimiser skips parameters without a gradient
        for key in self.basis:
            own = losses.Gram.of([LowRankDelta(*self._factors(key))])
            self.basis[key] = losses.als_sweep((self.grams[key], own), self.basis[key])
        for key, dense in self.dense.items():
            up, down = self._factors(key)
            dense.step(up @ down, self.config.lr)

    def finish(self) -> Outcome:
        dtype = stored_dtype(self.config.stored)
        return Outcome(self.words.stored(dtype), self.adapters.stored(dtype), self._shared_state())

    @torch.no_grad()
    def _shared_state(self) -> dict[str, Tensor]:
        state = {adapter_key(*key): basis.cpu().clone() for key, basis in self.basis.items()}
        state |= {adapter_key(*key): dense.common.cpu().clone() for key, dense in self.dense.items()}
        if not self.old_up:      # after the first task W* is that task's own
            for key in self.adapters.keys:
                up, down = self._factors(key)
                if self.config.shared == "als":
                    rows = losses.weighted_rows(LowRankDelta(up, down))
                    state[adapter_key(*key)] = losses.initial_basis(rows.cpu(), self.config.shared_rank)
                elif self.config.shared == "gradient":
                    state[adapter_key(*key)] = (up @ down).cpu()
        return state

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters, "shared": _SharedState(self)})


class _SharedState(nn.Module):
    """Lets a checkpoint carry W* and H, which are not parameters."""

    def __init__(self, method: CIDM) -> None:
        super().__init__()
        self.method = [method]

    def get_extra_state(self) -> dict:
        method = self.method[0]
        return {"stopped": method.tokens_stopped, "basis": {adapter_key(*k): v for k, v in method.basis.items()},
                "common": {adapter_key(*k): v.common for k, v in method.dense.items()},
                "projections": {adapter_key(*k): v.projections for k, v in method.dense.items()}}

    def set_extra_state(self, state: dict) -> None:
        method = self.method[0]
        method.tokens_stopped = bool(state["stopped"])
        if method.tokens_stopped:
            method.words.requires_grad_(False)
        method.basis = {key: state["basis"][adapter_key(*key)].to(basis) for key, basis in method.basis.items()}
        for key, dense in method.dense.items():
            dense.common = state["common"][adapter_key(*key)].to(dense.old)
            dense.projections = state["projections"][adapter_key(*key)].to(dense.old)


register("cidm", CIDMConfig, CIDM,
         "layer-wise tokens and routed low-rank deltas with consolidation losses; nothing learned is ever overwritten")
