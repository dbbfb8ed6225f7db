"""ToVA, token-wise value adaptation (ConceptSplit, Lim et al., ICCV 2025, arXiv 2510.04668).

From the paper: low-rank deltas of the value projections, `V' = V + delta_i^T A_i(c_i)`, where delta_i is one
at the token of the concept and zero at all others. The paper finds that changed keys disturb the attention of
the base and mix concepts.

Where we deviate: the paper adapts an existing word of the prompt. Here the concept has learned layer-wise
words, as in all low-rank methods of this project, and the deltas act at these words. The second part of the
paper, LODA, changes latents while sampling. It is not part of this method.

`lock_keys` is the key locking of Perfusion (Tewel et al., SIGGRAPH 2023, arXiv 2305.01644), as an ablation:
the keys of the concept's words are held at those of its class noun at every site, and values alone are
learned. As in Perfusion, this is a low-rank edit of to_k that maps the mean text states of the words to the
noun's key, `dK = (W_k c_noun - W_k C) C^+` with C `[D, words]`. The edit follows the words while they train,
without a gradient. Perfusion gates it by the similarity to C; here it acts at the words alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.token_lora import TokenLoraProcessor
from ..bank.concepts import Concept
from ..bank.prompts import NO_CONCEPTS
from ..conditioning.encoding import encode_concept, encode_prompts, text_positions
from ..model.backbone import Backbone
from ..model.context import Context
from ..model.deltas import DeltaKey, Deltas, LowRankDelta
from ..model.processor import AttentionProcessor
from ..model.sites import Site
from ..model.storage import stored_deltas
from ..settings import require
from .base import Task, register
from .bound import Bound, BoundConfig

PROMPTS = ("a photo of {}", "a {} on a beach", "a painting of {}", "{} in a room")      # of the mean states


@dataclass(frozen=True)
class TovaConfig(BoundConfig):
    """lock_keys: hold the words' keys at the class noun's; projections without keys only."""

    apart: bool = False
    projections: str = "v"
    lock_keys: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.lock_keys or "k" not in self.projections, "lock_keys", self.lock_keys,
                "false, or projections v or qvo")


def mean_states(context: Context, name: str, site: Site) -> Tensor:
    """The words' text states, `[words, D]`, averaged over the prompts that name the concept."""
    rows = [(row, list(words[name])) for row, words in enumerate(context.words) if words.get(name)]
    return torch.stack([context.at(site)[row, places] for row, places in rows]).mean(0).float()


class KeyLock:
    """Edits of to_k that hold a concept's keys. keys: site -> the class noun's key, `[a]`."""

    @torch.no_grad()
    def __init__(self, backbone: Backbone, class_noun: str) -> None:
        prompt = NO_CONCEPTS.parse_caption(f"a photo of {class_noun}")
        noun, at = encode_prompts(backbone, [prompt], {}), text_positions(backbone, prompt)[-1]
        self.backbone = backbone
        self.keys = {site: self._keys(site, noun.at(site)[0, at:at + 1])[0] for site in backbone.layout.sites}

    def _keys(self, site: Site, states: Tensor) -> Tensor:
        return self.backbone.project(site, "to_k", states.unsqueeze(0))[0].float()

    @torch.no_grad()
    def edits(self, context: Context, name: str) -> dict[DeltaKey, LowRankDelta]:
        """The edits for the words in encoded prompts; none if no prompt names the concept."""
        if not any(words.get(name) for words in context.words):
            return {}
        edits = {}
        for site, key in self.keys.items():
            states = mean_states(context, name, site)
            edits[site.index, "to_k"] = LowRankDelta(key.unsqueeze(1) - self._keys(site, states).T,
                                                     torch.linalg.pinv(states.T))
        return edits


class LockedKeys(TokenLoraProcessor):
    """Word-bound deltas of one concept, with its keys locked for the prompts of each pass."""

    def __init__(self, name: str, deltas: Deltas, lock: KeyLock) -> None:
        super().__init__({name: deltas})
        self.name, self.values, self.lock = name, deltas, lock

    def prepare(self, context: Context) -> None:
        self.word_bound = {self.name: {**self.values, **self.lock.edits(context, self.name)}}
        super().prepare(context)


@register("tova", TovaConfig, "layer-wise words, and low-rank deltas of the values at these words alone")
class Tova(Bound):
    config: TovaConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.lock = KeyLock(task.backbone, task.class_noun) if self.config.lock_keys else None

    def start_from(self, concept: Concept) -> None:
        """As in `Method`, but the edits of locked keys are computed from the words again."""
        if self.lock is not None:
            learned = {key: delta for key, delta in concept.deltas.items() if key[1] != "to_k"}
            concept = replace(concept, deltas=learned)
        super().start_from(concept)

    def processor(self) -> AttentionProcessor:
        if self.lock is None:
            return super().processor()
        return LockedKeys(self.task.name, self.adapters.deltas(), self.lock)

    def recorded(self, dtype: torch.dtype) -> Deltas:
        if self.lock is None:
            return super().recorded(dtype)
        context = encode_concept(self.task.backbone, self.task.name, self.words.group(), PROMPTS)
        return stored_deltas({**self.adapters.deltas(), **self.lock.edits(context, self.task.name)}, dtype)
