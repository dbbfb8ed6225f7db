"""A training that may be stopped at any moment: averaged weights, checkpoints, an open end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from .muon import Muon, split

CHECKPOINT_SECONDS = 480
LOG_EVERY = 50
RETAINED = 2  # newest checkpoints of a training that stay on disk


@dataclass(frozen=True)
class Plan:
    """How long and how fast a training learns.

    Attributes:
        steps: optimiser steps in all.
        lr: learning rate after the warm-up.
        warmup: steps of linear warm-up.
        decay: last share of the steps, in which the rate falls linearly to zero. Before it the rate is
            constant, so `steps` can still be changed without any other effect.
        ema: largest decay of the running average of weights.
        muon: whether matrices and convolutions are trained by Muon instead of AdamW.
        weight_decay: of both optimisers.
    """

    steps: int
    lr: float
    warmup: int = 200
    decay: float = 0.25
    ema: float = 0.999
    muon: bool = False
    weight_decay: float = 0.01

    def rate(self, step: int) -> float:
        """Factor on the learning rate at `step`."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min((step + 1) / self.warmup, 1.0, max(left, 0.0))


class Deadline:
    """True once `hours` have passed, or SIGTERM has asked the process to end; trainings then save."""

    def __init__(self, hours: float) -> None:
        self.time = time.time() + 3600 * hours
        signal.signal(signal.SIGTERM, self._now)

    def _now(self, *_: object) -> None:
        self.time = 0.0

    def __call__(self) -> bool:
        return time.time() >= self.time


def never() -> bool:
    """The deadline of a training that nothing stops."""
    return False


def newest_checkpoints(folder: Path, name: str) -> list[Path]:
    """Checkpoints of a training, newest first."""
    return sorted(folder.glob(f"{name}-*.pt"), reverse=True)


def read_newest(folder: Path, name: str) -> dict | None:
    """The newest checkpoint that can be read, or None where there is none."""
    for file in newest_checkpoints(folder, name):
        try:
            return torch.load(file, weights_only=True)
        except (RuntimeError, EOFError, OSError, UnpicklingError):
            print(f"{file.name} cannot be read; trying the one before", flush=True)
    return None


@torch.no_grad()
def load_average(modules: nn.Module, folder: Path, name: str) -> int:
    """Copies the newest checkpoint's averaged weights into `modules`; returns its step, 0 without any."""
    state = read_newest(folder, name)
    if state is None:
        return 0
    for key, parameter in modules.named_parameters():
        if key in state["ema"]:
            parameter.copy_(state["ema"][key])
    return state["step"]


class LongRun:
    """A training to iterate over, with `learn(loss)` once per step; resumes from the newest checkpoint."""

    def __init__(self, modules: nn.Module, folder: Path, name: str, plan: Plan,
                 stop: Callable[[], bool] = never, done: int = 0) -> None:
        """`stop` is called before every step; once it returns True, the training saves and ends early.
        done: steps that `modules` were trained for before, where there is no checkpoint."""
        self.modules, self.folder, self.name, self.plan, self.stop = modules, folder, name, plan, stop
        self.trained = {key: p for key, p in modules.named_parameters() if p.requires_grad}
        self.optimizers = self._optimizers()
        self.average = {key: p.detach().clone() for key, p in self.trained.items()}
        self.start, self.smooth, self.saved = done, None, time.time()
        state = read_newest(folder, name)
        if state is not None:
            self._restore(state)
        self.step = self.start

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        plan, trainable = self.plan, {id(p) for p in self.trained.values()}
        matrices, others = split(self.modules) if plan.muon else ([], list(self.trained.values()))
        matrices, others = ([p for p in group if id(p) in trainable] for group in (matrices, others))
        adamw = torch.optim.AdamW(others, plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay,
                                  fused=True)
        return [adamw, Muon(matrices, plan.lr, plan.weight_decay)] if matrices else [adamw]

    def _restore(self, state: dict) -> None:
        self.modules.load_state_dict(state["modules"])
        for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        self.average, self.start, self.smooth = state["ema"], state["step"], state["loss"]

    @property
    def finished(self) -> bool:
        return self.step >= self.plan.steps

    def __iter__(self) -> Iterator[int]:
        self.began = time.time()
        while self.step < self.plan.steps and not self.stop():
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = self.plan.lr * self.plan.rate(self.step)
            yield self.step
        if self.step > self.start:
            self.save()

    def learn(self, loss: Tensor) -> None:
        """One optimiser step from a scalar loss."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._update_average()
        value = loss.item()
        self.smooth = value if self.smooth is None else 0.99 * self.smooth + 0.01 * value
        self.step += 1
        if self.step % LOG_EVERY == 0:
            pace = (time.time() - self.began) / (self.step - self.start)
            line = f"{self.name} {self.step}/{self.plan.steps} loss {self.smooth:.5f} {pace:.3f} s/step"
            print(time.strftime("%H:%M:%S"), line, flush=True)
        if time.time() - self.saved > CHECKPOINT_SECONDS:
            self.save()

    @torch.no_grad()
    def _update_average(self) -> None:
        weight = 1 - min(self.plan.ema, (1 + self.step) / (10 + self.step))
        averages = [self.average[key] for key in self.trained]
        torch._foreach_lerp_(averages, [p.detach() for p in self.trained.values()], weight)

    def save(self) -> None:
        """Writes a checkpoint under a new name, then removes all but the newest two."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"modules": self.modules.state_dict(), "optimizers": states, "ema": self.average}
        target = self.folder / f"{self.name}-{self.step:07d}.pt"
        partial = target.with_suffix(".partial")
        torch.save(state | {"step": self.step, "loss": self.smooth}, partial)
        partial.rename(target)
        for file in newest_checkpoints(self.folder, self.name)[RETAINED:]:
            file.unlink()
        self.saved = time.time()

    @torch.no_grad()
    def use_average(self) -> None:
        """Copies the averaged weights into the modules."""
        for key, parameter in self.trained.items():
            parameter.copy_(self.average[key])
