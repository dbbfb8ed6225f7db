"""The training data of both diffusion models: latents of every picture, captions as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...core.demo import vocabulary
from ...core.demo.bases import TOKENIZER
from .diffusion import CAPTION_DROPOUT, tokenize
from .pictures import load_shard


def write_ids(pictures: Path, latents: Path, numbers: list[int]) -> None:
    """Writes the token ids of every shard that has none yet."""
    tokenizer = vocabulary.load(TOKENIZER)
    for number in numbers:
        target = latents / f"ids_{number:03d}.npy"
        if not target.exists():
            np.save(target, tokenize(tokenizer, load_shard(pictures, number).captions).numpy())


@dataclass(frozen=True)
class LatentSet:
    """Latents of all pictures, and the token ids of their captions.

    Attributes:
        latents: `[N, C, h, w]` fp16.
        ids: `[N, captions per picture, tokens]` int16.
        empty: `[tokens]`, ids of the empty prompt.
    """

    latents: Tensor
    ids: Tensor
    empty: Tensor

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random latents `[batch, C, h, w]` float32 and token ids `[batch, tokens]` of one caption each."""
        index = torch.randint(len(self.latents), (batch,), generator=generator)
        chosen = torch.randint(self.ids.shape[1], (batch,), generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < CAPTION_DROPOUT
        return self.latents[index].float(), torch.where(dropped, self.empty, self.ids[index, chosen]).long()


def finished_shards(folder: Path) -> list[int]:
    """Numbers of the shards whose latents exist."""
    return sorted(int(file.stem.split("_")[1]) for file in folder.glob("latents_*.npy")
                  if "partial" not in file.name)


def load(folder: Path, numbers: list[int] | None = None) -> LatentSet:
    """Reads the latents and ids of the given shards, by default of all that are finished."""
    numbers = finished_shards(folder) if numbers is None else numbers
    latents = np.concatenate([np.load(folder / f"latents_{number:03d}.npy") for number in numbers])
    ids = np.concatenate([np.load(folder / f"ids_{number:03d}.npy") for number in numbers])
    empty = tokenize(vocabulary.load(TOKENIZER), [[""]])[0, 0]
    return LatentSet(torch.from_numpy(latents), torch.from_numpy(ids), empty)
