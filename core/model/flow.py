"""The schedule of a model that is trained by flow matching (rectified flow, Liu et al. 2022; Lipman et al.
2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConceptError
from .schedule import Schedule, expand


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Noisy latents lie on a straight line from the picture to the noise: x = (1 - s) x_0 + s n.

    The model predicts the velocity n - x_0. Every timestep has the loss weight 1.

    Attributes:
        sigmas: `[T]`, the share s of noise at each timestep; rising, above 0 and at most 1.
    """

    sigmas: Tensor

    def __post_init__(self) -> None:
        low, high = float(self.sigmas.min()), float(self.sigmas.max())
        if not (low > 0 and high <= 1 and bool((self.sigmas.diff() > 0).all())):
            raise ConceptError(f"the noise shares of a flow run from {low:g} to {high:g}; allowed: rising, "
                               "above 0 and at most 1")

    @classmethod
    def shifted(cls, shift: float, steps: int = 1000) -> FlowSchedule:
        """Shares `shift u / (1 + (shift - 1) u)` for `steps` even values of u up to 1 (Esser et al. 2024,
        Eq. 23). A timestep that is drawn evenly is then a time that is drawn with this shift.

        Args:
            shift: Above 0; 1 = even shares. Above 1, more timesteps are noisy. Anima's is 3.
            steps: T.

        Raises:
            ConceptError: The shift is not above 0.
        """
        if not 0 < shift < float("inf"):
            raise ConceptError(f"the shift of a flow is {shift}; allowed: above 0")
        even = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        return cls((shift * even / (1 + (shift - 1) * even)).float())

    def __len__(self) -> int:
        return len(self.sigmas)

    def sigma(self, timesteps: Tensor) -> Tensor:
        """The share of noise at timesteps `[B]`: `[B]` float32."""
        return self.sigmas.to(timesteps.device)[timesteps]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = expand(self.sigma(timesteps), latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity: noise - latents."""
        return noise - latents

    def estimate(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity itself. The noise would do as well, but at s = 1 it no longer holds the prediction."""
        return output

    def step(self, estimate: Tensor, latents: Tensor, t: int, following: int | None) -> Tensor:
        """Euler's method."""
        then = 0.0 if following is None else float(self.sigmas[following])
        return latents + (then - float(self.sigmas[t])) * estimate
