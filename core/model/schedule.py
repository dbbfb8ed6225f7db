"""How a latent diffusion model adds noise: the interface, and the noise schedule for epsilon and v
prediction.

`flow.FlowSchedule` is the other implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConceptError

PREDICTIONS = ("epsilon", "v_prediction")
SMALLEST = 2**-24      # an alpha of pure noise, so that the signal can be divided by; as diffusers' samplers


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Values `[B]` in the type of `like` `[B, ...]` and with as many dimensions."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def cumulative_alphas(start: float, end: float, steps: int = 1000, kind: str = "scaled_linear") -> Tensor:
    """Cumulative alphas, `[steps]`. Betas grow linearly (kind "linear"), or their square roots do
    ("scaled_linear", as in Stable Diffusion).
    """
    if kind not in ("linear", "scaled_linear"):
        raise ValueError(f"beta schedule {kind!r} is not supported; supported: scaled_linear, linear")
    power = 2 if kind == "scaled_linear" else 1
    betas = torch.linspace(start ** (1 / power), end ** (1 / power), steps, dtype=torch.float64) ** power
    return torch.cumprod(1.0 - betas, dim=0).float()


def zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Rescales cumulative alphas `[T]` so that the last one is 0: pure noise (Lin et al., arXiv 2305.08891,
    Algorithm 1).
    """
    root = alphas.double().sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root.square().float()


class Schedule(ABC):
    """Noisy latents, targets and steps of a model. Timesteps are integers from 0, clean, to `len` - 1, noise.

    Attributes:
        has_snr_weights: Whether Min-SNR loss weights are defined.
    """

    has_snr_weights: ClassVar[bool] = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of training timesteps."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents `[B, C, h, w]` at timesteps `[B]`."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, `[B, C, h, w]`."""

    @abstractmethod
    def estimate(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The denoiser's output for noisy latents as the estimate that guidance, regions and solvers combine:
        the noise, or the velocity of a flow.
        """

    @abstractmethod
    def step(self, estimate: Tensor, latents: Tensor, t: int, following: int | None) -> Tensor:
        """One first-order step of sampling.

        Args:
            estimate: From `estimate`, `[B, C, h, w]`.
            latents: At timestep `t`.
            t: The present timestep.
            following: The next, smaller timestep; None for clean latents.

        Returns:
            Latents at the next timestep, `[B, C, h, w]`.
        """

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR loss weights `[B]`. Raises ConceptError unless `has_snr_weights`."""
        raise ConceptError(f"min_snr_gamma is {gamma:g}; a {type(self).__name__} has no signal-to-noise "
                           "weights; allowed: 0")


@dataclass(frozen=True)
class NoiseSchedule(Schedule):
    """The noise schedule of a model.

    Attributes:
        alphas_cumprod: `[T]`, the share of signal variance at each training timestep; above 0.
        prediction: What the UNet predicts: "epsilon", the noise, or "v_prediction".
    """

    has_snr_weights: ClassVar[bool] = True
    alphas_cumprod: Tensor
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ConceptError(f"prediction type is {self.prediction!r}; allowed: {', '.join(PREDICTIONS)}")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio `[T]`."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def _factors(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod.to(like.device)[timesteps]
        return expand(alpha.sqrt(), like), expand((1 - alpha).sqrt(), like)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents `[B, C, h, w]` at timesteps `[B]`."""
        signal, sigma = self._factors(latents, timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should predict: the noise, or v of Salimans & Ho (2022)."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._factors(latents, timesteps)
        return signal * noise - sigma * latents

    def to_epsilon(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The UNet's output for noisy latents, as a noise estimate."""
        if self.prediction == "epsilon":
            return output
        signal, sigma = self._factors(noisy, timesteps)
        return signal * output + sigma * noisy

    def estimate(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.to_epsilon(output, noisy, timesteps)

    def step(self, estimate: Tensor, latents: Tensor, t: int, following: int | None) -> Tensor:
        """DDIM of Song et al. (ICLR 2021), Eq. 12 with sigma = 0."""
        alpha = self.alphas_cumprod.to(latents.device)[t]
        clean = (latents - (1 - alpha).sqrt() * estimate) / alpha.sqrt()
        if following is None:
            return clean
        return self.add_noise(clean, estimate, torch.full((len(latents),), following, device=latents.device))

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR loss weights `[B]` (Hang et al., 2023): min(snr, gamma) / snr for epsilon, min(snr, gamma)
        / (snr + 1) for v."""
        snr = self.snr.to(timesteps.device)[timesteps]
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)
