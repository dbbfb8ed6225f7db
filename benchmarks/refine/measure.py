"""Learns a concept from one half of its photos, refines it with the other half, and measures both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

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
from ..sheet import save_sheet
from .halves import HALVES, Half, half_of

BEFORE, REFINED, WITHOUT, NEW_ONLY, AT_ONCE = "before", "refined", "without_replay", "new_only", "at_once"
# Learned from the old photos; refined with the new ones, with and without replay; learned anew from the new
# photos only, and from all photos with the steps of learning and refining together.
ROWS = (BEFORE, REFINED, WITHOUT, NEW_ONLY, AT_ONCE)
SHEET_SEED = 100


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

    def name_of(self, row: str) -> str:
        """The name of a row's files."""
        return f"{self.name}.{row}" + (f"-r{self.replay}" if row == REFINED else "")

    def halves(self) -> dict[str, Half]:
        return {half: half_of(self.concept, half, self.backbone.picture_size) for half in HALVES}


def _learned(run: Refinement, photos: Sequence[Picture], start: ConceptBank | None = None, replay: int = 0,
             steps: int | None = None) -> ConceptBank:
    """The bank with the concept, learned anew or refined.

    Args:
        run: What all rows share.
        photos: To learn from. They are not mirrored, because the halves show different directions.
        start: The bank with the concept to refine.
        replay: Number of replayed pictures.
        steps: Of this learning; None = those of the run.
    """
    backbone, concept = run.backbone, run.concept
    given = embedded.settings_of_kind(run.method, backbone.fingerprint, concept.kind)
    config = embedded.training(steps or run.steps, run.seed, backbone.picture_size)
    config = replace(config, flip=False, replay=replay)
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


def bank_of(run: Refinement, row: str) -> ConceptBank:
    """The bank of a row, learned once and kept in the folder."""
    file = run.folder / f"{run.name_of(row)}.safetensors"
    if not file.exists():
        old, new = (list(half.photos) for half in run.halves().values())
        if row in (BEFORE, NEW_ONLY):
            bank = _learned(run, old if row == BEFORE else new)
        elif row == AT_ONCE:
            bank = _learned(run, [*old, *new], steps=2 * run.steps)
        else:
            bank = _learned(run, new, bank_of(run, BEFORE), run.replay if row == REFINED else 0)
        run.folder.mkdir(parents=True, exist_ok=True)
        save_bank(bank, file)
    return open_bank(file)


def _sampled(run: Refinement, bank: ConceptBank, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Pictures of prompts that are taken in turn, one per seed."""
    prompts, side = [texts[i % len(texts)] for i in range(len(seeds))], run.backbone.picture_size
    return sample(run.backbone, bank, prompts, seeds, replace(embedded.SETTINGS, size=(side, side)))


def _likeness(run: Refinement, pictures: Tensor, half: Half) -> float:
    """Mean cosine of the encoder's features of pictures with those of a half's held-out real pictures."""
    encoder, kind = SceneEncoder(), run.concept.kind
    return image_alignment(encoder.features(pictures, kind), encoder.features(half.held_out, kind))


def limits(run: Refinement) -> dict:
    """The floor, pictures of the class noun, and the ceiling, real photos."""
    halves, empty = run.halves(), ConceptBank(run.backbone.layout)
    return {"floor": {name: _likeness(run, _sampled(run, empty, half.noun_prompts, embedded.SEEDS), half)
                      for name, half in halves.items()},
            "ceiling": {name: _likeness(run, torch.stack([photo.pixels for photo in half.photos]), half)
                        for name, half in halves.items()}}


def measure(run: Refinement, row: str) -> dict:
    """Likeness of a row's drawn pictures to the held-out real pictures of each half."""
    bank = bank_of(run, row)
    return {name: _likeness(run, _sampled(run, bank, half.prompts, embedded.SEEDS), half)
            for name, half in run.halves().items()}


def draw_sheet(runs: Sequence[Refinement], file: Path) -> None:
    """Two lines per concept, old and new: a held-out real picture, and a drawn one of each row."""
    pictures = []
    for run in runs:
        banks = [bank_of(run, row) for row in ROWS]
        for half in run.halves().values():
            drawn = [_sampled(run, bank, half.prompts[:1], [SHEET_SEED])[0].cpu() for bank in banks]
            pictures += [half.held_out[0], *drawn]
    save_sheet(torch.stack(pictures), file, 1 + len(ROWS))
