"""Submodular selection of rows by lazy greedy: coverage of similar rows minus the risk for old concepts.

Our interpretation of SCNS (ICML 2026), because only the abstract was available. Used by methods/scns.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


def similarities(signatures: Tensor) -> Tensor:
    """Similarities s_ij >= 0, `[a, a]`, of the rows of one weight, with s_ii = |g_i|. signatures: g `[a, T]`.
    """
    roots = signatures.norm(dim=1).clamp(min=1e-30).sqrt()
    scaled = signatures / roots.unsqueeze(1)
    return (scaled @ scaled.T).clamp(min=0)


def lazy_greedy(blocks: Sequence[Tensor], risks: Sequence[Tensor], costs: Sequence[int], budget: int,
                allowed: Sequence[Tensor] | None = None) -> list[list[int]]:
    """Maximises `sum over blocks of sum_i max_{j in S} s_ij - sum_{j in S} r_j` greedily, by gain per cost.

    Gains only decrease as S grows (submodularity), so an earlier gain is an upper bound. Most rows are
    evaluated only once.

    Args:
        blocks: Similarities `[a, a]` of each weight, non-negative and symmetric.
        risks: r `[a]` of each weight, non-negative.
        costs: Cost of one row of each weight.
        budget: Limit for the sum of costs.
        allowed: Candidates `[a]` bool of each weight; None = all rows.

    Returns:
        The selected rows of every block, in order of selection.
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
        if seen < len(taken[n]):      # outdated, from a smaller S: recompute and push again
            gain = float(((blocks[n][j] - best[n]).clamp(min=0).sum() - risks[n][j]) / costs[n])
            if gain > 0:
                heapq.heappush(heap, (-gain, n, j, len(taken[n])))
            continue
        torch.maximum(best[n], blocks[n][j], out=best[n])
        taken[n].append(j)
        budget -= costs[n]
    return taken
