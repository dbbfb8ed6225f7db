"""Pretraining pictures in shards on disk, rendered once and read by all stages."""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...core.demo import scenes

SHARD = 2000
CAPTIONS_PER_PICTURE = 3


def render_shard(folder: Path, number: int) -> None:
    """Writes pictures `[SHARD, 64, 64, 3]` uint8 and their captions; a finished shard is kept."""
    target = folder / f"pictures_{number:03d}.npy"
    if target.exists():
        return
    rng, pictures, captions = random.Random(1_000_003 * (number + 1)), [], []
    for _ in range(SHARD):
        scene = scenes.random_scene(rng)
        pictures.append(scenes.render(scene))
        captions.append([scenes.caption(scene, rng) for _ in range(CAPTIONS_PER_PICTURE)])
    (folder / f"captions_{number:03d}.json").write_text(json.dumps(captions))
    partial = target.with_suffix(".partial.npy")
    np.save(partial, np.stack(pictures))
    partial.rename(target)


def render_all(folder: Path, shards: int, workers: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(render_shard, [folder] * shards, range(shards)))


def load_pictures(folder: Path, shards: int) -> tuple[np.ndarray, list[list[str]]]:
    pictures = np.concatenate([np.load(folder / f"pictures_{i:03d}.npy") for i in range(shards)])
    captions = [c for i in range(shards) for c in json.loads((folder / f"captions_{i:03d}.json").read_text())]
    return pictures, captions


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 `[B, H, W, 3]` to float `[B, 3, H, W]` in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
