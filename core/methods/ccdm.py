"""A reading of CCDM, "Crafting Your Evolving Dreams" (arXiv 2606.04797, by the group of CIDM).

Of the paper only the abstract was available: AD-LoRA, low-rank deltas whose attributes are decoupled, keeps what is specific to each
task; a relevance-guided aggregation of them makes use of what tasks have in common; pictures of several regions have smooth borders.
No formula, number or code. Everything below is ours, made to be built and compared, and is not the paper's:

- `dW_i = A_s B_s + A_i B_i`: A_s B_s is shared, learned with the first task and moved slowly (`slow` times the rate) by the later ones;
  A_i B_i is the task's own. A concept's record holds its own A_i B_i and the A_s B_s of its time, so that nothing old ever changes.
- From the second task on `gamma_shared sum |A_i^T A_s| + gamma_specific sum_{j<i} |A_i^T A_j|`, r×r products as in CIDM's R1; A_s is
  held fixed in them: what is shared moves by the denoising loss alone.
- Concepts are routed by prompt, as in CIDM, with the same modes of aggregation. A prompt that names two concepts adds the shared part
  twice. The paper's aggregation by relevance (weights softmax(cos / tau) in our reading) is not built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bank.composition import PROMPT
from ..bank.tokens import TokenGroup
from ..errors import ConceptError
from ..model.backbone import AttentionProcessor
from ..model.deltas import LowRankDelta
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
from .cidm_losses import orthogonality_rr


@dataclass(frozen=True)
class CCDMConfig:
    """rank, shared_rank: of the task's own and of the shared delta; slow: what the shared one's rate is multiplied by after the first
    task; gamma_shared, gamma_specific: the penalties' weights. Rates as CIDM's, the rest ours."""

    rank: int = 4
    shared_rank: int = 4
    scale: float = 1.0
    slow: float = 0.1
    gamma_shared: float = 0.1
    gamma_specific: float = 0.1
    lr: float = 1e-4
    token_lr: float = 1e-3
    layerwise: bool = True
    first_std: float = 0.0
    stored: str = "float16"

    def __post_init__(self) -> None:
        for name in ("rank", "shared_rank"):
            require(1 <= getattr(self, name) <= 128, name, getattr(self, name), "1 to 128")
        require(0 <= self.slow <= 1, "slow", self.slow, "0 to 1")
        for name in ("gamma_shared", "gamma_specific", "lr", "token_lr", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


class _BothProgram(AttentionProcessor):
    """The shared and the task's own delta."""

    def __init__(self, shared: LowRankAdapters, own: LowRankAdapters) -> None:
        self.processors = AdapterProcessor(shared), AdapterProcessor(own)

    def project(self, site, projection, x, y):
        for processor in self.processors:
            y = processor.project(site, projection, x, y)
        return y


class CCDM(Method):
    composition = PROMPT

    def __init__(self, config: CCDMConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, layout, device = self.config, task.backbone.layout, task.backbone.device
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.own = LowRankAdapters(layout, c.rank, c.scale, task.generator, device)
        self.shared = LowRankAdapters(layout, c.shared_rank, c.scale, task.generator, device)
        state = task.bank.shared.get(self.name, {})
        self.is_first = not state
        self.old_up: dict = {}
        if not state:
            return
        for name, parameter in self.shared.named_parameters():
            if name not in state or state[name].shape != parameter.shape:
                found = state[name].shape[1 if name.startswith("up") else 0] if name in state else "none"
                raise ConceptError(f"setting 'shared_rank' is {c.shared_rank}; allowed: {found}, the rank of the bank's shared deltas")
            with torch.no_grad():
                parameter.copy_(state[name])
        mine = [task.bank.passing(name) for name, info in task.bank.infos.items() if info.method == self.name]
        for key in self.own.keys:
            old = [d for concept in mine if isinstance(d := concept.deltas.get(key), LowRankDelta)]
            if old:      # side by side: no loop over concepts in a step; as stored where that is exact
                ups = [d.up if d.scale == 1 else d.up.float() * d.scale for d in old]
                self.old_up[key] = torch.cat([up[:, c.shared_rank:] for up in ups], dim=1).to(device)

    def parameter_groups(self) -> list[dict]:
        c = self.config
        return [{"params": list(self.words.parameters()), "lr": c.token_lr},
                {"params": list(self.shared.parameters()), "lr": c.lr * (1.0 if self.is_first else c.slow)},
                {"params": list(self.own.parameters()), "lr": c.lr}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        return _BothProgram(self.shared, self.own)

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        if self.is_first:
            return {}
        terms, c = {}, self.config
        ups = {key: self.own.up[adapter_key(*key)] * c.scale for key in self.own.keys}
        if c.gamma_shared > 0:
            common = {key: self.shared.up[adapter_key(*key)].detach() * c.scale for key in ups}
            terms["shared"] = c.gamma_shared * sum(orthogonality_rr(common[key], up) for key, up in ups.items())
        if c.gamma_specific > 0 and self.old_up:
            terms["specific"] = c.gamma_specific * sum(orthogonality_rr(old, ups[key]) for key, old in self.old_up.items())
        return terms

    def finish(self) -> Outcome:
        dtype, deltas = stored_dtype(self.config.stored), {}
        own = self.own.stored(dtype)
        for key, shared in self.shared.stored(dtype).items():
            factors = torch.cat([shared.up, own[key].up], dim=1), torch.cat([shared.down, own[key].down], dim=0)
            deltas[key] = LowRankDelta(*factors, self.config.scale)
        state = {name: parameter.detach().cpu().clone() for name, parameter in self.shared.named_parameters()}
        return Outcome(self.words.stored(dtype), deltas, state)

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "own": self.own, "shared": self.shared})


register("ccdm", CCDMConfig, CCDM, "a shared low-rank delta that moves slowly and routed ones orthogonal to it; our reading of an abstract")
