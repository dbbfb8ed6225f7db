"""Learning one concept from start to end: steps, evaluations, checkpoints, interruptions."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..data.training_set import TrainingData
from ..errors import ConceptError
from ..methods.base import Method, Task
from . import checkpoint
from .config import TrainingConfig
from .early_stopping import Evaluator
from .process_group import ONE_PROCESS, ProcessGroup
from .record import Learned, conclude
from .trainer import StepInfo, Trainer

Callback = Callable[[StepInfo], None]


@torch.inference_mode(False)      # ComfyUI runs nodes in inference mode, whose tensors cannot be trained
def learn(task: Task, method: Method, data: TrainingData, config: TrainingConfig,
          callback: Callback | None = None, checkpoint_file: Path | None = None, thumbnail: bytes = b"",
          group: ProcessGroup = ONE_PROCESS, evaluator: Evaluator | None = None) -> Learned:
    """Learns one concept. The base and the bank that came in stay as they are.

    Args:
        task: what to learn, on which base and bank.
        method: a fresh instance; it serves one task.
        data: the pictures, encoded.
        config: settings of the run.
        callback: called after every step. An exception from it ends the run.
        checkpoint_file: an existing file is resumed exactly. The state is saved every `checkpoint_every`
            steps, when the run is interrupted, and at the end. The caller deletes the file once the bank is
            on disk, so that nothing learned exists in memory only. After a ConceptError, or in the middle of
            an update, the previous save stays.
        thumbnail: small picture of the concept, encoded.
        group: the processes that learn together. All of them read the checkpoint; the first one writes it.
        evaluator: scores the concept for early stopping; needed where `patience` is set.

    Returns:
        The concept, the bank that holds it, and the loss of every step.

    Raises:
        ConceptError: for a name that the bank holds, unfit settings or checkpoints, and numbers that diverge.
    """
    if config.patience and (evaluator is None or group.size > 1):
        reason = "there is no evaluator" if evaluator is None else f"{group.size} processes learn together"
        raise ConceptError(f"setting 'patience' is {config.patience}; allowed: 0 where {reason}")
    if task.name in task.bank:
        raise ConceptError(f"the bank already holds a concept '{task.name}'; choose another name or remove "
                           "it first")
    task.bank.check_fits(task.backbone.layout)
    trainer, began = Trainer(task, method, data, config, group), time.perf_counter()
    if checkpoint_file is not None and Path(checkpoint_file).exists():
        trainer.restore(checkpoint_file)
    group.wait()      # all have read the checkpoint before the first process overwrites it
    if not group.is_first:
        checkpoint_file = callback = None
    try:
        with trainer.session():
            trainer.evaluate(evaluator)
            while not trainer.is_done:
                info = trainer.step()
                trainer.evaluate(evaluator)
                is_due = config.checkpoint_every and info.step % config.checkpoint_every == 0
                if checkpoint_file is not None and is_due:
                    checkpoint.save(checkpoint_file, trainer.state())
                if callback is not None:
                    callback(info)
    except BaseException as error:      # a host's cancel is a BaseException: save, then pass it on
        is_resumable = trainer.losses and not trainer.is_updating and not isinstance(error, ConceptError)
        if checkpoint_file is not None and is_resumable:
            checkpoint.save(checkpoint_file, trainer.state())
        raise
    if checkpoint_file is not None:
        checkpoint.save(checkpoint_file, trainer.state())
    seconds = time.perf_counter() - began
    return conclude(trainer.task, method, data, config, trainer.losses, seconds, thumbnail)
