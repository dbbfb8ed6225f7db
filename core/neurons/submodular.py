"""Submodular selection of rows: coverage of similar rows minus the risk for old concepts, by lazy greedy.

Our reading of SCNS (ICML 2026), of which only the abstract was available; methods/scns.py says what it is
used for.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


def similarities(signatures: Tensor) -> Tensor:
    """s_ij `[a, a]` of the rows of one weight, 0 or more, with s_ii = |g_i|. signatures: g `[a, T]`."""
    roots = signatures.norm(dim=1).clamp(min=1e-30).sqrt()
    scaled = signatures / roots.unsqueeze(1)
    return (scaled @ scaled.T).clamp(min=0)


def lazy_greedy(blocks: Sequence[Tensor], risks: Sequence[Tensor], costs: Sequence[int], budget: int,
                allowed: Sequence[Tensor] | None = None) -> list[list[int]]:
    """Maximises `sum over blocks of sum_i max_{j in S} s_ij - sum_{j in S} r_j` greedily, by gain per cost.

    Gains only fall as S grows (submodularity), so a gain computed before is a bound. Most rows are evaluated
    once.

    Args:
        blocks: similarities `[a, a]` of each weight, 0 or more, symmetric.
        risks: r `[a]` of each weight, 0 or more.
        costs: of one row of each weight.
        budget: for the sum of costs.
        allowed: `[a]` bool of each weight, the candidates; None = all rows.

    Returns:
        The selected rows of every block, in the order in which they were taken.
    """
    best, taken = [torch.zeros(len(block)) for block in blocks], [list[int]() for _ in blocks]
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
        if seen < len(taken[n]):      # computed for a smaller S: compute it again and put it back
            gain = float(((blocks[n][j] - best[n]).clamp(min=0).sum() - risks[n][j]) / costs[n])
            if gain > 0:
                heapq.heappush(heap, (-gain, n, j, len(taken[n])))
            continue
        torch.maximum(best[n], blocks[n][j], out=best[n])
        taken[n].append(j)
        budget -= costs[n]
    return taken
