"""Refinement: photos are added to a concept later, when the photos that it was learned from are gone.

Learning goes on from the stored words and deltas with the new photos. That alone would forget the old photos.
So pictures of the concept as it was are drawn first and take part in every batch, as prior pictures do. Their
target is not the noise that was added to them. It is what the concept predicted for them before this run.

Why this target: the denoising loss on pictures that a model draws has that model's own prediction as its
minimum. Taking the prediction as target has the same minimum without the noise of the sampled target, and its
gradient is zero at the start. Faults of drawn pictures, such as too strong guidance, are not learned, because
pictures only decide where both predictions are compared. Why drawn pictures and not the new photos: on these
the prediction for the concept has to change, as their captions name it. LwF therefore replaces the concept in
the captions; here there is one concept only.

What is drawn: the captions of the old photos, which the concept's record holds. Where ordinary prompts are
drawn instead, the old look is also replayed in places that the new photos show, and little is learned there.

Replayed pictures count REPLAY_WEIGHT times as much as new photos. With the same weight, styles lose 3 % of
their likeness to the old photos, and nothing is gained for the new ones.
A step costs a second forward and backward pass for the drawn pictures, and one forward pass of the concept as
it was.

Related work: generative replay (Shin et al., NeurIPS 2017, 1705.08690) trains on samples of the old model;
distillation is that of LwF (see methods.lwf). We know of no published method that adds photos to a concept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.concepts import OWN, Concept, ConceptInfo
from ..bank.prompts import Prompt, Vocabulary
from ..conditioning.encoding import TextMemory, encode_prompts
from ..data.batch import Batch
from ..data.pictures import Picture
from ..errors import ConceptError
from ..methods.base import METHODS, Forward, Method, Task, get, make
from ..methods.check_base import check_base
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from .config import TrainingConfig
from .record import LONGEST_CAPTION, method_settings

# Ordinary places and subjects, which every base knows, for concepts whose record has no captions.
PROMPTS = {
    "object": ("a photo of {}", "a photo of {} on a beach", "a photo of {} in a meadow",
               "a photo of {} in the snow", "a photo of {} at night", "a photo of {} in a room"),
    "style": ("{}", "{} of a dog", "{} of a cat", "{} of a car", "{} of a fish", "{} of a robot"),
}
STEPS, AT_ONCE = 25, 4      # of the sampler; pictures per batch of it
REPLAY_WEIGHT = 2.0      # of replayed pictures, times the training's `prior_weight`


def refinable_methods() -> list[str]:
    return sorted(name for name, entry in METHODS.items() if entry.method.refinable)


def check_refinable(bank: ConceptBank | None, name: str, is_variant: bool = False,
                    **given: str | Sequence[str]) -> ConceptInfo:
    """Checks that a concept can be refined, or that a variant can start from it. Returns its header.

    Args:
        bank: The bank that should hold it; None for a new one.
        name: The concept.
        is_variant: Whether a variant starts from it.
        given: What a person has chosen, by field of `ConceptInfo`. An empty value means the concept's own.

    Raises:
        ConceptError: The bank does not hold it, its method cannot, or a chosen value is not its own.
    """
    use, keeps = (("have a variant", "a variant keeps it") if is_variant
                  else ("be refined", "refining keeps it"))
    if bank is None or name not in bank:
        held = "none" if bank is None else ", ".join(bank.names) or "none"
        raise ConceptError(f"the bank holds no concept '{name}' that could {use}; it holds {held}; "
                           "learn it first")
    info = bank.infos[name]
    able = refinable_methods()
    if info.method not in able:
        reason = ("its concepts share weights, are merged, or were learned on top of one another"
                  if info.method in METHODS else "it was not learned by a method of this version")
        raise ConceptError(f"concept '{name}' of method '{info.method}' cannot {use}, because {reason}; "
                           f"methods that can: {', '.join(able)}")
    for field, value in given.items():
        stored = getattr(info, field)
        if field == "class_noun":
            stored, value = " ".join(stored.split()), " ".join(str(value).split())
        if value and value != stored:
            shown = stored if isinstance(stored, str) else ",".join(stored)
            raise ConceptError(f"the {field.replace('_', ' ')} of concept '{name}' is {shown!r}, now "
                               f"{value!r} is given; {keeps}, so give the same or none")
    return info


def check_variant(bank: ConceptBank | None, parent: str, name: str, **given: str) -> Concept:
    """Checks that a concept can start from what another one has learned.

    Args:
        bank: The bank that should hold the other one; None for a new one.
        parent: The other one.
        name: The new concept.
        given: As for `check_refinable`. The class noun is not among it, because a variant may have its own.

    Returns:
        The other concept.

    Raises:
        ConceptError: The bank does not hold it, its method cannot, or kind or method are not its own.
    """
    if parent == name:
        raise ConceptError(f"'{name}' would be a variant of itself; give it another name, or refine it")
    check_refinable(bank, parent, is_variant=True, **given)
    assert bank is not None
    return bank[parent]


def settings_of(info: ConceptInfo, given: Mapping[str, object]) -> dict[str, object]:
    """Settings of the method of a concept that is refined: the given ones, else those of its record."""
    known = {field.name for field in fields(get(info.method).config)}
    record = info.provenance.settings      # of a file, so it may be anything
    stored = record.get("method") if isinstance(record, Mapping) else None
    stored = stored if isinstance(stored, Mapping) else {}
    return {**{name: value for name, value in stored.items() if name in known}, **given}


def knows_all(info: ConceptInfo, photos: Sequence[Picture]) -> bool:
    """Whether a concept was learned from all of these photos, so that there is nothing to refine."""
    return {photo.digest for photo in photos} <= set(info.provenance.images)


def notes_on_photos(info: ConceptInfo, photos: Sequence[Picture]) -> list[str]:
    """A note if the concept was learned from some of these photos already."""
    known = sum(photo.digest in info.provenance.images for photo in photos)
    return [f"<{info.name}> was learned from {known} of these {len(photos)} photos already"] if known else []


def replay_prompts(task: Task) -> list[Prompt]:
    """What replayed pictures show: the captions that the concept was learned from.

    Captions that name a concept which the bank no longer holds are left out. If none is left, as for
    concepts of earlier versions, ordinary prompts take their place.
    """
    assert task.refined is not None
    vocabulary, own, prompts = task.refined.vocabulary, f"<{task.name}>", []
    for caption in task.refined.infos[task.name].provenance.captions:
        try:
            prompt = vocabulary.parse_caption(caption.replace(OWN, own))
        except ConceptError:
            continue
        if task.name in prompt.concepts and len(caption) <= LONGEST_CAPTION:      # the file may hold anything
            prompts.append(prompt)
    return prompts or [vocabulary.parse(text.format(own)) for text in PROMPTS[task.kind]]


def with_replay(task: Task, pictures: Sequence[Picture], config: TrainingConfig, cfg: float,
                before_each: Callable[[], None] = lambda: None) -> list[Picture]:
    """The pictures of a task, and behind them those that are replayed if a concept is refined.

    Args:
        task: Its `refined` bank draws the concept as it was.
        pictures: Photos, and prior pictures if there are any.
        config: Number, size and seed of the replayed pictures.
        cfg: Guidance scale that is usual for the base.
        before_each: Called before each batch of pictures; it may raise to cancel.
    """
    if task.refined is None or not config.replay or not config.prior_weight:
        return list(pictures)
    different = replay_prompts(task)
    prompts = [different[i % len(different)] for i in range(config.replay)]
    generator = torch.Generator().manual_seed(config.seed)
    seeds = torch.randint(2**31, (config.replay,), generator=generator).tolist()
    side = config.resolution
    settings, drawn = SampleSettings(steps=STEPS, cfg=cfg, size=(side, side), batch=AT_ONCE), []
    for first in range(0, config.replay, AT_ONCE):
        before_each()
        rows = slice(first, first + AT_ONCE)
        drawn += list(sample(task.backbone, task.refined, prompts[rows], seeds[rows], settings).cpu())
    replayed = [Picture(pixels, prompt.text, is_prior=True)
                for pixels, prompt in zip(drawn, prompts, strict=True)]
    return [*pictures, *replayed]


def check_start(task: Task, method: Method) -> None:
    """Raises ConceptError if the method does not work on the base, or if a concept that is refined does not
    fit the method's settings. This is cheap; encoding photos and drawing pictures is not.
    """
    check_base(method, task)
    if task.start is not None:
        Before(task.worded(method.words_of_kind(task.kind)), method)


class Before:
    """The concept as it was before the run, as a second, frozen instance of its method."""

    def __init__(self, task: Task, method: Method) -> None:
        self.task, self.memory = task, TextMemory()
        self.method = make(method.name, method_settings(method))
        self.method.begin(replace(task, generator=torch.Generator().manual_seed(0)))
        assert task.start is not None
        self.method.start_from(task.start)

    def weighted(self, batch: Batch, vocabulary: Vocabulary) -> Batch:
        """The batch with `REPLAY_WEIGHT` on replayed pictures. Other prior pictures count as ever."""
        names = [set(vocabulary.parse_caption(caption).concepts) for caption in batch.prompts]
        is_replayed = batch.is_prior & torch.tensor([self.task.name in own for own in names])
        return replace(batch, weights=torch.where(is_replayed, REPLAY_WEIGHT * batch.weights, batch.weights))

    @torch.no_grad()
    def taught(self, seen: Forward, vocabulary: Vocabulary) -> Forward:
        """The forward pass with the old prediction as the target of replayed rows.

        These are the prior pictures whose captions name the concept.
        """
        batch, task = seen.batch, self.task
        prior = batch.is_prior.tolist()
        chosen = [i for i, words in enumerate(seen.context.words) if prior[i] and task.name in words]
        if not chosen:
            return seen
        prompts = [vocabulary.parse_caption(batch.prompts[i]) for i in chosen]
        named = {name for prompt in prompts for name in prompt.concepts} - {task.name}
        tokens = task.bank.token_groups(named) | {task.name: self.method.token_group()}
        context = encode_prompts(task.backbone, prompts, tokens, memory=self.memory)
        rows = torch.tensor(chosen, device=seen.noisy.device)
        output: Tensor = task.backbone.predict(seen.noisy[rows], seen.timesteps[rows], context,
                                               self.method.processor())
        return replace(seen, target=seen.target.index_copy(0, rows, output.to(seen.target)))
