"""Runs the training of one concept: steps, evaluations, checkpoints and interruptions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from ..data.training_set import TrainingData
from ..errors import ConceptError, WriteError
from ..files import check_output
from ..methods.base import Method, Task
from . import checkpoint
from .config import TrainingConfig
from .early_stopping import Evaluator
from .optimizers import averaged
from .planning import plan_aloud
from .process_group import ONE_PROCESS, ProcessGroup
from .record import Learned, conclude
from .trainer import StepInfo, Trainer

Callback = Callable[[StepInfo], None]


@torch.inference_mode(False)      # ComfyUI runs nodes in inference mode, whose tensors cannot be trained
def learn(task: Task, method: Method, data: TrainingData, config: TrainingConfig,
          callback: Callback | None = None, checkpoint_file: Path | None = None, thumbnail: bytes = b"",
          group: ProcessGroup = ONE_PROCESS, evaluator: Evaluator | None = None,
          keep: Collection[int] = (), say: Callable[[str], object] | None = None) -> Learned:
    """Learns one concept, or goes on with `task.refined`'s. The given base and bank do not change.

    Args:
        task: The concept to learn, with base and bank.
        method: A new instance for this task.
        data: The encoded pictures.
        config: Settings of the run.
        callback: Called after every step. An exception from it ends the run.
        checkpoint_file: If the file exists, training resumes exactly. The state is saved every
            `checkpoint_every` steps, on interruption, and at the end. If that fails, learning
            continues with a warning, and an interruption names another file with the state. The caller
            deletes the file once the bank is on disk, so that a crash cannot lose the concept. A
            ConceptError, or an interruption during an update, keeps the previous checkpoint.
        thumbnail: Small picture of the concept, as JPEG or PNG bytes.
        group: The processes that train together. All of them read the checkpoint; the first one writes it.
        evaluator: Scores the concept for early stopping; required if `patience` is set.
        keep: Steps after which the state of the concept is kept. This does not change what is learned.
        say: Gets one line if training resumes, one with the memory plan before the first step, and one
            whenever memory runs out and a further measure is taken. Without it there is no plan, and such a
            measure is a warning.

    Returns:
        The concept, the bank that holds it, and the loss of every step.

    Raises:
        ConceptError: The bank already has the name, settings or checkpoint do not fit, the checkpoint cannot
            be written, or training diverges.
    """
    if config.patience and (evaluator is None or group.size > 1):
        reason = "there is no evaluator" if evaluator is None else f"{group.size} processes learn together"
        raise ConceptError(f"setting 'patience' is {config.patience}; allowed: 0 where {reason}")
    if task.name in task.bank:
        raise ConceptError(f"the bank already holds a concept '{task.name}'; choose another name or remove "
                           "it first")
    task.bank.check_fits(task.backbone.layout)
    config.check_schedule(task.backbone.schedule)
    if checkpoint_file is not None and group.is_first:
        check_output(checkpoint_file, "checkpoint")
    trainer = Trainer(task, method, data, config, group, keep, say or warnings.warn)
    if checkpoint_file is not None and Path(checkpoint_file).exists():
        trainer.restore(checkpoint_file)
        if say is not None and group.is_first:
            say("all steps were already done; nothing was trained now" if trainer.is_done
                else f"resumed at step {len(trainer.losses)}")
    group.wait()      # all have read the checkpoint before the first process overwrites it
    if not group.is_first:
        checkpoint_file = callback = None
    try:
        with trainer.session():
            if say is not None:
                plan_aloud(trainer, say)
            trainer.evaluate(evaluator)
            while not trainer.is_done:
                info = trainer.step()
                trainer.evaluate(evaluator)
                is_due = config.checkpoint_every and info.step % config.checkpoint_every == 0
                if checkpoint_file is not None and is_due:
                    _save(checkpoint_file, trainer)
                if callback is not None:
                    callback(info)
    except BaseException as error:      # the host cancels with a BaseException: save, then re-raise
        is_resumable = trainer.losses and not trainer.is_updating and not isinstance(error, ConceptError)
        if checkpoint_file is not None and is_resumable:
            checkpoint.save_somewhere(checkpoint_file, trainer.state())
        raise
    if checkpoint_file is not None:
        _save(checkpoint_file, trainer)
    with averaged(trainer.optimizer):
        return conclude(trainer.task, method, data, config, trainer.losses, trainer.seconds,
                        thumbnail, trainer.kept)


def _save(file: Path, trainer: Trainer) -> None:
    """Saves the state. A full disk must not end the run, because what is learned is in memory."""
    try:
        checkpoint.save(file, trainer.state())
    except WriteError as error:
        warnings.warn(f"the checkpoint of the run was not written: {error}", stacklevel=2)
