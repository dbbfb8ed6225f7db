"""Learns a concept from one half of its photos, refines it with the other half, and measures both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...core.bank.bank import ConceptBank
from ...core.bank.format import open_bank, save_bank
from ...core.data.framing import Framing
from ...core.data.pictures import Picture
from ...core.data.training_set import prepare
from ...core.demo.judges import SceneEncoder
from ...core.demo.scenes import SceneConcept
from ...core.evaluation.metrics import image_alignment
from ...core.hosts.diffusers import DiffusersBackbone
from ...core.methods.base import Task, make
from ...core.sampling.sampling import sample
from ...core.training.loop import learn
from ...core.training.refinement import check_refinable, settings_of, with_replay
from ..continual import embedded
from .halves import HALVES, Half, half_of

BEFORE, REFINED, WITHOUT, AT_ONCE = "before", "refined", "without_replay", "at_once"
ROWS = (BEFORE, REFINED, WITHOUT, AT_ONCE)


@dataclass(frozen=True)
class Refinement:
    """What all rows of a concept share. replay: number of replayed pictures of the row `refined`."""

    backbone: DiffusersBackbone
    concept: SceneConcept
    method: str
    steps: int
    seed: int
    replay: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.method}-{self.concept.name}-n{self.steps}-s{self.seed}"

    def halves(self) -> dict[str, Half]:
        return {half: half_of(self.concept, half, self.backbone.picture_size) for half in HALVES}


def _learned(run: Refinement, photos: Sequence[Picture], start: ConceptBank | None,
             replay: int) -> ConceptBank:
    """The bank with the concept, learned anew or refined. start: the bank with the concept to refine."""
    backbone, concept = run.backbone, run.concept
    given = embedded.settings_of(run.method, backbone.fingerprint)
    config = replace(embedded.training(run.steps, run.seed, backbone.picture_size), replay=replay)
    task = Task(concept.name, concept.class_noun, backbone, ConceptBank(backbone.layout), concept.kind,
                generator=torch.Generator().manual_seed(run.seed))
    if start is not None:
        info = check_refinable(start, concept.name)
        given = settings_of(info, {})
        task = replace(task, bank=start.remove(concept.name), words=info.words, refined=start)
    pictures = with_replay(task, photos, config, embedded.SETTINGS.cfg)
    data = prepare(backbone, pictures, concept.name, concept.class_noun,
                   Framing(config.resolution, config.framing, config.flip))
    return learn(task, make(run.method, given), data, config).bank


def _figures(run: Refinement, halves: Mapping[str, Half], bank: ConceptBank, nouns: bool = False) -> dict:
    """Likeness of drawn pictures to the held-out photos of each half: mean cosine of the encoder's features.

    nouns: whether class nouns stand for the concept in the prompts.
    """
    encoder, side, kind = SceneEncoder(), run.backbone.picture_size, run.concept.kind
    figures = {}
    for name, half in halves.items():
        texts = half.noun_prompts if nouns else half.prompts
        prompts = [texts[i % len(texts)] for i in range(len(embedded.SEEDS))]
        pictures = sample(run.backbone, bank, prompts, embedded.SEEDS,
                          replace(embedded.SETTINGS, size=(side, side)))
        figures[name] = image_alignment(encoder.features(pictures, kind),
                                        encoder.features(half.held_out, kind))
    return figures


def limits(run: Refinement) -> dict:
    """The floor, pictures of the class noun, and the ceiling, real photos."""
    halves, encoder, kind = run.halves(), SceneEncoder(), run.concept.kind
    ceiling = {}
    for name, half in halves.items():
        photos = torch.stack([photo.pixels for photo in half.photos])
        ceiling[name] = image_alignment(encoder.features(photos, kind),
                                        encoder.features(half.held_out, kind))
    return {"floor": _figures(run, halves, ConceptBank(run.backbone.layout), nouns=True), "ceiling": ceiling}


def measure(run: Refinement, row: str) -> dict:
    """The figures of one row. The concept before refining is learned once and stored in the folder."""
    halves = run.halves()
    old, new = (list(halves[half].photos) for half in HALVES)
    if row == AT_ONCE:
        return _figures(run, halves, _learned(run, [*old, *new], None, 0))
    file = run.folder / f"{run.name}.safetensors"
    if not file.exists():
        run.folder.mkdir(parents=True, exist_ok=True)
        save_bank(_learned(run, old, None, 0), file)
    before = open_bank(file)
    if row == BEFORE:
        return _figures(run, halves, before)
    return _figures(run, halves, _learned(run, new, before, run.replay if row == REFINED else 0))
