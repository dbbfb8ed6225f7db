"""Variants: a concept that starts from what another one has learned, beside one that begins anew.

The dog rex wears a scarf; the variant wears a hat instead. The cat mimi wears a hat; the variant wears a
scarf. Both ways learn from the same few photos, with the same steps, seed and settings.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.bank.tokens import default_words
from ...core.data.framing import Framing
from ...core.data.training_set import prepare
from ...core.demo import scenes
from ...core.demo.base import load_base
from ...core.demo.bases import file_of
from ...core.demo.judges import SceneEncoder, assignment_of
from ...core.demo.scenes import SceneConcept
from ...core.evaluation.metrics import image_alignment
from ...core.methods import DEFAULT
from ...core.methods.base import Task, make
from ...core.model.backbone import Backbone
from ...core.sampling.sampling import sample
from ...core.training.loop import learn
from ...core.training.refinement import check_variant, settings_of
from ..continual import embedded
from ..report import Result, add_embedded_base, load_or_make, numbers, say, write_result

PARENTS = ("rex", "mimi")
OTHER = {"scarf": ("hat", (240, 240, 240)), "hat": ("scarf", (240, 240, 240))}
PARENT, VARIANT, ANEW = "parent", "variant", "anew"


def add_command(commands) -> None:
    parser = commands.add_parser("variants", help="variants of a concept, beside concepts that begin anew")
    parser.add_argument("--json", dest="file", type=Path, required=True,
                        help="where the result goes; finished parts are saved beside it")
    parser.add_argument("--seed", default="0,1", help="seeds, comma separated (default %(default)s)")
    parser.add_argument("--steps", default="25,100",
                        help="of the variants, comma separated (default %(default)s)")
    parser.add_argument("--photos", type=int, default=3, help="of a variant (default %(default)s)")
    add_embedded_base(parser)
    parser.set_defaults(run=variants)


def variant_of(concept: SceneConcept) -> SceneConcept:
    """The same individual that wears something else."""
    assert concept.thing is not None
    accessory, colour = OTHER[concept.thing.accessory]
    thing = replace(concept.thing, accessory=accessory, accessory_colour=colour)
    return replace(concept, name=f"{concept.name}-winter", thing=thing)


def _learned(backbone: Backbone, bank: ConceptBank, concept: SceneConcept, photos: int, steps: int, seed: int,
             parent: str = "") -> ConceptBank:
    task = Task(concept.name, concept.class_noun, backbone, bank,
                generator=torch.Generator().manual_seed(seed))
    given = embedded.settings_of_kind(DEFAULT, backbone.fingerprint, concept.kind)
    if parent:
        start = check_variant(bank, parent, concept.name)
        given = settings_of(start.info, {})
        task = replace(task, parent=start, words=default_words(concept.name, len(start.info.words)))
    config = embedded.training(steps, seed, backbone.picture_size)
    pictures = assignment_of(concept, photos, size=backbone.picture_size).pictures
    data = prepare(backbone, list(pictures), concept.name, concept.class_noun,
                   Framing(config.resolution, config.framing, config.flip))
    return learn(task, make(DEFAULT, given), data, config).bank


def _likeness(backbone: Backbone, bank: ConceptBank, name: str, concept: SceneConcept) -> float:
    """Mean cosine of the encoder's features of drawn pictures with those of held-out real ones."""
    task = assignment_of(concept, size=backbone.picture_size)
    prompts = [task.prompts[i % len(task.prompts)].replace(f"<{concept.name}>", f"<{name}>")
               for i in range(len(embedded.SEEDS))]
    side = (backbone.picture_size, backbone.picture_size)
    pictures: Tensor = sample(backbone, bank, prompts, embedded.SEEDS, replace(embedded.SETTINGS, size=side))
    encoder = SceneEncoder()
    return image_alignment(encoder.features(pictures, "object"), encoder.features(task.held_out, "object"))


def measure(backbone: Backbone, concept: SceneConcept, photos: int, steps: list[int], seed: int) -> dict:
    """Likeness to held-out photos of the variant, of each way and number of steps."""
    winter = variant_of(concept)
    bank = _learned(backbone, ConceptBank(backbone.layout), concept, 5, embedded.STEPS, seed)
    before = bank[concept.name].digest()
    rows: dict = {PARENT: _likeness(backbone, bank, concept.name, winter)}
    stays = True
    for way, parent in ((VARIANT, concept.name), (ANEW, "")):
        for count in steps:
            grown = _learned(backbone, bank, winter, photos, count, seed, parent)
            rows[f"{way}, {count} steps"] = _likeness(backbone, grown, winter.name, winter)
            stays = stays and grown[concept.name].digest() == before
    return {"concept": concept.name, "seed": seed, "likeness": rows, "parent_unchanged": stays}


def variants(options: Namespace) -> Result:
    """Performs the runs that have no file yet, and summarises all that were asked for."""
    backbone = load_base(file_of(options.base))
    steps, parts = numbers(options.steps, "steps"), []
    folder = options.file.with_suffix(".cells") / backbone.fingerprint[:12]
    for name in PARENTS:
        for seed in numbers(options.seed, "seed"):
            concept = scenes.CONCEPTS[name]
            key = f"{name}-p{options.photos}-n{'-'.join(map(str, steps))}-s{seed}.json"
            part = load_or_make(folder / key, lambda concept=concept, seed=seed: measure(
                backbone, concept, options.photos, steps, seed))
            say(f"{name}, seed {seed}: {part['likeness']}")
            parts.append(part)
    means = {row: sum(part["likeness"][row] for part in parts) / len(parts) for row in parts[0]["likeness"]}
    result = {"method": DEFAULT, "settings": embedded.settings_of(DEFAULT, backbone.fingerprint),
              "photos": options.photos, "parent": {"photos": 5, "steps": embedded.STEPS}, "steps": steps,
              "pictures": len(embedded.SEEDS), "base": backbone.fingerprint, "parts": parts,
              "likeness": means}
    write_result(options.file, result)
    return result, [f"{row}: {value:.3f}" for row, value in means.items()]
