"""Key/value slots bound to a concept's words. Ours, and the default.

An object has slots at every site (model.slots has the formula): the attention that the picture pays to the
concept's words is divided among learned keys, and their learned values are added. So an object acts only
where the picture attends to its words, and takes no attention from other words. Two concepts in one prompt
share no weights. No penalty, shared state or order of tasks is needed. A step costs the same for any bank.

The words of an object are its class noun, repeated. They are not trained, so learning needs no gradient of a
text encoder. Several words collect more attention than one.

Why slots: a word that is encoded apart has an almost constant text state. The low-rank deltas of such a word,
as in `bound`, come down to one direction of attention and one output vector per word, head and site. Slots
give each site several output vectors, chosen by the cell.

A style acts on the whole picture, which no word of it owns. It is learned as prompt-activated low-rank
deltas, as in `lora`.

Related work: Custom Diffusion, Perfusion and TARA change keys and values of a concept's words. IP-Adapter
adds keys and values of its own, computed from a picture, in a softmax of their own. We know of no other
method that divides the attention of words among learned keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.token_lora import TokenLoraProcessor
from ..bank.composition import PROMPT, WORDS, Composition
from ..bank.concepts import Concept
from ..conditioning.learned_words import LearnedWords
from ..errors import ConceptError
from ..model.deltas import DeltaKey, Deltas
from ..model.processor import AttentionProcessor
from ..model.sites import SiteLayout
from ..model.slots import SLOTS, SlotDelta
from ..model.storage import load_stored, wide_enough
from ..settings import between, setting
from .base import Task, register
from .low_rank import LowRankConfig, LowRankMethod

# Slots are as large as keys and values, about 1; entries of low-rank factors are 1/sqrt(width) and smaller.
SLOT_RATE = 30.0      # on the learning rate, measured on the embedded base


@dataclass(frozen=True)
class SlotsConfig(LowRankConfig):
    """slots: of objects, which learn at SLOT_RATE times `lr`. learn_words: whether an object's words are
    trained too, with token_lr. rank, scale: of styles; layerwise: of styles and of learned words."""

    slots: int = setting(8, "Slots of an object at every site. More slots hold more detail and make the "
                            "concept larger.", 1, 64)
    learn_words: bool = setting(False, "Also train the words of an object.")

    rank: int = setting(4, "Rank of the deltas of a style. A higher rank holds more detail and makes the "
                           "concept larger.", 1, 128)

    limits = {"slots": between(1, 64)}


class SlotAdapters(nn.Module):
    """Trainable slots of every site. Keys start as normal random numbers, values as zero."""

    def __init__(self, layout: SiteLayout, slots: int, generator: torch.Generator,
                 device: torch.device | str) -> None:
        super().__init__()
        self.heads = [site.heads for site in layout.sites]
        shapes = [(slots, site.width) for site in layout.sites]
        self.key = nn.ParameterList(torch.randn(shape, generator=generator).to(device) for shape in shapes)
        self.value = nn.ParameterList(torch.zeros(shape, device=device) for shape in shapes)

    def deltas(self) -> dict[DeltaKey, SlotDelta]:
        """The slots by site, with gradient."""
        sites = enumerate(zip(self.key, self.value, self.heads, strict=True))
        return {(index, SLOTS): SlotDelta(key, value, heads) for index, (key, value, heads) in sites}

    def load(self, deltas: Deltas) -> None:
        """Sets the slots to stored ones. Raises ConceptError if they do not fit."""
        for index, (key, value) in enumerate(zip(self.key, self.value, strict=True)):
            delta = deltas.get((index, SLOTS))
            if not isinstance(delta, SlotDelta) or delta.scale != 1.0:
                raise ConceptError(f"the concept cannot be learned further, because its deltas at site "
                                   f"{index} are not slots of scale 1")
            load_stored(key, delta.key, f"the slots of site {index}")
            load_stored(value, delta.value, f"the slots of site {index}")

    def stored(self, dtype: torch.dtype) -> Deltas:
        """Detached copies on the CPU in the bank's type."""
        dtype = wide_enough(dtype, self.parameters())
        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).cpu().clone()

        return {place: SlotDelta(copied(delta.key), copied(delta.value), delta.heads)
                for place, delta in self.deltas().items()}


@register("slots", SlotsConfig, "objects as learned keys and values that share the attention of the "
          "concept's words, styles as prompt-activated low-rank deltas")
class Slots(LowRankMethod):
    composition = WORDS
    word_count = 4
    needs_words = False
    refinable = True
    config: SlotsConfig
    words: LearnedWords
    slots: SlotAdapters | None = None

    @classmethod
    def words_of_kind(cls, kind: str) -> int:
        return 2 if kind == "style" else cls.word_count

    @property
    def _learns_words(self) -> bool:
        """Without a class noun there is nothing else that the words could be."""
        return self.config.learn_words or not self.task.class_noun.strip()

    def composition_of_kind(self, kind: str) -> Composition:
        return PROMPT if kind == "style" else self.composition

    def begin(self, task: Task) -> None:
        if task.kind == "style":
            super().begin(task)
            return
        c, self.task = self.config, task
        self.words = LearnedWords(task.backbone, task.name, task.word_names, task.class_noun,
                                  c.layerwise and self._learns_words, c.first_std, task.generator)
        self.words.fix_to_noun(task.backbone, task.class_noun)
        self.words.requires_grad_(self._learns_words)
        self.slots = SlotAdapters(task.backbone.layout, c.slots, task.generator, task.backbone.device)

    def start_from(self, concept: Concept) -> None:
        if self.slots is None:
            super().start_from(concept)
            return
        self.words.load(concept.tokens)
        self.slots.load(concept.deltas)

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.slots is None:
            return super().parameter_groups()
        c = self.config
        slots = {"params": list(self.slots.parameters()), "lr": SLOT_RATE * c.lr, "weight_decay": 0.0}
        words = {"params": list(self.words.parameters()), "lr": c.token_lr}
        return [words, slots] if self._learns_words else [slots]

    def processor(self) -> AttentionProcessor:
        if self.slots is None:
            return super().processor()
        return TokenLoraProcessor({self.task.name: self.slots.deltas()})

    def recorded(self, dtype: torch.dtype) -> Deltas:
        return super().recorded(dtype) if self.slots is None else self.slots.stored(dtype)

    def parts(self) -> dict[str, nn.Module]:
        return super().parts() if self.slots is None else {"words": self.words, "slots": self.slots}
