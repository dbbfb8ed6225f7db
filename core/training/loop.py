"""The one training loop. It calls the method's hooks and nothing else of it."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.concepts import Concept, ConceptInfo
from ..bank.prompts import Vocabulary, named_concepts
from ..conditioning.encoding import TextMemory, encode_prompts
from ..conditioning.routing import learning_deltas, learning_names
from ..data.batch import Batch
from ..data.photos import TrainingSet
from ..errors import ConceptError
from ..methods.base import Method, Task
from ..model.backbone import Context
from . import checkpoint
from .config import PRECISIONS, TrainingConfig, optimizer_class
from .early_stopping import Judge, has_stalled
from .memory import kept_between_steps
from .micro_batches import OUT_OF_MEMORY, Pass, passes
from .objective import denoising_loss, predict
from .process_group import ALONE, Team
from .record import Learned, brief, conclude, run_identity


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after each optimiser step. loss: the denoising part; terms: the method's penalties, as added;
    snapshot: makes a bank to sample from inside the callback, with the concept as it is now; monitors: the method's own figures."""

    step: int
    total: int
    loss: float
    terms: Mapping[str, float]
    lr: float
    grad_norm: float
    snapshot: Callable[[], ConceptBank]
    monitors: Mapping[str, float]


Callback = Callable[[StepInfo], None]


