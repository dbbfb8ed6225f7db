"""A reading of CCDM, "Crafting Your Evolving Dreams" (arXiv 2606.04797, by the group of CIDM).

The paper's abstract was read, not its full text (arxiv.org/html/2606.04797). AD-LoRA, low-rank deltas with
decoupled attributes, keeps what is specific to each task. A relevance-guided aggregation uses what tasks have
in common. Pictures of several regions have smooth borders. Everything below is ours, made to be built and
compared, and is not the paper's: formulas, numbers and what is shared.

- `dW_i = A_s B_s + A_i B_i`. A_s B_s is shared, learned with the first task and moved slowly (`slow` times
  the rate) by later ones; A_i B_i is the task's own. A concept's record holds its own A_i B_i and the A_s B_s
  of its time, so that nothing old ever changes.
- From the second task on, `gamma_shared sum |A_i^T A_s| + gamma_specific sum_{j<i} |A_i^T A_j|`, r×r products
  as in CIDM's R1. A_s is held fixed in them: the denoising loss alone moves what is shared.
- Concepts are prompt-activated, as in CIDM, with the same modes of aggregation. A prompt that names two
  concepts adds the shared part twice. Aggregation by relevance is that of CIDM, the modes `paper` and
  `released`; how CCDM's differs is not known to us.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.adapters import AdapterProcessor, LowRankAdapters, adapter_key
from ..model.deltas import DeltaKey, Deltas
from ..model.processor import AttentionProcessor
from ..settings import between, require
from .base import RANK, Forward, Task, low_rank_deltas, register, total
from .cidm_losses import orthogonality_rr, stored_up
from .low_rank import LowRankConfig, LowRankMethod


@dataclass(frozen=True)
class CCDMConfig(LowRankConfig):
    """rank, shared_rank: of the task's own and of the shared delta; slow: factor on the shared one's rate
    after the first task; gamma_shared, gamma_specific: weights of the penalties. Rates are CIDM's."""

    shared_rank: int = 4
    slow: float = 0.1
    gamma_shared: float = 0.1
    gamma_specific: float = 0.1

    limits = {"shared_rank": RANK, "slow": between(0, 1)}


@register("ccdm", CCDMConfig, "a shared low-rank delta that changes slowly, and prompt-activated deltas "
          "orthogonal to it; our reading of an abstract")
class CCDM(LowRankMethod):
    """adapters: the task's own deltas; shared: the shared ones."""

    config: CCDMConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        c, device = self.config, task.backbone.device
        self.shared = LowRankAdapters(task.backbone.layout, c.shared_rank, c.scale, task.generator, device)
        state = task.bank.shared.get(self.name, {})
        self.is_first = not state
        self.old_up: dict[DeltaKey, Tensor] = {}
        if self.is_first:
            return
        rank = state[f"up.{adapter_key(*self.shared.keys[0])}"].shape[1]
        require(rank == c.shared_rank, "shared_rank", c.shared_rank,
                f"{rank}, the rank of the bank's shared deltas")
        self.shared.load_state_dict(state)
        earlier = task.earlier(self.name)
        for key in self.adapters.keys:
            ups = [stored_up(delta)[:, c.shared_rank:] for delta in low_rank_deltas(earlier, key)]
            if ups:      # side by side, so that a step has no loop over concepts
                self.old_up[key] = torch.cat(ups, dim=1).to(device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        words, own = super().parameter_groups()
        rate = self.config.lr * (1.0 if self.is_first else self.config.slow)
        return [words, {"params": list(self.shared.parameters()), "lr": rate}, own]

    def processor(self) -> AttentionProcessor:
        return AdapterProcessor(self.shared, self.adapters)

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """Overlap of A_i with A_s and with the old A_j, from the second task on."""
        if self.is_first:
            return {}
        c, terms = self.config, {}
        ups = {key: self.adapters.scaled(key)[0] for key in self.adapters.keys}
        if c.gamma_shared > 0:
            terms["shared"] = c.gamma_shared * total(
                orthogonality_rr(self.shared.scaled(key)[0].detach(), up) for key, up in ups.items())
        if c.gamma_specific > 0 and self.old_up:
            terms["specific"] = c.gamma_specific * total(
                orthogonality_rr(old, ups[key]) for key, old in self.old_up.items())
        return terms

    def recorded(self, dtype: torch.dtype) -> Deltas:
        shared, own = self.shared.stored(dtype), self.adapters.stored(dtype)
        return {key: shared[key].beside(own[key]) for key in own}

    def shared_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.shared.named_parameters()}

    def parts(self) -> dict[str, nn.Module]:
        return {"words": self.words, "own": self.adapters, "shared": self.shared}
