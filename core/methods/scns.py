"""A reading of SCNS, submodular concept neuron selection (ICML 2026), on top of CNS.

Of the paper only its abstract and a note were available: neurons of cross-attention are selected under constraints by a submodular
function, with facility-location coverage (no redundant neurons), a Fisher-weighted risk for old concepts, and cost-aware greedy; 0.41 %
of the parameters per concept on average; nothing is fused. No formula, number or code. Ours, made to be built and compared:

- Units are rows of W_k and W_v. Signature g_j of row j, over the steps before the choice (words alone train, as in CNS): by how much each
  step's loss would move if the row went away, `sum_i W_ji dL_t/dW_ji` to first order, from gradients that those steps compute anyway.
- `F(S) = sum_i max_{j in S} s_ij / C - risk sum_{j in S} R_j / R`: s_ij = <g_i, g_j>+ / sqrt(|g_i| |g_j|) for rows of one weight, else 0;
  C the coverage of all rows; R_j the running Fisher of old concepts over row j, R its sum. Both parts are shares: one `risk` for any base.
- Lazy greedy on `(F(S + j) - F(S)) / cost_j`, cost_j the row's entries, over all weights at once, until the budget is spent (`share` of
  W_k and W_v) or nothing gains. So important weights get more rows, which in CNS have the same share each. The similarities of all
  weights are held for that moment: 0.1 GB for SD1.5, 0.8 GB for SDXL, in main memory.
- A concept's Fisher: mean squared gradient per row over those same steps, normalised to mean 1, added to `decay` times the old one.
- CNS's ties and general neurons are there to be switched on; the abstract tells of neither.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.deltas import DeltaKey
from ..model.sites import SiteLayout
from ..neurons.neurons import NeuronSelection
from ..neurons.scores import key_value_weights, weight_of
from .base import Outcome, Task, adapter_key, register, require
from .cns import CNS, CNSConfig, _Choice
from .sparse import SparseAdapters

_FISHER = "fisher."


@dataclass(frozen=True)
class SCNSConfig(CNSConfig):
    """As CNS's, with share: 18.4 % of W_k and W_v is 0.41 % of SD1.5's UNet (the paper's figure); risk: weight of what old concepts need;
    decay: of the running Fisher per task, 1 = old tasks never fade; calibration and ties off."""

    share: float = 0.184
    unit: str = "row"
    calibration: int = 0
    tie_previous: float = 0.0
    tie_base: float = 0.0
    risk: float = 1.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.unit == "row", "unit", self.unit, "row")
        require(self.score == "gradient", "score", self.score, "gradient")
        require(self.risk >= 0, "risk", self.risk, "0 or more")
        require(0 <= self.decay <= 1, "decay", self.decay, "0 to 1")


def similarities(signatures: Tensor) -> Tensor:
    """s_ij `[a, a]` of the rows of one weight from their signatures `[a, T]`: 0 or more, in the unit of the signatures, s_ii = |g_i|."""
    roots = signatures.norm(dim=1).clamp(min=1e-30).sqrt()
    scaled = signatures / roots.unsqueeze(1)
    return (scaled @ scaled.T).clamp(min=0)


def lazy_greedy(blocks: Sequence[Tensor], risks: Sequence[Tensor], costs: Sequence[int], budget: int,
                allowed: Sequence[Tensor] | None = None) -> list[list[int]]:
    """Greedy maximisation of `sum over blocks of sum_i max_{j in S} s_ij - sum_{j in S} r_j` by gain per cost.

    blocks: similarities `[a, a]` 0 or more, symmetric; risks `[a]` 0 or more; costs: of each row of a block; budget: of all that is
    selected; allowed `[a]` bool: candidates. Returns the selected rows of every block in the order they were taken. Gains only fall as S
    grows (submodularity), so a gain that was computed before is a bound: most rows are looked at once.
    """
    best, taken = [torch.zeros(len(block)) for block in blocks], [[] for _ in blocks]
    heap = []
    for n, block in enumerate(blocks):
        gains = (block.sum(0) - risks[n]) / costs[n]
        if allowed is not None:
            gains[~allowed[n]] = 0.0
        heap += [(-gain, n, j, 0) for j, gain in enumerate(gains.tolist()) if gain > 0]
    heapq.heapify(heap)
    while heap and budget > 0:
        _, n, j, seen = heapq.heappop(heap)
        if costs[n] > budget:
            continue
        if seen < len(taken[n]):      # computed for a smaller S: again, and back into the line
            gain = float(((blocks[n][j] - best[n]).clamp(min=0).sum() - risks[n][j]) / costs[n])
            if gain > 0:
                heapq.heappush(heap, (-gain, n, j, len(taken[n])))
            continue
        torch.maximum(best[n], blocks[n][j], out=best[n])
        taken[n].append(j)
        budget -= costs[n]
    return taken


class PooledAdapters(SparseAdapters):
    """As many trainable values as the budget allows, for whichever weights the choice turns to: how many each gets is known only then."""

    def __init__(self, layout: SiteLayout, keys: Sequence[DeltaKey], budget: int, device) -> None:
        super().__init__(layout, {}, device)
        self.all_sizes = {key: layout.sites[key[0]].shape(key[1]) for key in keys}
        self.pool = nn.Parameter(torch.zeros(budget, device=device))
        self.register_buffer("pool_places", torch.zeros(budget, dtype=torch.int32, device=device))
        self._divide({})

    def _divide(self, counts: Mapping[DeltaKey, int]) -> None:
        """Which slice of the pool is whose."""
        self.sizes, self.slices, start = {}, {}, 0
        for key, count in counts.items():
            self.sizes[key], self.slices[key] = self.all_sizes[key], slice(start, start + count)
            start += count

    def place(self, selection: NeuronSelection) -> None:
        self._divide({key: found.numel() for key, found in selection.indices.items() if found.numel()})
        for key, where in self.slices.items():
            self.pool_places[where] = selection.indices[key].to(self.pool_places)

    def at(self, key: DeltaKey) -> tuple[Tensor, Tensor]:
        return self.pool[self.slices[key]], self.pool_places[self.slices[key]]

    def get_extra_state(self) -> dict:
        return {adapter_key(*key): where.stop - where.start for key, where in self.slices.items()}

    def set_extra_state(self, state: dict) -> None:
        self._divide({key: int(state[adapter_key(*key)]) for key in self.all_sizes if adapter_key(*key) in state})


class SCNS(CNS):
    config: SCNSConfig

    def begin(self, task: Task) -> None:
        self.weights: dict[DeltaKey, Tensor] = {}      # read once, needed until the choice
        self.signatures: dict[DeltaKey, list[Tensor]] = {}      # weight -> one `[a]` per step
        self.squares: dict[DeltaKey, Tensor] = {}      # weight -> `[a]`, this concept's Fisher so far
        state = task.bank.shared.get(self.name, {})
        self.fisher = {key: state[_FISHER + adapter_key(*key)].to(task.backbone.device) for key in key_value_weights(task.backbone.layout)
                       if _FISHER + adapter_key(*key) in state}
        super().begin(task)

    def _make_adapters(self, counts: Mapping[DeltaKey, int]) -> PooledAdapters:
        return PooledAdapters(self.task.backbone.layout, list(counts), sum(counts.values()), self.task.backbone.device)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        super().after_step(step)
        for key, gradient in self.gradients.sums.items():
            if key not in self.weights:
                self.weights[key] = weight_of(self.task.backbone, key)
            self.signatures.setdefault(key, []).append((self.weights[key] * gradient).sum(1))
            squares = gradient.square().sum(1)
            self.squares[key] = self.squares[key] + squares if key in self.squares else squares
        self.gradients.sums = {}      # a step's own; a step that is broken off leaves nothing behind

    @torch.no_grad()
    def _select(self, size: tuple[int, int]) -> NeuronSelection:
        self._find_general(size)
        keys, sizes = list(self.signatures), {key: self.adapters.all_sizes[key] for key in self.signatures}
        blocks = [similarities(torch.stack(self.signatures[key], dim=1)).cpu() for key in keys]
        whole = max(1e-30, sum(float(block.max(1).values.sum()) for block in blocks))
        blocks = [block.div_(whole) for block in blocks]
        total = max(1e-30, sum(float(f.sum()) for f in self.fisher.values()))
        risks = [(self.config.risk / total * self.fisher[key]).cpu() if key in self.fisher else torch.zeros(sizes[key][0]) for key in keys]
        allowed = None if self.general is None else [~self.general.mask(key).any(1) for key in keys]
        found = lazy_greedy(blocks, risks, [sizes[key][1] for key in keys], self.adapters.pool.numel(), allowed)
        rows = {key: torch.tensor(sorted(taken), dtype=torch.long) for key, taken in zip(keys, found, strict=True)}
        return NeuronSelection.of_rows(rows, self.task.backbone.layout)

    def _choose(self, selection: NeuronSelection) -> None:
        super()._choose(selection)
        self.weights, self.signatures = {}, {}

    @torch.no_grad()
    def running_fisher(self) -> dict[DeltaKey, Tensor]:
        """`decay F + F_t` per row, F_t of mean 1; F where this task has seen no gradient. weight -> `[a]`."""
        total = sum(float(squares.sum()) for squares in self.squares.values())
        if total == 0 or not math.isfinite(total):
            return self.fisher
        rows = sum(len(squares) for squares in self.squares.values())
        running = {key: self.config.decay * f for key, f in self.fisher.items()}
        for key, squares in self.squares.items():
            running[key] = squares * (rows / total) + running.get(key, 0)
        return running

    def finish(self) -> Outcome:
        outcome = super().finish()
        fisher = {_FISHER + adapter_key(*key): f.cpu().clone() for key, f in self.running_fisher().items()}
        return Outcome(outcome.tokens, outcome.deltas, {**outcome.shared, **fisher})

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters, "choice": _Gathered(self)})      # it reads places: last


class _Gathered(_Choice):
    """Lets a checkpoint carry signatures and Fisher too."""

    def get_extra_state(self) -> dict:
        m = self.method[0]
        return super().get_extra_state() | {
            "sums": {}, "signatures": {adapter_key(*key): torch.stack(found) for key, found in m.signatures.items()},
            "squares": {adapter_key(*key): squares for key, squares in m.squares.items()}}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        m, device = self.method[0], self.method[0].task.backbone.device

        def read(found: Mapping[str, Tensor]) -> dict[DeltaKey, Tensor]:      # copies, and in the order of the uninterrupted run
            where = {adapter_key(*key): key for key in key_value_weights(m.task.backbone.layout)}
            return {where[name]: tensor.to(device, copy=True) for name, tensor in found.items()}

        m.signatures = {key: list(found.unbind()) for key, found in read(state["signatures"]).items()}
        m.squares = read(state["squares"])


register("scns", SCNSConfig, SCNS, "rows of the keys and values, chosen to cover a concept and to spare what old ones need; our reading")
