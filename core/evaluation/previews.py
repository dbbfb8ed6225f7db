"""Pictures of a concept while it is learned, and of older concepts afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ..bank.bank import ConceptBank
from ..data.training_set import TrainingData
from ..images import spread, thumbnail_of
from ..methods.base import Method, Task
from ..model.backbone import Backbone
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from ..training.config import TrainingConfig
from ..training.loop import Callback, learn
from .bankcheck import Encode
from .metrics import image_alignment

SCORED = 4      # pictures of a preview that is scored: a single one says little
OLDER = 8      # older concepts that are drawn, at most
Similarity = Callable[[Sequence[Tensor]], float]


def concept_prompt(name: str, kind: str) -> str:
    """The plainest prompt that shows a concept."""
    return f"a photo of <{name}>" if kind == "object" else f"<{name}>"


def similarity_to(photos: Sequence[Tensor], encode: Encode) -> Similarity:
    """Image alignment of pictures with photos, as a function of the pictures.

    Args:
        photos: `[3, H, W]` in -1..1 of any sizes; they are encoded once.
        encode: pictures to unit vectors `[n, D]`.
    """
    references = encode(photos)
    return lambda pictures: image_alignment(encode(list(pictures)), references)


@dataclass
class Previews:
    """Previews of one concept, all from the same seeds.

    prompt: what is drawn; similarity: scores a preview, None = previews are not scored; pictures: the first
    picture of every preview, `[3, H, W]` in -1..1 on the CPU; scores: (step, similarity) of every scored
    preview; last_step: of the last preview, 0 = none yet.
    """

    backbone: Backbone
    prompt: str
    settings: SampleSettings
    seed: int
    similarity: Similarity | None = None
    pictures: list[Tensor] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    last_step: int = 0

    def draw(self, bank: ConceptBank, step: int) -> None:
        """Draws a preview with the concept as the bank holds it, and scores it."""
        self.last_step = step
        count = 1 if self.similarity is None else SCORED
        pictures = sample(self.backbone, bank, [self.prompt] * count, range(self.seed, self.seed + count),
                          self.settings)
        self.pictures.append(pictures[0].float().cpu())
        if self.similarity is not None:
            self.scores.append((step, self.similarity(list(pictures))))

    def evaluate(self, bank: ConceptBank, step: int) -> float:
        """Draws a preview and returns its score, for early stopping."""
        self.draw(bank, step)
        return self.scores[-1][1]


def learn_with_previews(task: Task, method: Method, data: TrainingData, config: TrainingConfig,
                        previews: Previews,
                        callback: Callback, checkpoint_file: Path, last: bool = True) -> tuple[ConceptBank,
                                                                                               tuple[float,
                                                                                                     ...]]:
    """Learns a concept, with the similarity of its previews deciding when to stop if `config.patience` is
    set.

    Args:
        previews: drawn by the callback, and here for early stopping and at the end.
        last: draw a preview at the end; it becomes the concept's thumbnail.

    Returns:
        The bank with the concept, and the loss of every step.
    """
    evaluator = previews.evaluate if config.patience else None
    learned = learn(task, method, data, config, callback, checkpoint_file, evaluator=evaluator)
    if not last:
        return learned.bank, learned.losses
    if previews.last_step != len(learned.losses):      # else it is the one that ended learning
        previews.draw(learned.bank, len(learned.losses))
    concept = replace(learned.concept, thumbnail=thumbnail_of(previews.pictures[-1]))
    return task.bank.add(concept, learned.bank.shared), learned.losses


def older_concepts(backbone: Backbone, bank: ConceptBank, names: Sequence[str], settings: SampleSettings,
                   seed: int,
                   before_each: Callable[[], None] = lambda: None) -> list[tuple[str, bytes]]:
    """Some older concepts as the bank draws them now, each after its thumbnail from when it was learned.

    Args:
        names: of the older concepts; at most `OLDER` of them are drawn, evenly spread.
        before_each: called before each picture; it may raise to cancel.

    Returns:
        Captions with JPEG pictures; the bytes are empty for a concept without a thumbnail.
    """
    rows = []
    for name in spread(names, OLDER):
        before_each()
        picture = sample(backbone, bank, [concept_prompt(name, bank.infos[name].kind)], [seed], settings)[0]
        rows += [(f"<{name}> when learned", bank[name].thumbnail), (f"<{name}> now", thumbnail_of(picture))]
    return rows
