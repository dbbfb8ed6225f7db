"""A batch as the passes that a process makes of it: whole, its share among several processes, or in pieces where memory is short."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data.batch import Batch
from ..methods.base import Method
from .config import TrainingConfig
from .objective import Draw, draw
from .process_group import Team

OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


@dataclass(frozen=True)
class Pass:
    """weight: its part in the step's loss; the passes' weights add up to 1."""

    batch: Batch
    drawn: Draw
    weight: float = 1.0


def passes(batch: Batch, method: Method, config: TrainingConfig, timesteps: int, generator: torch.Generator, team: Team,
           piece: int = 0) -> Iterator[Pass]:
    """What is to be passed forward for a drawn batch. piece: rows per pass, 0 = all at once.

    Noise and dropped captions are drawn for the whole batch, whoever passes which rows: the sum is the same. What a method adds to a pass
    (replay) is drawn behind that.
    """
    count = len(batch.prompts)
    rows = team.share(count)
    if team.size == 1 and not 0 < piece < count:
        batch = method.on_batch(batch)
        drawn = draw(batch, timesteps, config, generator)
        yield Pass(_dropped(batch, config, generator), drawn)
        return
    drawn = draw(batch, timesteps, config, generator)
    batch = _dropped(batch, config, generator)
    for some in rows.split(piece or len(rows)):
        part = method.on_batch(_rows(batch, some))
        own = Draw(drawn.timesteps[some.to(drawn.timesteps.device)], drawn.noise[some.to(drawn.noise.device)])
        yield Pass(part, _longer(own, part, timesteps, config, generator), len(some) / len(rows))


def _rows(batch: Batch, rows: Tensor) -> Batch:
    def pick(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)]

    return Batch(pick(batch.latents), tuple(batch.prompts[i] for i in rows.tolist()), pick(batch.masks), pick(batch.is_prior),
                 pick(batch.weights))


def _longer(drawn: Draw, batch: Batch, timesteps: int, config: TrainingConfig, generator: torch.Generator) -> Draw:
    """Also for the rows that a method has added behind."""
    known = len(drawn.timesteps)
    if len(batch.prompts) == known:
        return drawn
    more = draw(_rows(batch, torch.arange(known, len(batch.prompts))), timesteps, config, generator)
    return Draw(torch.cat([drawn.timesteps, more.timesteps]), torch.cat([drawn.noise, more.noise]))


def _dropped(batch: Batch, config: TrainingConfig, generator: torch.Generator) -> Batch:
    """Some captions are empty: what the model draws without any is learned on too."""
    if config.caption_dropout == 0:
        return batch
    drop = torch.rand(len(batch.prompts), generator=generator) < config.caption_dropout
    return replace(batch, prompts=tuple("" if dropped else p for dropped, p in zip(drop.tolist(), batch.prompts, strict=True)))
