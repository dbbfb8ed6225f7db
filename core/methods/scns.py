"""A reading of SCNS, submodular concept neuron selection (ICML 2026), on top of CNS.

Only the paper's abstract and a note were available. Neurons of cross-attention are selected under constraints
by a submodular function: facility-location coverage (no redundant neurons), a Fisher-weighted risk for old
concepts, and cost-aware greedy. 0.41 % of the parameters per concept on average; nothing is fused. There was
no formula, number or code. Ours, made to be built and compared:

- Units are rows of W_k and W_v. Signature g_j of row j, over the steps before the selection (words alone
  train, as in CNS): by how much each step's loss would move without the row, `sum_i W_ji dL_t/dW_ji` to first
  order, from gradients that those steps compute anyway.
- `F(S) = sum_i max_{j in S} s_ij / C - risk sum_{j in S} R_j / R`. s_ij = <g_i, g_j>+ / sqrt(|g_i| |g_j|) for
  rows of one weight, else 0. C is the coverage of all rows. R_j is the running Fisher of old concepts over
  row j, R its sum. Both parts are shares, so that one `risk` fits any base.
- Lazy greedy on `(F(S + j) - F(S)) / cost_j`, cost_j the row's entries, over all weights at once, until the
  budget is spent (`share` of W_k and W_v) or nothing gains. Important weights thus get more rows; in CNS each
  weight has the same share. The similarities of all weights are in main memory for that moment: 0.1 GB for
  SD1.5, 0.8 GB for SDXL.
- A concept's Fisher is the mean squared gradient per row over those same steps, see fisher.py.
- CNS's ties and general neurons can be switched on; the abstract mentions neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.adapters import adapter_key, by_key, by_name
from ..model.deltas import DeltaKey
from ..neurons.neurons import NeuronSelection
from ..neurons.scores import weight_of
from ..neurons.submodular import lazy_greedy, similarities
from ..settings import between, one_of
from .base import SHARE, Task, register
from .cns import CNS, CNSConfig
from .fisher import running_fisher, stored_fisher


@dataclass(frozen=True)
class SCNSConfig(CNSConfig):
    """CNS's settings, with calibration and ties off. share: 18.4 % of W_k and W_v is 0.41 % of SD1.5's UNet
    (the paper's figure); risk: weight of what old concepts need; decay: of the running Fisher per task, 1 =
    old tasks never fade."""

    share: float = 0.184
    unit: str = "row"
    calibration: int = 0
    tie_previous: float = 0.0
    tie_base: float = 0.0
    risk: float = 1.0
    decay: float = 1.0

    limits = {**CNSConfig.limits, "unit": one_of(("row",)), "score": one_of(("gradient",)),
              "share": SHARE, "decay": between(0, 1)}


@register("scns", SCNSConfig, "rows of the keys and values, chosen to cover a concept and to spare rows that "
          "old ones need; our reading of an abstract")
class SCNS(CNS):
    """weights: read once and needed until the selection; signatures: weight -> one `[a]` per step; squares:
    weight -> this concept's Fisher so far `[a]`; fisher: that of old concepts, by name of the weight."""

    config: SCNSConfig

    def begin(self, task: Task) -> None:
        self.weights: dict[DeltaKey, Tensor] = {}
        self.signatures: dict[DeltaKey, list[Tensor]] = {}
        self.squares: dict[DeltaKey, Tensor] = {}
        self.fisher = stored_fisher(task.bank.shared.get(self.name, {}), task.backbone.device)
        super().begin(task)

    @torch.no_grad()
    def end_step(self) -> None:
        """Signatures and squares take the place of sums."""
        for key, gradient in self.gradients.sums.items():
            if key not in self.weights:
                self.weights[key] = weight_of(self.task.backbone, key)
            self.signatures.setdefault(key, []).append((self.weights[key] * gradient).sum(1))
            self.squares[key] = gradient.square().sum(1) + self.squares.get(key, 0)
        self.gradients.sums = {}

    @torch.no_grad()
    def select(self) -> NeuronSelection:
        """Maximises F over the rows of all weights."""
        keys, sizes = list(self.signatures), [self.adapters.all_sizes[key] for key in self.signatures]
        blocks = [similarities(torch.stack(self.signatures[key], dim=1)).cpu() for key in keys]
        coverage = max(1e-30, sum(float(block.max(1).values.sum()) for block in blocks))
        blocks = [block.div_(coverage) for block in blocks]
        factor = self.config.risk / max(1e-30, sum(float(f.sum()) for f in self.fisher.values()))
        risks = [(factor * self.fisher.get(adapter_key(*key), torch.zeros(a))).cpu()
                 for key, (a, _) in zip(keys, sizes, strict=True)]
        allowed = None if self.general is None else [~self.general.mask(key).any(1) for key in keys]
        taken = lazy_greedy(blocks, risks, [b for _, b in sizes], self.adapters.pool.numel(), allowed)
        rows = {key: torch.tensor(sorted(chosen), dtype=torch.long)
                for key, chosen in zip(keys, taken, strict=True)}
        return NeuronSelection.of_rows(rows, self.task.backbone.layout)

    def _choose(self, selection: NeuronSelection) -> None:
        super()._choose(selection)
        self.weights, self.signatures = {}, {}

    def shared_state(self) -> dict[str, Tensor]:
        return {**super().shared_state(),
                **running_fisher(self.fisher, by_name(self.squares), self.config.decay)}

    def extra_state(self) -> dict[str, Any]:
        signatures = {key: torch.stack(steps) for key, steps in self.signatures.items()}
        return {**super().extra_state(), "signatures": by_name(signatures),
                "squares": by_name(self.squares)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        device = self.task.backbone.device
        signatures = by_key(state["signatures"], device)
        self.signatures = {key: list(steps.unbind()) for key, steps in signatures.items()}
        self.squares = by_key(state["squares"], device)
