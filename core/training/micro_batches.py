"""Splits a training batch into micro-batches, for several processes or to save memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..data.batch import Batch
from ..methods.base import Method
from .config import TrainingConfig
from .objective import Draw, draw
from .process_group import ProcessGroup


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass. weight: their share of the batch's loss."""

    batch: Batch
    drawn: Draw
    weight: float = 1.0


def micro_batches(batch: Batch, method: Method, config: TrainingConfig, timesteps: int,
                  generator: torch.Generator, group: ProcessGroup, size: int = 0) -> Iterator[MicroBatch]:
    """Yields the micro-batches of a batch that this process evaluates.

    Noise and dropped captions are drawn for the whole batch, so the gradient does not depend on how it is
    split. Captions are dropped before `method.on_batch`, and its result is not changed afterwards. Samples
    that a method appends (replay) get newly drawn noise.

    Args:
        batch: The whole batch, `B` rows.
        method: Its `on_batch` gets every micro-batch once.
        config: `caption_dropout` and `noise_offset` are used.
        timesteps: Number of timesteps of the noise schedule.
        generator: Draws all random numbers; it has the same state in every process.
        group: The processes that share the batch.
        size: Rows per micro-batch, 0 = all rows of this process.
    """
    count = len(batch)
    if group.size == 1 and not 0 < size < count and config.caption_dropout == 0:
        batch = method.next_batch(batch)      # so that noise of appended rows is drawn in the same order
        yield MicroBatch(batch, draw(batch, timesteps, config, generator))
        return
    rows = group.share(count)
    drawn = draw(batch, timesteps, config, generator)
    batch = drop_captions(batch, config.caption_dropout, generator)
    for chosen in rows.split(size or len(rows)):
        part = method.next_batch(batch.rows(chosen))
        part_draw = Draw(drawn.timesteps[chosen.to(drawn.timesteps.device)],
                         drawn.noise[chosen.to(drawn.noise.device)])
        part_draw = _extended(part_draw, part, timesteps, config, generator)
        yield MicroBatch(part, part_draw, len(chosen) / len(rows))


def drop_captions(batch: Batch, share: float, generator: torch.Generator) -> Batch:
    """Empties each caption with probability `share`, which trains the unconditional prediction as well."""
    if share == 0:
        return batch
    drop = torch.rand(len(batch), generator=generator) < share
    pairs = zip(drop.tolist(), batch.prompts, strict=True)
    return replace(batch, prompts=tuple("" if dropped else prompt for dropped, prompt in pairs))


def _extended(drawn: Draw, batch: Batch, timesteps: int, config: TrainingConfig,
              generator: torch.Generator) -> Draw:
    """Extends a draw to a batch with appended rows, by drawing their timesteps and noise."""
    count = len(drawn.timesteps)
    if len(batch) == count:
        return drawn
    added = draw(batch.rows(torch.arange(count, len(batch))), timesteps, config, generator)
    return Draw(torch.cat([drawn.timesteps, added.timesteps]), torch.cat([drawn.noise, added.noise]))
