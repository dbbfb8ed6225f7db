"""The demo: two methods learn two objects and a style in sequence, and then draw both objects in one picture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..bank.bank import ConceptBank
from ..bank.store import change_bank, saved_elsewhere
from ..data.assignment import Assignment
from ..demo.base import load_base
from ..demo.bases import EMBEDDED, file_of, picture_size
from ..demo.judges import SceneEncoder, assignment
from ..errors import ConceptError
from ..evaluation import metrics
from ..evaluation.protocol import Record, run_sequence
from ..files import check_output, check_output_folder, write_atomically
from ..model.backbone import Backbone
from ..regional.regions import Region
from ..sampling.regions import sample_regions
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from ..training.config import TrainingConfig

TASKS = ("rex", "mimi", "blueprint")
METHODS = ("cidm", "finetune")
METHOD_SETTINGS = {"lr": 2e-3, "token_lr": 2e-2}
SIDE = picture_size()
TRAINING = TrainingConfig(steps=500, batch_size=4, resolution=SIDE, flip=True, schedule="cosine", warmup=20,
                          min_snr_gamma=0.0, max_grad_norm=1.0)
SETTINGS = SampleSettings(steps=20, cfg=3.0, size=(SIDE, SIDE))
SEEDS = tuple(range(100, 112))
SCENE = "a photo of a dog and a cat in a meadow"
# Each region's prompt describes the whole scene. With a single animal per prompt, both regions would draw it
# in the middle.
REGIONS = (
    Region("a photo of <rex> and a cat in a meadow", box=(0.1, 0.0, 1.0, 0.5)),
    Region("a photo of a dog and <mimi> in a meadow", box=(0.1, 0.5, 1.0, 1.0)),
)
COMPOSITION_SEEDS = tuple(range(500, 508))


@dataclass(frozen=True)
class Composition:
    """Pictures with both objects in their regions; hits: share of regions that show the right individual."""

    pictures: Tensor
    hits: float


@dataclass(frozen=True)
class Reference:
    """Reference levels per concept.

    Attributes:
        noun: Image alignment of pictures of the class noun.
        real: Image alignment of held-out real pictures.
        noun_pictures: The pictures of the class noun, `[B, 3, H, W]` each.
    """

    noun: list[float]
    real: list[float]
    noun_pictures: list[Tensor]


def _progress(method: str) -> Callable[[str], Callable]:
    def start(name: str):
        bar = tqdm(total=TRAINING.steps, desc=f"{method} learns <{name}>", leave=True)

        def callback(info) -> None:
            bar.update(1)
            bar.set_postfix(loss=f"{info.loss:.3f}", refresh=False)
            if info.step == info.total:
                bar.close()

        return callback

    return start


def reference_levels(backbone: Backbone, tasks: list[Assignment], encoder: SceneEncoder,
                     settings: SampleSettings) -> Reference:
    bank, noun, real, pictures = ConceptBank(backbone.layout), [], [], []
    for task in tasks:
        prompts = [task.noun_prompts[i % len(task.noun_prompts)] for i in range(len(SEEDS))]
        images = sample(backbone, bank, prompts, SEEDS, settings)
        references = encoder.features(task.references, task.kind)
        noun.append(metrics.image_alignment(encoder.features(images, task.kind), references))
        real.append(metrics.image_alignment(encoder.features(task.held_out, task.kind), references))
        pictures.append(images)
    return Reference(noun, real, pictures)


def cut_out(pictures: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """Keeps a box of `[B, 3, H, W]` in place and repeats its border pixels over the rest."""
    height, width = pictures.shape[-2:]
    sides = (height, width, height, width)
    top, left, bottom, right = (round(fraction * side) for fraction, side in zip(box, sides, strict=True))
    return F.pad(pictures[..., top:bottom, left:right], (left, width - right, top, height - bottom),
                 mode="replicate")


def region_hits(pictures: Tensor, regions, owners: list[Assignment], encoder: SceneEncoder,
                levels: list[float]) -> float:
    """Share of regions that show the right individual according to the metric encoder.

    Args:
        pictures: `[B, 3, H, W]`.
        regions: One per owner.
        owners: The concepts of the regions.
        encoder: Measures similarity.
        levels: Per owner, the similarity that the region must exceed.
    """
    hits = []
    for i, region in enumerate(regions):
        seen = encoder.features(cut_out(pictures, region.box), "object")
        scores = torch.stack([(seen @ encoder.features(owner.references, owner.kind).T).mean(1)
                              for owner in owners], dim=1)
        hits.append((scores.argmax(1) == i) & (scores[:, i] > levels[i]))
    return float(torch.stack(hits).float().mean())


def compose(backbone: Backbone, bank: ConceptBank, tasks: list[Assignment], encoder: SceneEncoder,
            reference: Reference, settings: SampleSettings) -> Composition:
    """Samples both objects in one picture by region attention.

    A hit also requires a similarity above the midpoint between class noun and real pictures.
    """
    pictures = sample_regions(backbone, bank, SCENE, REGIONS, COMPOSITION_SEEDS, settings)
    levels = [(reference.noun[i] + reference.real[i]) / 2 for i in range(2)]
    return Composition(pictures, region_hits(pictures, REGIONS, tasks[:2], encoder, levels))


def _method_report(record: Record, reference: Reference) -> dict:
    gaps = [metrics.gap_closed(record.image_alignment[j][j], reference.noun[j], reference.real[j])
            for j in range(len(reference.noun))]
    per_concept = record.retention
    return {
        "image_alignment": record.image_alignment,
        "retention": sum(per_concept) / len(per_concept),
        "retention_per_concept": per_concept,
        "text_alignment": record.text_alignment,
        "gap_closed": gaps,
        "seconds": record.seconds,
    }


def run(output: Path, base: str = EMBEDDED) -> dict:
    """Writes report.png, report.json and bank.safetensors into `output`; returns the report.

    Args:
        output: A folder.
        base: Name of an embedded base. Raises ConceptError for other names.
    """
    from .demo_report import draw

    path = file_of(base)
    check_output_folder(output)
    for name in ("bank.safetensors", "report.png", "report.json"):
        check_output(output / name, "demo's file")
    began = time.perf_counter()
    backbone, encoder = load_base(path), SceneEncoder()
    side = backbone.picture_size
    settings, training = replace(SETTINGS, size=(side, side)), replace(TRAINING, resolution=side)
    tasks = [assignment(name, size=side) for name in TASKS]
    reference = reference_levels(backbone, tasks, encoder, settings)
    records = {method: run_sequence(backbone, tasks, method, METHOD_SETTINGS, training, encoder, settings,
                                    SEEDS, _progress(method)) for method in METHODS}
    bank = records["cidm"].bank
    composition = compose(backbone, bank, tasks, encoder, reference, settings)
    report = {
        "base": base,
        "concepts": list(TASKS),
        "methods": {name: _method_report(record, reference) for name, record in records.items()},
        "class_noun_alignment": reference.noun,
        "held_out_alignment": reference.real,
        "composition": {"region_hits": composition.hits, "pictures": len(composition.pictures)},
        "seconds": time.perf_counter() - began,
    }
    output.mkdir(parents=True, exist_ok=True)
    try:
        change_bank(output / "bank.safetensors", lambda _: bank)      # an earlier bank stays as a version
    except ConceptError as error:
        raise saved_elsewhere(error, output / "bank.safetensors", bank) from error
    draw(output / "report.png", tasks, reference, records, composition)
    write_atomically(output / "report.json",
                     lambda temporary: temporary.write_text(json.dumps(report, indent=1) + "\n"))
    return report
