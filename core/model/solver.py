"""Solvers of the denoising process, the guided estimate, and the sampling loop.

An estimate is what `Schedule.estimate` returns: the noise, or the velocity of a flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .backbone import Backbone
from .context import Context
from .processor import AttentionProcessor
from .schedule import NoiseSchedule, Schedule

Estimate = Callable[[Tensor, int, float], Tensor]      # latents, timestep, progress -> estimate, or latents


class Solver(Protocol):
    """Interface of a diffusion solver."""

    @property
    def timesteps(self) -> Sequence[int]:
        """Timesteps of the training schedule that need an estimate, from noisy to clean."""

    def step(self, estimate: Tensor, t: int, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` at the next timestep, from the latents at timestep `t` and their estimate.
        """


class DpmSolver:
    """DPM-Solver++ (2M) of Lu et al. (arXiv 2211.01095), as in diffusers. It stores the previous step, so use
    one instance per sampling.
    """

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        from diffusers import DPMSolverMultistepScheduler

        alphas = schedule.alphas_cumprod.double()
        betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
        self.scheduler = DPMSolverMultistepScheduler(
            trained_betas=betas.numpy(), num_train_timesteps=len(alphas), prediction_type="epsilon",
            algorithm_type="dpmsolver++", solver_order=2)
        self.scheduler.set_timesteps(steps)
        self.timesteps: list[int] = self.scheduler.timesteps.tolist()

    def step(self, noise: Tensor, t: int, latents: Tensor) -> Tensor:
        return self.scheduler.step(noise, t, latents, return_dict=False)[0]


class FirstOrder:
    """First-order steps over evenly spaced timesteps: DDIM for a noise schedule, Euler's method for a flow.
    The last step gives the clean latents.
    """

    def __init__(self, schedule: Schedule, steps: int) -> None:
        self.schedule = schedule
        times = torch.linspace(len(schedule) - 1, 0, steps + 1).long().unique().flip(0).tolist()
        self.timesteps: list[int] = times[:-1]
        self._next = dict(zip(times[:-1], [*times[1:-1], None], strict=True))

    def step(self, estimate: Tensor, t: int, latents: Tensor) -> Tensor:
        return self.schedule.step(estimate, latents, t, self._next[t])


def solver_for(schedule: Schedule, steps: int) -> Solver:
    """The solver that pictures are sampled with. Use one instance per sampling."""
    return DpmSolver(schedule, steps) if isinstance(schedule, NoiseSchedule) else FirstOrder(schedule, steps)


def guided(backbone: Backbone, latents: Tensor, t: int, negative: Context, positive: Context, cfg: float,
           processor: AttentionProcessor | None = None) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, 2022), both halves in one evaluation.

    Args:
        latents: `[B, C, h, w]` at timestep `t`.
        negative, positive: one prompt for each of the latents.
        cfg: Guidance scale; at 1 the negative half is not evaluated.
        processor: Changes what the sites compute.

    Returns:
        The estimate `[B, C, h, w]`: negative + cfg (positive - negative).
    """
    timesteps = torch.full((len(latents),), t, device=latents.device, dtype=torch.long)
    if cfg == 1.0:
        output = backbone.predict(latents, timesteps, positive, processor)
        return backbone.schedule.estimate(output, latents, timesteps)
    latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
    output = backbone.predict(latents, timesteps, Context.cat([negative, positive]), processor)
    unconditional, conditional = backbone.schedule.estimate(output, latents, timesteps).chunk(2)
    return unconditional + cfg * (conditional - unconditional)


def no_report() -> None:
    """Reports no step."""


def denoise(solver: Solver, latents: Tensor, estimate: Estimate, move: Estimate | None = None,
            on_step: Callable[[], object] = no_report) -> Tensor:
    """Runs a solver from its first timestep to its last.

    Args:
        latents: Starting noise `[B, C, h, w]`.
        estimate: Returns the guided estimate. Its argument `progress` is 0 in the first step and 1 in
            the last.
        move: Called before each estimate; returns latents that replace the given ones.
        on_step: Called after each step.
    """
    for i, t in enumerate(solver.timesteps):
        progress = i / max(1, len(solver.timesteps) - 1)
        latents = latents if move is None else move(latents, t, progress)
        latents = solver.step(estimate(latents, t, progress), t, latents)
        on_step()
    return latents
