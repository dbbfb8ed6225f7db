"""A classifier of kind, pattern and accessory of one thing in any drawing style.

`core.demo.classifier` names kind and colour of photos. Illegible outlines do not lower its accuracy. This
one also reads line drawings, neon signs and drawings in random styles. It takes 64 pixels, so it can compare
bases of both sizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.demo import scenes
from ...core.demo.encoder import AttentionPool, Mixer, StoredModule, convolution
from ...core.demo.render import render
from .data import to_tensor
from .encoder import ACCESSORIES, disturb
from .long_run import LongRun, Plan, never
from .pictures import random_drawing

FACTS = (scenes.KINDS, scenes.PATTERNS, ACCESSORIES)
SIZES = tuple(len(words) for words in FACTS)
STYLES_SHOWN = ("photo", "ink", "pastel", "neon", "drawing")  # a mosaic has no outlines
DEFAULT = {"channels": [24, 48, 72], "looks": 8, "hidden": 96}
PLAN = Plan(2200, 2e-3, warmup=100, decay=0.7, muon=True)
SEED = 41_000


class PartsClassifier(StoredModule):
    """Pictures `[B, 3, 64, 64]` in -1..1 to logits over KINDS, PATTERNS and ACCESSORIES."""

    def __init__(self, config: dict | None = None) -> None:
        super().__init__({**DEFAULT, **(config or {})})
        first, second, third = self.config["channels"]
        self.trunk = nn.Sequential(convolution(3, first, 1), convolution(first, first),
                                   convolution(first, second), Mixer(second),
                                   convolution(second, third), Mixer(third))
        self.pool = AttentionPool(third, self.config["looks"])
        width, hidden = 2 * third + 2 * self.config["looks"], self.config["hidden"]
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(),
                                    nn.Linear(hidden, sum(SIZES)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.output(self.pool(self.trunk(images))).float().split(SIZES, dim=1)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[tuple[str, str, str]]:
        """The likeliest kind, pattern and accessory of each picture `[B, 3, 64, 64]`."""
        likeliest = [logits.argmax(1).tolist() for logits in self(images)]
        return [tuple(words[i] for words, i in zip(FACTS, row, strict=True))
                for row in zip(*likeliest, strict=True)]


def show(rng: random.Random, thing: scenes.Thing, style: str) -> np.ndarray:
    """A picture `[64, 64, 3]` of one thing in a named style, or in a random one for `drawing`."""
    drawn = random_drawing(rng) if style == "drawing" else scenes.STYLES[style]
    return render(scenes.random_scene(rng, (thing,), drawn))


def render_facts(count: int, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures `[N, 64, 64, 3]` and their facts `[N, 3]`: indices into FACTS."""
    rng, pictures, facts = random.Random(seed), [], []
    for _ in range(count):
        thing = scenes.random_thing(rng, unseen=rng.random() < 0.15)
        pictures.append(show(rng, thing, rng.choice(STYLES_SHOWN)))
        named = (thing.kind, thing.pattern, thing.accessory)
        facts.append([words.index(word) for words, word in zip(FACTS, named, strict=True)])
    return np.stack(pictures), np.array(facts, dtype=np.int64)


def train(folder: Path, count: int = 14_000, batch: int = 128,
          stop: Callable[[], bool] = never) -> PartsClassifier:
    """`folder` keeps the rendered pictures and the checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "parts_pictures.npz"
    if not file.exists():
        pictures, facts = render_facts(count)
        np.savez_compressed(file, pictures=pictures, facts=facts)
    with np.load(file) as stored:
        pictures, facts = stored["pictures"], torch.from_numpy(stored["facts"])
    torch.manual_seed(SEED)
    model = PartsClassifier()
    run = LongRun(model, folder, "parts", PLAN, stop)
    generator = torch.Generator().manual_seed(SEED + run.start)
    for _ in run:
        index = torch.randint(len(pictures), (batch,), generator=generator)
        images = disturb(to_tensor(pictures[index.numpy()]), generator)
        images = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.5, images.flip(3), images)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(images)
        losses = [F.cross_entropy(logits, fact) for logits, fact in zip(outputs, facts[index].T, strict=True)]
        run.learn(torch.stack(losses).sum())
    run.use_average()
    return model.eval()


def held_out_captions(count: int, style: str, seed: int = SEED + 1) -> list[tuple[str, tuple[str, str, str]]]:
    """Captions that name kind, pattern and accessory of one thing, each with these three."""
    rng, result = random.Random(seed), []
    phrase = "a drawing of" if style == "drawing" else scenes.STYLES[style].phrase
    for _ in range(count):
        thing = replace(scenes.random_thing(rng, unseen=True), names={})
        pattern = "" if thing.pattern == "plain" else f"{thing.pattern} "
        worn = "" if thing.accessory == "none" else f" wearing {scenes.article(thing.accessory)}"
        noun = scenes.article(f"{pattern}{thing.kind}")
        result.append((f"{phrase} {noun}{worn}", (thing.kind, thing.pattern, thing.accessory)))
    return result


def accuracy(model: PartsClassifier, pictures: Tensor,
             truths: list[tuple[str, str, str]]) -> dict[str, float]:
    """Shares of pictures `[N, 3, 64, 64]` whose kind, pattern and accessory are read correctly."""
    read = model.read(pictures)
    return {name: sum(r[i] == t[i] for r, t in zip(read, truths, strict=True)) / len(truths)
            for i, name in enumerate(("kind", "pattern", "accessory"))}
