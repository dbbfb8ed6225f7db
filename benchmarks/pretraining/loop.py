"""Parts shared by the stages: weight averaging, learning-rate schedule, and resumable checkpoints."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from .muon import Muon, split


def rate(step: int, total: int, warmup: int = 200, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, then cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Ema:
    """Exponential moving average of parameters. The decay grows with the step, so that early steps are
    forgotten.
    """

    def __init__(self, modules: nn.ModuleDict, decay: float = 0.999) -> None:
        self.modules, self.decay = modules, decay
        self.values = {name: p.detach().clone() for name, p in modules.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, p in self.modules.named_parameters():
            self.values[name].lerp_(p.detach(), weight)

    @torch.no_grad()
    def copy_into_modules(self) -> None:
        for name, p in self.modules.named_parameters():
            p.copy_(self.values[name])


class Run:
    """Training with checkpoints. `for step in run` resumes from the file; `after(loss)` makes the optimiser
    step.
    """

    def __init__(self, modules: nn.ModuleDict, file: Path, steps: int, lr: float, weight_decay: float = 0.01,
                 every: int = 250, muon: bool = False) -> None:
        self.modules, self.file, self.steps, self.every, self.lr = modules, file, steps, every, lr
        matrices, others = split(modules) if muon else ([], list(modules.parameters()))
        self.optimizers = [torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=weight_decay,
                                             fused=True)]
        self.optimizers += [Muon(matrices, lr, weight_decay)] if matrices else []
        self.ema, self.start, self.began, self.smooth = Ema(modules), 0, time.time(), None
        if file.exists():
            state = torch.load(file, weights_only=True)
            modules.load_state_dict(state["modules"])
            for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(its_state)
            self.ema.values, self.start = state["ema"], state["step"]

    def __iter__(self):
        for step in range(self.start, self.steps):
            self.step = step
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = self.lr * rate(step, self.steps)
            yield step

    def _average_gradients(self) -> None:
        """Averages gradients over processes. One process per core avoids thread barriers within a layer."""
        if not dist.is_initialized():
            return
        gradients = [p.grad for p in self.modules.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def after(self, loss: torch.Tensor) -> None:
        loss.backward()
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        self.smooth = loss.item() if self.smooth is None else 0.98 * self.smooth + 0.02 * loss.item()
        done = self.step + 1
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        if done % 50 == 0:
            pace = (time.time() - self.began) / (done - self.start)
            print(
                f"{self.file.stem} {done}/{self.steps} loss {self.smooth:.4f} {pace:.2f} s/step",
                flush=True,
            )
        if done % self.every == 0 or done == self.steps:
            states = [optimizer.state_dict() for optimizer in self.optimizers]
            state = {"modules": self.modules.state_dict(), "optimizers": states, "ema": self.ema.values,
                     "step": done}
            partial = self.file.with_suffix(".partial")
            torch.save(state, partial)
            partial.rename(self.file)
