"""Plans the memory of a run before its first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..conditioning.encoding import TextMemory
from ..model.activations import Activations, activations_of
from ..model.context import Context
from .memory_plan import COPIES, LEAST, Measures, MemoryPlan, planned
from .objective import denoising_loss, draw, predict
from .record import brief
from .trainer import Trainer

# What the code of a host or a method raises without numbers. A host's cancellation is none of them.
_FAILURES = RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError
_DRAWN = 8      # batches of which the largest counts, because photos in buckets have several sizes


def plan_aloud(trainer: Trainer, say: Callable[[str], object]) -> None:
    """Plans the memory of a run and says it in one line; nothing for small models. Call it inside `session`.

    A plan that fails does not end the run.
    """
    if trainer.is_done or trainer.task.backbone.loaded_weights(True)[0] < LEAST:
        return
    try:
        line = plan(trainer).line()
    except _FAILURES as error:
        line = f"memory: not known for this model ({type(error).__name__}: {brief(str(error))})"
    if trainer.group.is_first:
        say(line)


def plan(trainer: Trainer) -> MemoryPlan:
    """Plans the memory of a run, and takes the measures of the plan. Call it inside `session`.

    Further terms of a method's loss, and pictures that a method replays, do not count.

    Raises:
        Exception: What `activations_of` raises. The measures stay those of the settings.
    """
    backbone, reads_text, asked = trainer.task.backbone, _reads_text(trainer), trainer.measures
    concept, activations = concept_bytes(trainer), activation_bytes(trainer)
    free, can_offload = backbone.free_memory(reads_text), backbone.can_offload and trainer.group.size == 1
    measures = planned(asked, trainer.rows, free, concept, activations, can_offload)
    found = MemoryPlan(*backbone.loaded_weights(reads_text), concept, activations(measures),
                       activations(asked), free, measures, reads_text)
    trainer.take(measures, found.concept + found.activations)
    return found


def concept_bytes(trainer: Trainer) -> int:
    """Bytes of what is learned, with its gradients and the optimiser's states."""
    return COPIES * sum(p.numel() * p.element_size() for p in trainer.parameters)


def activation_bytes(trainer: Trainer) -> Callable[[Measures], int]:
    """The most that forward and backward pass take with some measures, in bytes."""
    traced: dict[int, Activations] = {}

    def found(measures: Measures) -> int:
        rows = measures.rows or trainer.rows
        if rows not in traced:
            traced[rows] = activations_of(*_passes(trainer, rows),
                                          trainer.task.backbone.gradient_checkpointing)
        return traced[rows].bytes(measures.checkpointing)

    return found


def _reads_text(trainer: Trainer) -> bool:
    """Whether words are trained in front of the text encoder. Otherwise it runs once per caption."""
    return any(vectors.requires_grad for vectors in trainer.method.token_group().vectors.values())


def _passes(trainer: Trainer, rows: int) -> tuple[Callable[[], Context], Callable[[Context], Tensor]]:
    """What encodes the captions of a batch with this number of rows, and the rest of the forward pass up to
    the loss."""
    generator = torch.Generator().manual_seed(trainer.config.seed)
    config, backbone = trainer.config, trainer.task.backbone
    batches = [trainer.data.draw(config.batch_size, config.prior_weight, generator) for _ in range(_DRAWN)]
    batch = max(batches, key=lambda batch: batch.latents[0].numel())
    batch = batch.rows(torch.arange(min(rows, len(batch))))
    drawn = draw(batch, len(backbone.schedule), config, generator)

    def encode() -> Context:
        with trainer.autocast():
            # states of captions stay for the first step, unless words are trained
            return trainer.context(batch, TextMemory() if _reads_text(trainer) else None)

    def forward(context: Context) -> Tensor:
        with trainer.autocast():
            seen = predict(backbone, batch, context, drawn, trainer.method.processor())
            return denoising_loss(backbone, seen, config)

    return encode, forward
