"""Samples previews of a concept during training, and of older concepts afterwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
from ..training.record import Learned
from .bankcheck import Encode
from .metrics import image_alignment, standard_error

SCORED = 4      # pictures per scored preview, because a single one is too noisy
OLDER = 8      # maximum number of older concepts to draw
Similarity = Callable[[Sequence[Tensor]], float]


def concept_prompt(name: str, kind: str) -> str:
    """A simple prompt for a concept."""
    return f"a photo of <{name}>" if kind == "object" else f"<{name}>"


class PhotoSimilarity:
    """Computes the image alignment of pictures with photos.

    Args:
        photos: `[3, H, W]` in -1..1 of any sizes; they are encoded once.
        encode: Encodes pictures to unit vectors `[n, D]`.

    Attributes:
        spread: Standard error of the last alignment over its pictures.
    """

    def __init__(self, photos: Sequence[Tensor], encode: Encode) -> None:
        self.encode, self.references, self.spread = encode, encode(photos), 0.0

    def __call__(self, pictures: Sequence[Tensor]) -> float:
        features = self.encode(list(pictures))
        self.spread = standard_error((features @ self.references.T).mean(1))
        return image_alignment(features, self.references)


similarity_to = PhotoSimilarity


@dataclass
class Previews:
    """Previews of one concept, all from the same seeds.

    prompt: prompt of the previews; similarity: scores a preview, None = no scores; pictures: the first
    picture of every preview, `[3, H, W]` in -1..1 on the CPU; scores: (step, similarity) of every scored
    preview; spreads: step -> standard error of its score; last_step: step of the last preview, 0 = none yet;
    samples: pictures of a scored preview.
    """

    backbone: Backbone
    prompt: str
    settings: SampleSettings
    seed: int
    similarity: Similarity | None = None
    pictures: list[Tensor] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    last_step: int = 0
    samples: int = SCORED
    spreads: dict[int, float] = field(default_factory=dict)

    def draw(self, bank: ConceptBank, step: int) -> None:
        """Samples a preview of the bank's concept and scores it."""
        self.last_step = step
        count = 1 if self.similarity is None else self.samples
        pictures = sample(self.backbone, bank, [self.prompt] * count, range(self.seed, self.seed + count),
                          self.settings)
        self.pictures.append(pictures[0].float().cpu())
        if self.similarity is not None:
            self.scores.append((step, self.similarity(list(pictures))))
            if isinstance(self.similarity, PhotoSimilarity):
                self.spreads[step] = self.similarity.spread

    def evaluate(self, bank: ConceptBank, step: int) -> float:
        """Draws a preview and returns its score, for early stopping."""
        self.draw(bank, step)
        return self.scores[-1][1]


def learn_with_previews(task: Task, method: Method, data: TrainingData, config: TrainingConfig,
                        previews: Previews,
                        callback: Callback, checkpoint_file: Path, last: bool = True,
                        keep: Collection[int] = (), say: Callable[[str], object] | None = None) -> Learned:
    """Learns a concept. If `config.patience` is set, the similarity of its previews decides when to stop.

    Args:
        previews: Drawn by the callback, for early stopping, and at the end.
        last: Whether to draw a preview at the end as the concept's thumbnail.
        keep: Steps after which the state of the concept is kept.
        say: Gets the memory plan, see `learn`.
    """
    evaluator = previews.evaluate if config.patience else None
    learned = learn(task, method, data, config, callback, checkpoint_file, evaluator=evaluator,
                    keep=keep, say=say)
    if not last:
        return learned
    if previews.last_step != len(learned.losses):      # otherwise the preview that ended training is used
        previews.draw(learned.bank, len(learned.losses))
    concept = replace(learned.concept, thumbnail=thumbnail_of(previews.pictures[-1]))
    kept = {**learned.kept, len(learned.losses): concept}
    return replace(learned, concept=concept, bank=task.grown(concept, learned.bank.shared), kept=kept)


def older_concepts(backbone: Backbone, bank: ConceptBank, names: Sequence[str], settings: SampleSettings,
                   seed: int,
                   before_each: Callable[[], None] = lambda: None) -> list[tuple[str, bytes]]:
    """Samples some older concepts with the present bank, and pairs each with its thumbnail from training.

    Args:
        names: Names of the older concepts. At most `OLDER` of them are drawn, evenly spread.
        before_each: Called before each picture; it may raise to cancel.

    Returns:
        Captions with JPEG pictures; the bytes are empty for a concept without a thumbnail.
    """
    rows = []
    for name in spread(names, OLDER):
        before_each()
        picture = sample(backbone, bank, [concept_prompt(name, bank.infos[name].kind)], [seed], settings)[0]
        rows += [(f"<{name}> when learned", bank[name].thumbnail), (f"<{name}> now", thumbnail_of(picture))]
    return rows
