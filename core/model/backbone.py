"""The interface of a host's model, through which core reaches UNet, text encoders and autoencoder.

`Backbone` is the model and `TextEncoder` one of its text encoders. Prompts are encoded as a `Context`; what
sites do beside their frozen weights is an `AttentionProcessor`.

Letters in shapes: B rows of a batch, L layer copies, N tokens, D context width, a and b output and input
width of a projection; C, h, w channels, height and width of latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from .context import Context
from .deltas import Deltas
from .processor import AttentionProcessor
from .schedule import NoiseSchedule
from .sites import Site, SiteLayout


class TextEncoder(ABC):
    """One text encoder of a backbone: its vocabulary, and a forward pass in which learned vectors may replace
    tokens.

    Attributes:
        name: As in checkpoints and exports, such as `clip_l`.
        width: Of its token vectors.
        length: Tokens per chunk, begin and end included.
        start, end, pad: Ids of these tokens.
        encodes_prefixes: Whether `encode` takes rows shorter than `length`. In a causal encoder, what is cut
            off changes nothing.
    """

    name: str
    width: int
    length: int
    start: int
    end: int
    pad: int
    encodes_prefixes: bool = False

    @abstractmethod
    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end."""

    @abstractmethod
    def vectors(self, ids: list[int]) -> Tensor:
        """The vocabulary's vectors of these tokens, `[n, width]`, float32."""

    @abstractmethod
    def encode(self, ids: Tensor, slots: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Runs the encoder.

        Args:
            ids: `[B, length]`.
            slots: `[B, length]` bool, True where a learned vector replaces the token.
            vectors: `[slots.sum(), width]`, the learned vectors in the order of the rows.

        Returns:
            The hidden states as the UNet reads them, `[B, length, D]`, and the pooled output `[B, P]` or
            None.
        """


class Projections(Protocol):
    """Frozen projections of a model's sites: a backbone's, or a host's without the rest of a backbone."""

    @property
    def layout(self) -> SiteLayout: ...

    def project(self, site: Site, projection: str, x: Tensor) -> Tensor: ...


class Backbone(ABC):
    """A frozen latent diffusion model. Nothing that is learned is ever written into its weights.

    Attributes:
        layout: Its sites.
        schedule: Its noise schedule.
        text: Its text encoders; a context's width is the sum of theirs.
        latent_channels: C of its latents.
        picture_multiple: Pixels per latent cell along each side. The sides of pictures are multiples of it.
        fingerprint: Hash of the weights: concepts remember which base they were learned on.
        overlay: Hash of what changes the model beside its weights (LoRA patches, CLIP skip), "" for nothing.
            A stopped run only resumes with the same one.
    """

    layout: SiteLayout
    schedule: NoiseSchedule
    text: tuple[TextEncoder, ...]
    latent_channels: int
    picture_multiple: int
    fingerprint: str
    overlay: str = ""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the UNet computes."""

    @property
    @abstractmethod
    def parameter_count(self) -> int:
        """Number of weights of the UNet."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in -1..1 to latents `[B, C, H/m, W/m]`, m the picture multiple, scaled as
        the UNet reads them."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Inverse of `encode_images`, clamped to -1..1."""

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, context: Context,
                processor: AttentionProcessor | None = None) -> Tensor:
        """One evaluation of the UNet.

        Args:
            latents: Noisy latents, `[B, C, h, w]`.
            timesteps: `[B]`, whole numbers as in the schedule.
            context: The prompts, B rows.
            processor: What the sites do beside their frozen weights; without one the model runs untouched.

        Returns:
            The UNet's output, `[B, C, h, w]` float32: epsilon or v, see the schedule. Gradients reach the
            context and the processor, never the weights.
        """

    @abstractmethod
    def project(self, site: Site, projection: str, x: Tensor) -> Tensor:
        """One projection of a site by its frozen weights, with the folded deltas: x `[..., b]` to `[...,
        a]`."""

    @abstractmethod
    def folded(self, deltas: Deltas) -> AbstractContextManager[None]:
        """Inside, the weights contain `deltas`. Afterwards they are what they were, bit for bit."""

    def training(self) -> AbstractContextManager[None]:
        """Surrounds a whole run of learning. Inside, gradients pass through UNet and text encoders; a host
        may prepare for that."""
        return nullcontext()

    def gradient_checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        """Inside, `predict` stores fewer activations and computes them again in the backward pass. A host may
        ignore it."""
        return nullcontext()
