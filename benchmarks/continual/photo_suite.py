"""What `bench continual --data FOLDER` runs on: a real base, photos, CLIP, and the papers' settings."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.cli.commands import EMBEDDED, load_backbone
from ...core.data.assignment import Assignment
from ...core.errors import ConceptError
from ...core.evaluation.clip import ClipEncoder
from ...core.files import write_atomically
from ...core.model.backbone import Backbone
from ...core.training.config import TrainingConfig
from . import photos
from .sequence_run import Suite

STEPS, RESOLUTION = 800, 512      # the papers'


@dataclass(frozen=True)
class Bench:
    """What the cells of a benchmark run on; training: seed -> configuration; settings_of: method -> its settings."""

    backbone: Backbone
    suite: Suite
    untrained: dict
    training: Callable[[int], TrainingConfig]
    settings_of: Callable[[str], Mapping]


def check_flags(options: Namespace) -> None:
    """Raises ConceptError for flags that mean nothing without photos, and for photos without what measures them."""
    if options.data is None:
        for name in ("clip", "dino", "resolution", "pictures"):
            if getattr(options, name) is not None:
                raise ConceptError(f"--{name} is for photos; give their folder by --data as well, or leave it out")
        for name, usual in (("base", "embedded"), ("device", "cpu")):
            if getattr(options, name) != usual:
                raise ConceptError(f"--{name} is '{getattr(options, name)}', which is for photos; give them by --data, or leave it out")
    elif options.clip is None:
        raise ConceptError("--clip is missing; photos are measured with CLIP, give the folder of openai/clip-vit-base-patch32 or another")
    elif options.pictures is not None and options.pictures < 2:
        raise ConceptError(f"pictures is {options.pictures}; allowed: 2 or more per concept, the paper has 1000")


def _origin(options: Namespace, backbone: Backbone, tasks: Sequence[Assignment], pictures: int, resolution: int) -> dict:
    """What figures depend on beside method and training."""
    seen = hashlib.sha256(json.dumps([[task.name, task.prompts, [p.digest for p in task.pictures]] for task in tasks]).encode())
    return {"base": backbone.fingerprint, "data": seen.hexdigest()[:16], "resolution": resolution, "pictures": pictures,
            "encoder": "CLIP" if options.dino is None else "CLIP and DINO"}


def _levels(file: Path, origin: Mapping, measure: Callable[[], tuple]) -> tuple:
    """From the file when it is of the same base, photos and sizes: it costs as much as a look at every concept."""
    if file.exists():
        try:
            found = json.loads(file.read_text())
            if found["origin"] == dict(origin):
                return tuple(found["levels"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConceptError(f"'{file}' cannot be read ({type(error).__name__}); delete it and it is made again") from error
    levels = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda temporary: temporary.write_text(json.dumps({"origin": dict(origin), "levels": levels}) + "\n"))
    return levels


def photo_bench(options: Namespace, folder: Path) -> Bench:
    """Everything from disk; folder: of the cells."""
    tasks = photos.read_tasks(options.data, options.tasks)
    backbone = load_backbone(options)
    encoder = ClipEncoder.load(options.clip, options.dino, backbone.device)
    resolution = options.resolution or (EMBEDDED["size"] if options.base == "embedded" else RESOLUTION)
    pictures = options.pictures or photos.PICTURES
    settings, origin = photos.sampling(resolution), _origin(options, backbone, tasks, pictures, resolution)
    levels = _levels(folder / f"levels-n{options.tasks}.json", origin,
                     lambda: photos.measured_levels(backbone, tasks, encoder, pictures, settings))
    suite, untrained = photos.suite(backbone, tasks, encoder, pictures, settings, levels, origin)
    return Bench(backbone, suite, untrained, lambda seed: photos.training(options.steps, resolution, seed), lambda method: {})
