"""Pretraining pictures in shards on disk: rendered once, read by every stage.

Beside the five named styles, the shards hold drawings in random colours of paper and line. Their captions say
"a drawing of ..." and name no colour. A base that has seen many styles can learn a further one, as a style
concept, without learning outlines anew.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...core.demo import scenes
from ...core.demo.render import Style, render

SHARD = 2000
CAPTIONS_PER_PICTURE = 3
DRAWING_SHARE = 0.12
CONTRAST = 160  # smallest sum of the RGB differences of paper and line


@dataclass(frozen=True)
class Shard:
    """Pictures `[SHARD, size, size, 3]` uint8 and their captions, `CAPTIONS_PER_PICTURE` for each."""

    pictures: np.ndarray
    captions: list[list[str]]


def random_drawing(rng: random.Random) -> Style:
    """Draws a random style: paper, line, and the share of the things' colours over the paper."""

    def colour() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    paper, line = colour(), colour()
    while sum(abs(a - b) for a, b in zip(paper, line, strict=True)) < CONTRAST:
        line = colour()
    fill = 0.0 if rng.random() < 0.5 else rng.uniform(0.1, 0.9)
    return Style("drawing", "a drawing of", paper=paper, line=line, fill=fill)


def random_pair(rng: random.Random, size: int) -> tuple[np.ndarray, list[str]]:
    """Draws one picture `[size, size, 3]` uint8 and its captions."""
    style = random_drawing(rng) if rng.random() < DRAWING_SHARE else None
    scene = scenes.random_scene(rng, style=style)
    captions = [scenes.caption(scene, rng) for _ in range(CAPTIONS_PER_PICTURE)]
    return render(scene, size, supersampling=3 if size <= 64 else 2), captions


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"pictures_{number:03d}.npz", folder / f"captions_{number:03d}.json"


def render_shard(folder: Path, number: int, size: int) -> None:
    """Writes shard `number` unless it exists; the same arguments give the same pictures."""
    target, texts = _paths(folder, number)
    if target.exists():
        return
    rng = random.Random(1_000_003 * (number + 1))
    pairs = [random_pair(rng, size) for _ in range(SHARD)]
    texts.write_text(json.dumps([captions for _, captions in pairs]), encoding="utf-8")
    partial = target.with_suffix(".partial.npz")
    np.savez_compressed(partial, pictures=np.stack([picture for picture, _ in pairs]))
    partial.rename(target)


def load_shard(folder: Path, number: int) -> Shard:
    """Reads one finished shard."""
    target, texts = _paths(folder, number)
    with np.load(target) as stored:
        return Shard(stored["pictures"], json.loads(texts.read_text(encoding="utf-8")))
