"""The trainer: state and steps of one run. It uses a method only through its hooks."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.concepts import Concept, ConceptInfo
from ..bank.prompts import Vocabulary
from ..bank.tokens import TokenGroup
from ..conditioning.encoding import TextMemory, encode_prompts
from ..conditioning.routing import learning_deltas, learning_names
from ..data.batch import Batch
from ..data.training_set import TrainingData
from ..errors import ConceptError
from ..methods.base import Method, Task
from ..methods.check_base import check_base
from ..model.context import Context
from ..model.deltas import pack, unpack
from . import checkpoint
from .config import PRECISIONS, TrainingConfig
from .early_stopping import Evaluator, has_stalled
from .memory import lacks_memory, retained_between_steps
from .memory_plan import Measures
from .micro_batches import MicroBatch, micro_batches
from .objective import denoising_loss, predict
from .optimizers import averaged, make_optimizer
from .process_group import ONE_PROCESS, ProcessGroup
from .record import brief, check_same_run, run_identity
from .refinement import Before


@dataclass(frozen=True)
class StepInfo:
    """What a callback receives after each optimiser step.

    Attributes:
        step, total: Completed and planned steps.
        loss: The denoising loss without the method's terms.
        terms: The method's penalties by name, as added to the loss.
        lr: Learning rate of the last parameter group.
        grad_norm: Norm of all gradients before clipping.
        snapshot: Builds a bank with the current state of the concept, for sampling in the callback.
        monitors: Figures of the method, see Method.monitors.
    """

    step: int
    total: int
    loss: float
    terms: Mapping[str, float]
    lr: float
    grad_norm: float
    snapshot: Callable[[], ConceptBank]
    monitors: Mapping[str, float]


def lr_factor(config: TrainingConfig) -> Callable[[int], float]:
    """The learning-rate schedule: step number -> factor on the learning rates."""
    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        share = (step - config.warmup) / max(1, config.steps - config.warmup)
        return {"constant": 1.0, "linear": 1.0 - share,
                "cosine": 0.5 * (1 + math.cos(math.pi * share))}[config.schedule]

    return factor


class Trainer:
    """One training run. `state` is the content of a checkpoint. Call `step` inside `session`."""

    def __init__(self, task: Task, method: Method, data: TrainingData, config: TrainingConfig,
                 group: ProcessGroup = ONE_PROCESS, keep: Collection[int] = (),
                 say: Callable[[str], object] = warnings.warn) -> None:
        if keep and type(method).shared_state is not Method.shared_state:
            raise ConceptError(f"method '{method.name}' passes a state to later concepts, so earlier states "
                               "of a concept cannot be kept; keep none")
        if group.size > 1 and method.learns_alone:
            raise ConceptError(f"method '{method.name}' depends on its own gradients or replays, which would "
                               f"differ between {group.size} processes; start it in one")
        check_base(method, task)
        task = task.worded(method.words_of_kind(task.kind))
        self.task, self.method, self.data, self.config, self.group = task, method, data, config, group
        self.say = say      # told when memory runs out
        self.measures = Measures(config.gradient_checkpointing)
        method.begin(task)
        if task.start is not None:
            method.start_from(task.start)
        self.before = Before(task, method) if task.refined is not None and bool(data.is_prior.any()) else None
        method.on_data(data)
        self.groups = method.parameter_groups()
        self.optimizer = make_optimizer(config.optimizer, self.groups, config.weight_decay,
                                        type(method).after_step is not Method.after_step)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_factor(config))
        device = task.backbone.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=config.precision == "float16" and device == "cuda")
        self.generator = torch.Generator().manual_seed(config.seed)
        self.info = ConceptInfo(task.name, task.class_noun, method.name, task.word_names, task.kind)
        self.vocabulary = Vocabulary([*task.bank.infos.values(), self.info])
        captions = [caption for caption, is_prior in zip(data.captions, data.is_prior.tolist(), strict=True)
                    if not is_prior]      # replayed pictures name the concept, too
        if not any(task.name in self.vocabulary.parse_caption(caption).concepts for caption in captions):
            raise ConceptError(f"no caption of concept '{task.name}' names it; write <{task.name}> where it "
                               "is in the picture, or give no captions")
        self.memory = TextMemory()
        self.earlier, self.began = 0.0, time.perf_counter()      # seconds of a run before it was resumed
        self.losses: list[float] = []
        self.scores: list[float] = []      # of the evaluations so far
        self.keep, self.kept = frozenset(keep), dict[int, Concept]()      # steps; step -> state
        self._before: Tensor | None = None      # generator state at the start of the current step
        # True while a step changes weights; the state must not be saved then
        self.is_updating = False

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.groups for p in group["params"]]

    @contextmanager
    def session(self) -> Iterator[None]:
        """Prepares the base for steps: folds in always-on concepts, enables gradients."""
        backbone, method = self.task.backbone, self.method
        with (torch.enable_grad(), retained_between_steps(backbone.device),
              backbone.folded(learning_deltas(self.task.bank, method.name, method.builds_on_sum))):
            yield

    @property
    def rows(self) -> int:
        """Pictures of a whole batch in this process."""
        count = self.config.batch_size * (2 if bool(self.data.is_prior.any()) else 1)
        return len(self.group.share(count))

    def take(self, measures: Measures, size: int = 0) -> None:
        """Takes measures. size: bytes that a step takes beside the weights; 0 = unknown."""
        self.measures = measures
        self.task.backbone.make_room(size, measures.offloads)

    @property
    def seconds(self) -> float:
        """How long the run has taken, with all of its parts."""
        return self.earlier + time.perf_counter() - self.began

    def state(self) -> dict:
        """The content of a checkpoint."""
        return {"identity": self.identity(), "modules": dict(self.method.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": {"last_epoch": self.scheduler.last_epoch},
                "scaler": self.scaler.state_dict(),
                "generator": self.generator.get_state() if self._before is None else self._before,
                "losses": list(self.losses), "scores": list(self.scores),
                "seconds": self.seconds,
                # a resumed run adds up gradients in the same order
                **({"rows": self.measures.rows} if self.measures.rows else {}),
                **({"kept": self._packed()} if self.kept else {})}

    def _packed(self) -> dict:
        """The kept states as tensors and JSON values."""
        states = {}
        for step, concept in self.kept.items():
            tensors, notes = pack(concept.deltas, self.task.backbone.layout)
            states[step] = {"deltas": tensors, "notes": notes, "vectors": dict(concept.tokens.vectors),
                            "noun": concept.tokens.placeholder_noun}
        return states

    def _unpacked(self, states: dict) -> dict[int, Concept]:
        layout, info = self.task.backbone.layout, self.snapshot_info()
        return {step: Concept(info, TokenGroup(info.words, state["vectors"], state["noun"]),
                              unpack(state["deltas"], state["notes"], layout))
                for step, state in states.items() if step in self.keep}

    def identity(self) -> dict:
        return run_identity(self.task, self.method, self.data, self.config)

    def restore(self, path: Path) -> None:
        """Restores a checkpoint of this run. Raises ConceptError for any other file."""
        state = checkpoint.load(path)
        check_same_run(path, state.get("identity", {}), self.identity())
        try:
            self._load(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {brief(error)}"
            raise ConceptError(f"the checkpoint '{path}' is damaged ({reason}); delete it to start "
                               "again") from error
        missing = sorted(step for step in self.keep if step <= len(self.losses) and step not in self.kept)
        if missing and not self.is_done:
            self.say(f"the run began without keeping states of steps {', '.join(map(str, missing))}, so they "
                     "are not among those that are compared")

    def _load(self, state: dict) -> None:
        self.method.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        self.losses, self.scores = list(state["losses"]), list(state["scores"])
        self.kept, self.earlier = self._unpacked(state.get("kept", {})), float(state.get("seconds", 0.0))
        self.measures = replace(self.measures, rows=int(state.get("rows", 0)))
        self.method.steps = len(self.losses)
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def is_done(self) -> bool:
        return len(self.losses) >= self.config.steps or has_stalled(self.scores, self.config.patience)

    def snapshot(self) -> ConceptBank:
        """The bank with the current state of the concept.

        Always-on concepts are left out, because their deltas are folded into the weights during training.
        """
        with averaged(self.optimizer):
            outcome = self.method.finish()
        bank = self.task.bank
        for name in learning_names(bank, self.method.name, self.method.builds_on_sum):
            bank = bank.remove(name)
        return bank.add(Concept(self.snapshot_info(), outcome.tokens, outcome.deltas))

    def snapshot_info(self) -> ConceptInfo:
        return replace(self.info, composition=self.method.composition_of_kind(self.task.kind))

    def evaluate(self, evaluator: Evaluator | None) -> None:
        """Scores the concept when an evaluation is due. An interrupted evaluation is repeated."""
        config = self.config
        if evaluator is None or not config.patience:
            return
        if len(self.losses) // config.look_every > len(self.scores):
            self.scores.append(float(evaluator(self.snapshot(), len(self.losses))))

    def step(self) -> StepInfo:
        """Makes one optimiser step. If memory runs out, it restarts the step with smaller micro-batches."""
        self._before = self.generator.get_state()
        while True:
            self.method.begin_step()
            try:
                with self.task.backbone.gradient_checkpointing(self.measures.checkpointing):
                    total, terms = self._gradients()
                break
            except (MemoryError, RuntimeError) as error:
                if not lacks_memory(error):
                    raise
                # without the frames, which hold the step's tensors
                self._step_down(error.with_traceback(None))
        self.group.average_gradients(self.parameters)
        total = self.group.mean(total)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        if not self.scaler.is_enabled():      # the gradient scaler skips such steps
            self._refuse_nan(norm, "gradient")
        lr = self.optimizer.param_groups[-1]["lr"]
        self._update(total)
        if len(self.losses) in self.keep:
            self.kept[len(self.losses)] = self.snapshot()[self.task.name]
        return StepInfo(len(self.losses), self.config.steps, total, terms, lr, float(norm), self.snapshot,
                        self.method.monitors())

    def _step_down(self, error: Exception) -> None:
        """Takes a further measure and goes back to the begin of the step. Raises ConceptError if no measure
        is left, or with several processes.
        """
        rows = self.measures.rows or self.rows
        further = self.measures.next(self.rows, self.task.backbone.can_offload)
        if further is None or self.group.size > 1:
            taken = self.measures.describe()
            raise ConceptError(f"memory ran out at step {len(self.losses) + 1} of concept '{self.task.name}' "
                               f"with {rows} pictures of {self.config.resolution} pixels at once"
                               f"{f' and {taken}' if taken else ''}; lower resolution or batch_size; the "
                               "bank is unchanged") from error
        self.optimizer.zero_grad(set_to_none=True)
        assert self._before is not None
        self.generator.set_state(self._before)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.take(further)
        self.say(f"memory ran out at step {len(self.losses) + 1}; learning continues with "
                 f"{further.describe()}")

    def _gradients(self) -> tuple[float, dict[str, float]]:
        """Accumulates the gradients of a step. Returns the mean denoising loss and the mean terms."""
        config, total = self.config, 0.0
        terms: dict[str, float] = {}
        timesteps = len(self.task.backbone.schedule)
        for _ in range(config.accumulation):
            batch = self.data.draw(config.batch_size, config.prior_weight, self.generator)
            batch = batch if self.before is None else self.before.weighted(batch, self.vocabulary)
            for micro_batch in micro_batches(batch, self.method, config, timesteps, self.generator,
                                             self.group, self.measures.rows):
                share = micro_batch.weight / config.accumulation
                loss, penalties = self._backward(micro_batch, share)
                total += share * loss
                for name, value in penalties.items():
                    terms[name] = terms.get(name, 0.0) + share * value
        return total, terms

    def _backward(self, micro_batch: MicroBatch, share: float) -> tuple[float, dict[str, float]]:
        """Accumulates the gradients of one micro-batch. Returns its denoising loss and the method's terms."""
        config, backbone, batch = self.config, self.task.backbone, micro_batch.batch
        with self.autocast():
            context = self.context(batch)
            seen = predict(backbone, batch, context, micro_batch.drawn, self.method.processor(),
                           PRECISIONS[config.precision])
            seen = seen if self.before is None else self.before.taught(seen, self.vocabulary)
            loss = denoising_loss(backbone, seen, config)
        penalties = self.method.penalty(seen)
        whole = loss + sum(penalties.values())
        self._refuse_nan(whole, "loss")
        if whole.requires_grad:      # no gradient if no prompt of the batch names a word-bound concept
            self.scaler.scale(whole * share).backward()
        return loss.item(), {name: value.item() for name, value in penalties.items()}

    def autocast(self) -> AbstractContextManager:
        dtype = PRECISIONS[self.config.precision]
        return nullcontext() if dtype is None else torch.autocast(self.task.backbone.device.type, dtype)

    def context(self, batch: Batch, memory: TextMemory | None = None) -> Context:
        """Encodes the prompts of a batch. memory: cache of texts; None = that of the run."""
        prompts = [self.vocabulary.parse_caption(prompt) for prompt in batch.prompts]
        older = {name for prompt in prompts for name in prompt.concepts} - {self.task.name}
        tokens = self.task.bank.token_groups(older) | {self.task.name: self.method.token_group()}
        return encode_prompts(self.task.backbone, prompts, tokens, memory=memory or self.memory)

    def _update(self, loss: float) -> None:
        self.is_updating = True
        try:
            self.scaler.step(self.optimizer)
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            self._refuse_nan(torch.tensor(torch.inf), "size of the step")
        self.scaler.update()
        norms = torch._foreach_norm([p.detach() for p in self.parameters])
        self._refuse_nan(torch.stack(norms).max(), "norm of the weights")
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.losses.append(loss)
        self.method.end_step()
        self.method.after_step(len(self.losses))
        self._before, self.is_updating = None, False

    def _refuse_nan(self, value: Tensor, what: str) -> None:
        if not torch.isfinite(value):
            raise ConceptError(f"the {what} became {value.item()} at step {len(self.losses) + 1} of concept "
                               f"'{self.task.name}'; lower the learning rates (lr, token_lr) or use "
                               "precision float32; the bank is unchanged")
