"""Trains the independent classifier of kind and body colour on separate photos."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ...core.demo import scenes
from ...core.demo.classifier import COLOURS, QualityClassifier
from .data import to_tensor
from .encoder import Pool, cached, disturb
from .loop import Run

UNSEEN = 0.15  # share of training photos with combinations held out of the base's pretraining


def named_thing(rng: random.Random, unseen: bool = False) -> scenes.Thing:
    """A random individual whose body colour has a name."""
    while True:
        thing = scenes.random_thing(rng, unseen=unseen)
        if "body" in thing.names:
            return thing


def render_photos(count: int, seed: int) -> Pool:
    """Renders `count` photos of one thing each. facts `[count, 2]`: the indices of kind and body colour."""
    rng, pictures, facts = random.Random(seed), [], []
    for _ in range(count):
        thing = named_thing(rng, rng.random() < UNSEEN)
        pictures.append(scenes.render(scenes.random_scene(rng, (thing,), "photo")))
        facts.append((scenes.KINDS.index(thing.kind), COLOURS.index(thing.names["body"])))
    return Pool(np.stack(pictures), np.zeros((count, 2), dtype=np.int64), np.array(facts, dtype=np.int64))


def train(folder: Path, steps: int, count: int = 16000, batch: int = 192,
          seed: int = 9000) -> QualityClassifier:
    """Trains the classifier. `folder` stores the rendered photos and the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = cached(folder / "photos.npz", lambda: render_photos(count, seed))
    torch.manual_seed(seed)
    model = QualityClassifier()
    run = Run(nn.ModuleDict({"classifier": model}), folder / "classifier.pt", steps, lr=3e-3)
    generator = torch.Generator().manual_seed(seed + run.start)
    for _ in run:
        index = torch.randint(len(photos.pictures), (batch,), generator=generator).numpy()
        images = disturb(to_tensor(photos.pictures[index]), generator)
        images = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.5, images.flip(3), images)
        with torch.autocast("cpu", torch.bfloat16):
            kinds, colours = model(images)
        kind, colour = torch.from_numpy(photos.facts[index]).T
        run.after(F.cross_entropy(kinds, kind) + F.cross_entropy(colours, colour))
    run.ema.copy_into_modules()
    return model.eval()
