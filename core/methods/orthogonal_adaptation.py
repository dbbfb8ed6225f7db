"""Orthogonal Adaptation (Po et al., CVPR 2024, arXiv 2312.02432): concepts learned apart that do not disturb each other when merged.

The paper's: `dW_i = A_i B_i^T` with B_i fixed and A_i trained from zero; B_i is r random columns of one orthogonal matrix O per input
width, the same for everybody, so that `B_i^T B_j ~ 0` and what another concept does to this one's inputs, ||dW_j X_i||, is small (Sec. 4).
Merge: `W_0 + sum_i lambda dW_i`, lambda = 0.6 for all. r = 20, two layer-wise words per concept, rates 1e-3 for words and 1e-5 for
weights. All linear layers there; here, as everywhere, q, k, v, out of the sites.

Ours: `columns="disjoint"`, the default, draws among the columns that no concept of the bank has, which makes a sequence exactly
orthogonal for width / r concepts (320 / 20 = 16 in SD1.5's narrowest sites, 768 / 20 = 38 in its text); `columns="random"` is the paper's.
When free columns run out, all free ones are taken and the rest is drawn at random among the taken ones: the newest concept is then
orthogonal to some and overlaps others, as the paper's random ones do; a warning says so. One draw per input width serves all sites of that
width. Which columns are taken is read off the stored deltas themselves, so that removing, renaming and merging banks keep it right. Draws
depend on the concept's name, so that concepts learned apart differ too. A concept alone in a bank has weight 1: it is no merge.
Unknown: the paper's orthogonal matrix; ours is the Q of a Gaussian from a fixed seed, its sign fixed by R's diagonal.
"""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bank.composition import Composition, Kind
from ..bank.tokens import TokenGroup
from ..model.backbone import AttentionProcessor
from ..model.deltas import DeltaKey, LowRankDelta
from .base import AdapterProcessor, LearnedWords, LowRankAdapters, Method, Outcome, Task, adapter_key, register, require, stored_dtype

COLUMNS = ("disjoint", "random")
MERGE_WEIGHT = 0.6      # lambda of the paper
SEED = 2312_02432       # of O; another one would make another world of concepts that do not fit these
TAKEN = 1e-2            # energy of a concept's row space along a column from which on the column counts as taken; a whole one has 1


@dataclass(frozen=True)
class OrthogonalAdaptationConfig:
    """columns: "disjoint" | "random" (the paper's), which columns of O a concept gets; rank: how many, at most the narrowest input."""

    rank: int = 20
    columns: str = "disjoint"
    lr: float = 1e-5
    token_lr: float = 1e-3
    layerwise: bool = True
    first_std: float = 0.0
    stored: str = "float16"

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 128, "rank", self.rank, "1 to 128")
        require(self.columns in COLUMNS, "columns", self.columns, ", ".join(COLUMNS))
        for name in ("lr", "token_lr", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


def orthogonal_matrix(width: int) -> Tensor:
    """O `[width, width]` float32, the same on every machine up to rounding: QR of a seeded Gaussian, diagonal of R positive."""
    gaussian = torch.randn(width, width, generator=torch.Generator().manual_seed(SEED + width), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


def taken_columns(basis: Tensor, downs: list[Tensor]) -> Tensor:
    """Which columns of O `[b, b]` the row spaces of `downs` `[r, b]` reach into: bool `[b]`."""
    taken = torch.zeros(basis.shape[1], dtype=torch.bool)
    for down in downs:
        rows = torch.linalg.qr(down.cpu().double().T).Q.T
        taken |= (rows.float() @ basis).square().sum(0) > TAKEN
    return taken


def draw_columns(taken: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """`rank` column numbers, free ones first, each kind in random order; int64 `[rank]`."""
    order = torch.randperm(len(taken), generator=generator)
    return torch.cat([order[~taken[order]], order[taken[order]]])[:rank]


class OrthogonalAdaptation(Method):
    composition = Composition(Kind.SUM, MERGE_WEIGHT)
    builds_on_sum = False

    def __init__(self, config: OrthogonalAdaptationConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, layout, device = self.config, task.backbone.layout, task.backbone.device
        narrowest = min(min(site.width, site.context_width) for site in layout.sites)
        require(c.rank <= narrowest, "rank", c.rank, f"1 to {narrowest}, this base's narrowest input")
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.adapters = LowRankAdapters(layout, c.rank, 1.0, task.generator, device)
        self.adapters.down.requires_grad_(False)
        seed = int(torch.randint(2**31, (1,), generator=task.generator)) ^ zlib.crc32(task.name.encode())
        by_width: dict[int, list[DeltaKey]] = {}
        for index, projection in self.adapters.keys:
            by_width.setdefault(layout.sites[index].shape(projection)[1], []).append((index, projection))
        for width, keys in by_width.items():
            rows = self._rows(task, width, keys, torch.Generator().manual_seed(seed + width))
            for key in keys:
                self.adapters.down[adapter_key(*key)].data.copy_(rows)

    def _rows(self, task: Task, width: int, keys: list[DeltaKey], generator: torch.Generator) -> Tensor:
        """B_i^T of this concept for one input width, `[r, width]`."""
        basis, taken = orthogonal_matrix(width), torch.zeros(width, dtype=torch.bool)
        if self.config.columns == "disjoint":
            mine = [task.bank.passing(name) for name, info in task.bank.infos.items() if info.method == self.name]
            deltas = [delta for concept in mine if isinstance(delta := concept.deltas.get(keys[0]), LowRankDelta)]
            taken = taken_columns(basis, [delta.down for delta in deltas])
            if int((~taken).sum()) < self.config.rank:
                warnings.warn(f"concept '{task.name}' finds {int((~taken).sum())} of {self.config.rank} columns of width {width} free; the "
                              "others are shared with earlier concepts, which it may disturb", stacklevel=2)
        return basis[:, draw_columns(taken, self.config.rank, generator)].T.contiguous()

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr},
                {"params": list(self.adapters.up.parameters()), "lr": self.config.lr}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        return AdapterProcessor(self.adapters)

    def finish(self) -> Outcome:
        dtype = stored_dtype(self.config.stored)
        return Outcome(self.words.stored(dtype), self.adapters.stored(dtype))

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters})


register("orthogonal_adaptation", OrthogonalAdaptationConfig, OrthogonalAdaptation,
         "each concept learned alone in its own directions of one fixed orthogonal matrix, all merged with weight 0.6")
