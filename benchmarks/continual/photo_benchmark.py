"""The continual benchmark on photos, with a real base, CLIP, and the settings of the papers."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Sequence

from ...core.cli.backbones import load_backbone, size_of
from ...core.data.assignment import Assignment
from ...core.demo.bases import NAMES
from ...core.errors import ConceptError
from ...core.evaluation.clip import ClipEncoder
from ...core.evaluation.photo_encoder import INSTALL, PhotoEncoder, is_installed
from ...core.evaluation.protocol import Encoder
from ...core.model.backbone import Backbone
from . import photos
from .prompt_suite import Benchmark

STEPS = 800      # as in the papers


def check_flags(options: Namespace) -> None:
    """Raises ConceptError for flags that need photos if there are none, and for photos without an encoder."""
    if options.data is None:
        for name in ("clip", "dino", "resolution", "pictures"):
            if getattr(options, name) is not None:
                raise ConceptError(f"--{name} is for photos; "
                                   "name their folder with --data as well, or leave it out")
        for name, usual in (("base", NAMES), ("device", ("cpu",))):
            if getattr(options, name) not in usual:
                raise ConceptError(f"--{name} is '{getattr(options, name)}', which is for photos; "
                                   "name their folder with --data as well, or leave it out")
    elif options.clip is None and options.dino is not None:
        raise ConceptError("--clip is missing; DINO compares objects only: give the folder of "
                           "openai/clip-vit-base-patch32 or of another CLIP, too")
    elif options.clip is None and not is_installed():
        raise ConceptError("--clip is missing; photos are measured with CLIP: give the folder of "
                           "openai/clip-vit-base-patch32 or of another CLIP, or install the encoder for "
                           f"photos: {INSTALL}")
    elif options.pictures is not None and options.pictures < 2:
        raise ConceptError(f"pictures is {options.pictures}; allowed: "
                           "2 or more per concept, the paper has 1000")


def _origin(options: Namespace, backbone: Backbone, tasks: Sequence[Assignment], pictures: int,
            resolution: int) -> dict:
    """Everything besides method and training that affects the figures."""
    encoder = "EfficientNet-Lite2"
    if options.clip is not None:
        encoder = "CLIP" if options.dino is None else "CLIP and DINO"
    data = json.dumps([[task.name, task.prompts, [p.digest for p in task.pictures]] for task in tasks])
    return {"base": backbone.fingerprint, "data": hashlib.sha256(data.encode()).hexdigest()[:16],
            "resolution": resolution,
            "pictures": pictures, "encoder": encoder}


def photo_benchmark(options: Namespace) -> Benchmark:
    """Loads the benchmark from disk."""
    tasks = photos.read_tasks(options.data, options.tasks)
    backbone = load_backbone(options)
    encoder: Encoder = (PhotoEncoder() if options.clip is None
                        else ClipEncoder.load(options.clip, options.dino, backbone.device))
    resolution, steps = options.resolution or size_of(options), options.steps or STEPS
    pictures = options.pictures or photos.PICTURES
    suite = photos.suite_of(backbone, tasks, encoder, pictures, photos.sampling(resolution),
                            _origin(options, backbone, tasks, pictures, resolution))
    return Benchmark(backbone, suite, lambda count, seed: photos.training(count, resolution, seed),
                     lambda _: {}, lambda _: steps)
