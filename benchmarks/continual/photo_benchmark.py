"""The continual benchmark on photos, with a real base, CLIP, and the settings of the papers."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...core.cli.backbones import load_backbone, size_of
from ...core.data.assignment import Assignment
from ...core.errors import ConceptError
from ...core.evaluation.clip import ClipEncoder
from ...core.files import write_atomically
from ...core.model.backbone import Backbone
from . import photos
from .prompt_suite import Benchmark, Levels

STEPS = 800      # as in the papers


def check_flags(options: Namespace) -> None:
    """Raises ConceptError for flags that need photos if there are none, and for photos without an encoder."""
    if options.data is None:
        for name in ("clip", "dino", "resolution", "pictures"):
            if getattr(options, name) is not None:
                raise ConceptError(f"--{name} is for photos; "
                                   "name their folder with --data as well, or leave it out")
        for name, usual in (("base", "embedded"), ("device", "cpu")):
            if getattr(options, name) != usual:
                raise ConceptError(f"--{name} is '{getattr(options, name)}', which is for photos; "
                                   "name their folder with --data as well, or leave it out")
    elif options.clip is None:
        raise ConceptError("--clip is missing; photos are measured with CLIP: give the folder of "
                           "openai/clip-vit-base-patch32 or of another CLIP")
    elif options.pictures is not None and options.pictures < 2:
        raise ConceptError(f"pictures is {options.pictures}; allowed: "
                           "2 or more per concept, the paper has 1000")


def _origin(options: Namespace, backbone: Backbone, tasks: Sequence[Assignment], pictures: int,
            resolution: int) -> dict:
    """Everything besides method and training that affects the figures."""
    data = json.dumps([[task.name, task.prompts, [p.digest for p in task.pictures]] for task in tasks])
    return {"base": backbone.fingerprint, "data": hashlib.sha256(data.encode()).hexdigest()[:16],
            "resolution": resolution,
            "pictures": pictures, "encoder": "CLIP" if options.dino is None else "CLIP and DINO"}


def _levels(file: Path, origin: Mapping, measure: Callable[[], Levels]) -> Levels:
    """Reads the levels from the file if it matches base, photos and sizes.

    Otherwise measures them, which takes as long as evaluating all concepts.
    """
    if file.exists():
        try:
            stored = json.loads(file.read_text())
            if stored["origin"] == dict(origin):
                noun, text, real = stored["levels"]
                return noun, text, real
        except (ValueError, KeyError, TypeError) as error:
            raise ConceptError(f"'{file}' cannot be read ({type(error).__name__}); "
                               "delete it and it is made again") from error
    levels = measure()
    content = json.dumps({"origin": dict(origin), "levels": levels}) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda temporary: temporary.write_text(content))
    return levels


def photo_benchmark(options: Namespace, folder: Path) -> Benchmark:
    """Loads the benchmark from disk. folder: folder of the runs."""
    tasks = photos.read_tasks(options.data, options.tasks)
    backbone = load_backbone(options)
    encoder = ClipEncoder.load(options.clip, options.dino, backbone.device)
    resolution = options.resolution or size_of(options)
    pictures = options.pictures or photos.PICTURES
    settings, origin = photos.sampling(resolution), _origin(options, backbone, tasks, pictures, resolution)
    levels = _levels(folder / f"levels-n{options.tasks}.json", origin,
                     lambda: photos.measured_levels(backbone, tasks, encoder, pictures, settings))
    suite, untrained = photos.suite_of(backbone, tasks, encoder, pictures, settings, levels, origin)
    return Benchmark(backbone, suite, untrained,
                     lambda seed: photos.training(options.steps, resolution, seed), lambda _: {})