def _lr_factor(config: TrainingConfig) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        share = (step - config.warmup) / max(1, config.steps - config.warmup)
        return {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[config.schedule]

    return factor


class Run:
    """State of one learning run: what a checkpoint holds and `learn` advances."""

    def __init__(self, task: Task, method: Method, data: TrainingSet, config: TrainingConfig, team: Team = ALONE) -> None:
        if team.size > 1 and method.learns_alone:
            raise ConceptError(f"method '{method.name}' looks at its own gradients or replays, which {team.size} processes would see "
                               "differently; start it in one")
        task = task.worded(method.word_count)
        self.task, self.method, self.data, self.config, self.team = task, method, data, config, team
        self.piece = 0      # pictures per pass once memory has run out, 0 = all at once
        method.begin(task)
        method.on_data(data)
        self.groups = method.parameter_groups()
        self.optimizer = _optimizer(config, self.groups)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _lr_factor(config))
        device = task.backbone.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=config.precision == "float16" and device == "cuda")
        self.generator = torch.Generator().manual_seed(config.seed)
        self.info = ConceptInfo(task.name, task.class_noun, method.name, task.word_names, task.kind)
        self.vocabulary = Vocabulary([*task.bank.infos.values(), self.info])
        if not any(task.name in named_concepts(self.vocabulary.parse(caption)) for caption in data.captions):
            raise ConceptError(f"no caption of concept '{task.name}' names it; write <{task.name}> where it is in the picture, "
                               "or give no captions")
        self.memory = TextMemory()
        self.losses: list[float] = []
        self.scores: list[float] = []      # of the looks so far
        self._before: Tensor | None = None      # generator state at the start of a step that is under way
        self.is_updating = False                # between the first changed weight of a step and its end: no state to save

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.groups for p in group["params"]]

    def state(self) -> dict:
        return {"identity": self.identity(), "modules": dict(self.method.modules().state_dict()), "optimizer": self.optimizer.state_dict(),
                "scheduler": {"last_epoch": self.scheduler.last_epoch}, "scaler": self.scaler.state_dict(),
                "generator": self.generator.get_state() if self._before is None else self._before, "losses": list(self.losses),
                "scores": list(self.scores)}

    def identity(self) -> dict:
        return run_identity(self.task, self.method, self.data, self.config)

    def snapshot(self) -> ConceptBank:
        """What has been learned so far. Old concepts that are always on are left out: while learning they are in the weights already."""
        bank, outcome = self.task.bank, self.method.finish()
        for name in learning_names(bank, self.method.name, self.method.builds_on_sum):
            bank = bank.remove(name)
        return bank.add(Concept(self.info, outcome.tokens, outcome.deltas))

    def restore(self, path: Path) -> None:
        """Goes on where a checkpoint of this same run stopped; raises ConceptError for any other file."""
        state = checkpoint.load(path)
        mine, theirs = self.identity(), state.get("identity", {})
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise ConceptError(f"the checkpoint '{path}' belongs to another run: its {key} is {brief(theirs.get(key))}, "
                                   f"this run's is {brief(value)}")
        try:
            self._load(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ConceptError(f"the checkpoint '{path}' is damaged ({type(error).__name__}: {brief(error)})") from error

    def _load(self, state: dict) -> None:
        self.method.modules().load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        self.losses, self.scores = list(state["losses"]), list(state["scores"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def is_done(self) -> bool:
        return len(self.losses) >= self.config.steps or has_stalled(self.scores, self.config.patience)

    def look(self, judge: Judge | None) -> None:
        """Scores what has been learned, every `look_every` steps where `patience` asks for it; also one that was cut off."""
        config = self.config
        if config.patience and len(self.losses) // config.look_every > len(self.scores):
            self.scores.append(float(judge(self.snapshot(), len(self.losses))))

    def _context(self, batch: Batch) -> Context:
        prompts = batch.prompts
        named = {name for prompt in prompts for name in named_concepts(self.vocabulary.parse(prompt))}
        tokens = {name: self.task.bank[name].tokens for name in named - {self.task.name}} | {self.task.name: self.method.token_group()}
        return encode_prompts(self.task.backbone, prompts, self.vocabulary, tokens, memory=self.memory)

    def step(self) -> StepInfo:
        """One optimiser step over `accumulation` batches. Where memory runs out it begins again with smaller pieces."""
        self._before = self.generator.get_state()
        while True:
            try:
                total, terms = self._gradients()
                break
            except OUT_OF_MEMORY as error:
                self._smaller(error)
        self.team.average_gradients(self.parameters)
        total = self.team.mean(total)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        if not self.scaler.is_enabled():      # the scaler skips such steps by itself
            self._refuse_nan(norm, "gradient")
        lr = self.optimizer.param_groups[-1]["lr"]
        self._update(total)
        return StepInfo(len(self.losses), self.config.steps, total, terms, lr, float(norm), self.snapshot, self.method.monitors())

    def _smaller(self, error: Exception) -> None:
        """Pieces of half the size; ConceptError where they are single pictures already, or others wait for this process."""
        size = self.piece or self.config.batch_size * (2 if bool(self.data.is_prior.any()) else 1)
        if size == 1 or self.team.size > 1:
            raise ConceptError(f"memory ran out at step {len(self.losses) + 1} of concept '{self.task.name}' with {size} pictures of "
                               f"{self.config.resolution} pixels at once; turn gradient_checkpointing on, or lower resolution or "
                               "batch_size; the bank is unchanged") from error
        self.piece = -(-size // 2)
        self.optimizer.zero_grad(set_to_none=True)
        self.generator.set_state(self._before)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _gradients(self) -> tuple[float, dict[str, float]]:
        """Adds the gradients of `accumulation` batches; the denoising loss and the method's terms, averaged."""
        config, total, terms = self.config, 0.0, {}
        for _ in range(config.accumulation):
            batch = self.data.draw(config.batch_size, config.prior_weight, self.generator)
            for one in passes(batch, self.method, config, len(self.task.backbone.schedule), self.generator, self.team, self.piece):
                share = one.weight / config.accumulation
                loss, penalties = self._backward(one, share)
                total += share * loss
                for name, value in penalties.items():
                    terms[name] = terms.get(name, 0.0) + share * value
        return total, terms

    def _backward(self, one: Pass, share: float) -> tuple[float, dict[str, float]]:
        """Adds the gradients of one pass; returns its denoising loss and the method's terms."""
        config, backbone = self.config, self.task.backbone
        dtype = PRECISIONS[config.precision]
        with torch.autocast(backbone.device.type, dtype) if dtype is not None else nullcontext():
            seen = predict(backbone, one.batch, self._context(one.batch), one.drawn, self.method.processor())
            loss = denoising_loss(backbone, seen, config)
        penalties = self.method.penalty(seen)
        whole = loss + sum(penalties.values())
        self._refuse_nan(whole, "loss")
        if whole.requires_grad:      # not where no prompt of the batch names a concept that acts through its words
            self.scaler.scale(whole * share).backward()
        return loss.item(), {name: value.item() for name, value in penalties.items()}

    def _update(self, loss: float) -> None:
        self.is_updating = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._refuse_nan(torch.stack(torch._foreach_norm([p.detach() for p in self.parameters])).max(), "norm of the weights")
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.losses.append(loss)
        self.method.after_step(len(self.losses))
        self._before, self.is_updating = None, False

    def _refuse_nan(self, value: Tensor, what: str) -> None:
        if not torch.isfinite(value):
            raise ConceptError(f"the {what} became {value.item()} at step {len(self.losses) + 1} of concept '{self.task.name}'; "
                               "lower the learning rates (lr, token_lr) or use precision float32; the bank is unchanged")


def _optimizer(config: TrainingConfig, groups: list[dict]) -> torch.optim.Optimizer:
    kind = optimizer_class(config.optimizer)
    decay = {"weight_decay": config.weight_decay} if "weight_decay" in inspect.signature(kind).parameters else {}
    try:
        return kind([dict(group) for group in groups], **decay)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConceptError(f"optimizer '{config.optimizer}' cannot train these weights ({error}); AdamW, Adam and SGD can") from error


@contextmanager
def fit_for_steps(run: Run) -> Iterator[None]:
    """Inside, `run.step` may be called: standing concepts are in the weights, gradients are on, memory stays."""
    backbone = run.task.backbone
    with (torch.enable_grad(), kept_between_steps(backbone.device),
          backbone.folded(learning_deltas(run.task.bank, run.method.name, run.method.builds_on_sum)),
          backbone.gradient_checkpointing(run.config.gradient_checkpointing)):
        yield


@torch.inference_mode(False)      # ComfyUI runs nodes under it; what is made there cannot be trained
def learn(task: Task, method: Method, data: TrainingSet, config: TrainingConfig, callback: Callback | None = None,
          checkpoint_file: Path | None = None, thumbnail: bytes = b"", team: Team = ALONE, judge: Judge | None = None) -> Learned:
    """Learns one concept; returns it and the grown bank. The bank that came in and the base are what they were.

    callback: called after every step; what it raises ends the run. With `checkpoint_file` the state is saved every
    `checkpoint_every` steps and whenever the run ends early (but for errors of ours, and in the moment of an update, which the state
    of the last save outlives), and an existing file is resumed exactly. At the end it holds the finished run: whoever called
    deletes it once the bank is on disk, so that nothing learned is ever only in memory. team: the processes that learn together; all read
    the checkpoint, the first writes it. judge: what the looks of `patience` score with.
    """
    if config.patience and (judge is None or team.size > 1):
        raise ConceptError(f"setting 'patience' is {config.patience}; allowed: 0 where " + ("nothing says how good a concept is"
                           if judge is None else f"{team.size} processes learn together"))
    if task.name in task.bank:
        raise ConceptError(f"the bank already holds a concept '{task.name}'; choose another name or remove it first")
    task.bank.check_fits(task.backbone.layout)
    run, began = Run(task, method, data, config, team), time.perf_counter()
    if checkpoint_file is not None and Path(checkpoint_file).exists():
        run.restore(checkpoint_file)
    team.wait()      # before the first one writes it anew
    if not team.is_first:
        checkpoint_file = callback = None
    try:
        with fit_for_steps(run):
            run.look(judge)
            while not run.is_done:
                info = run.step()
                run.look(judge)
                if checkpoint_file is not None and config.checkpoint_every and info.step % config.checkpoint_every == 0:
                    checkpoint.save(checkpoint_file, run.state())
                if callback is not None:
                    callback(info)
    except BaseException as error:      # a host's cancel is a BaseException; it goes on up after the state is safe
        if checkpoint_file is not None and run.losses and not run.is_updating and not isinstance(error, ConceptError):
            checkpoint.save(checkpoint_file, run.state())
        raise
    if checkpoint_file is not None:
        checkpoint.save(checkpoint_file, run.state())
    return conclude(run.task, method, data, config, run.losses, time.perf_counter() - began, thumbnail)
