"""Orthogonal Adaptation (Po et al., CVPR 2024, arXiv 2312.02432): concepts learned apart that can be merged
undisturbed.

From the paper: `dW_i = A_i B_i^T` with B_i fixed and A_i trained from zero. B_i is r random columns of one
orthogonal matrix O per input width, the same for everybody, so that `B_i^T B_j ~ 0`. What another concept
does to this one's inputs, ||dW_j X_i||, is then small (Sec. 4). Merge: `W_0 + sum_i lambda dW_i`, lambda =
0.6 for all. r = 20, two layer-wise words per concept, rates 1e-3 for words and 1e-5 for weights. The paper
adapts all linear layers; here, as everywhere, q, k, v, out of the sites.

Ours: `columns="disjoint"`, the default, draws among the columns that no concept of the bank has. A sequence
is then exactly orthogonal for width / r concepts (320 / 20 = 16 in SD1.5's narrowest sites, 768 / 20 = 38 in
its text). `columns="random"` is the paper's. When free columns run out, all free ones are taken and the rest
is drawn among the taken ones. The newest concept is then orthogonal to some concepts and overlaps others, as
in the paper; a warning says so.

One draw per input width serves all sites of that width. Taken columns are found from the stored deltas, so
that removing, renaming and merging banks keep them right. Draws depend on the concept's name, so that
concepts learned apart differ too. A concept alone in a bank has weight 1, because nothing is merged. Unknown:
the paper's orthogonal matrix. Ours is the Q of a Gaussian from a fixed seed, with R's diagonal made positive.
"""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.composition import Composition, Kind
from ..model.deltas import DeltaKey
from ..settings import one_of, require
from .base import Task, low_rank_deltas, register
from .low_rank import LowRankMethod, RankConfig

COLUMNS = ("disjoint", "random")
MERGE_WEIGHT = 0.6      # lambda of the paper
SEED = 2312_02432       # of O; concepts learned with another seed would not be orthogonal to these
TAKEN = 1e-2            # share of a column's energy in a concept's row space from which on it counts as taken


@dataclass(frozen=True)
class OrthogonalAdaptationConfig(RankConfig):
    """columns: which columns of O a concept gets ("random" is the paper's); rank: how many."""

    rank: int = 20
    lr: float = 1e-5
    columns: str = "disjoint"

    limits = {"columns": one_of(COLUMNS)}


def orthogonal_matrix(width: int) -> Tensor:
    """O `[width, width]` float32, equal on every machine up to rounding."""
    gaussian = torch.randn(width, width, generator=torch.Generator().manual_seed(SEED + width),
                           dtype=torch.float64)
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
    """Draws `rank` column numbers, free ones first, each kind in random order: int64 `[rank]`."""
    order = torch.randperm(len(taken), generator=generator)
    return torch.cat([order[~taken[order]], order[taken[order]]])[:rank]


@register("orthogonal_adaptation", OrthogonalAdaptationConfig, "each concept learned alone in its own "
          "directions of one fixed orthogonal matrix, all merged with weight 0.6")
class OrthogonalAdaptation(LowRankMethod):
    composition = Composition(Kind.SUM, MERGE_WEIGHT)
    builds_on_sum = False
    config: OrthogonalAdaptationConfig

    def begin(self, task: Task) -> None:
        layout = task.backbone.layout
        narrowest = min(min(site.width, site.context_width) for site in layout.sites)
        require(self.config.rank <= narrowest, "rank", self.config.rank,
                f"1 to {narrowest}, this base's narrowest input")
        super().begin(task)
        self.adapters.down.requires_grad_(False)
        seed = task.draw_seed() ^ zlib.crc32(task.name.encode())
        rows: dict[int, Tensor] = {}      # B_i^T by input width
        for key in self.adapters.keys:
            down = self.adapters.delta(key).down.data
            width = down.shape[1]
            if width not in rows:
                rows[width] = self._rows(width, key, torch.Generator().manual_seed(seed + width))
            down.copy_(rows[width])

    def _rows(self, width: int, key: DeltaKey, generator: torch.Generator) -> Tensor:
        """B_i^T of this concept for one input width, `[r, width]`. key: any projection of that width."""
        basis, taken = orthogonal_matrix(width), torch.zeros(width, dtype=torch.bool)
        if self.config.columns == "disjoint":
            earlier = low_rank_deltas(self.task.earlier(self.name), key)
            taken = taken_columns(basis, [delta.down for delta in earlier])
            free = int((~taken).sum())
            if free < self.config.rank:
                warnings.warn(f"concept '{self.task.name}' finds {free} of {self.config.rank} columns of "
                              f"width {width} free; the others are shared with earlier concepts, which it "
                              "may disturb", stacklevel=2)
        return basis[:, draw_columns(taken, self.config.rank, generator)].T.contiguous()
