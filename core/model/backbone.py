"""The backbone: the host's model behind one interface. Everything in core reaches UNet, text encoders and autoencoder through it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .deltas import Deltas
from .schedule import NoiseSchedule
from .sites import Site, SiteLayout


@dataclass(frozen=True)
class Context:
    """Encoded prompts.

    hidden: `[B, L, N, D]`, L = 1 when no layer-wise word is in them; pooled: `[B, P]` where the family has it (SDXL), else None;
    words: for every prompt, concept name -> token positions of its words in 0..N-1.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    words: tuple[dict[str, tuple[int, ...]], ...] = ()

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def at(self, site: Site) -> Tensor:
        """What one site reads, `[B, N, D]`."""
        return self.hidden[:, site.copy if self.hidden.shape[1] > 1 else 0]

    def __getitem__(self, rows: slice) -> Context:
        return Context(self.hidden[rows], None if self.pooled is None else self.pooled[rows], self.words[rows])

    def repeated(self, length: int) -> Context:
        """The same prompts over a multiple of their length (softmax does not see repetition)."""
        n = self.hidden.shape[2]
        return Context(self.hidden.repeat(1, 1, length // n, 1), self.pooled, tuple(_repeated(row, n, length) for row in self.words))

    @staticmethod
    def cat(parts: list[Context]) -> Context:
        """One batch out of several; contexts without layers are repeated, shorter ones too."""
        copies = max(part.hidden.shape[1] for part in parts)
        parts = [part.repeated(math.lcm(*(p.hidden.shape[2] for p in parts))) for part in parts]
        pooled = None if any(p.pooled is None for p in parts) else torch.cat([p.pooled for p in parts])
        words = tuple(row for part in parts for row in part.words)
        return Context(torch.cat([p.hidden.expand(-1, copies, -1, -1) for p in parts]), pooled, words)


def _repeated(words: dict[str, tuple[int, ...]], n: int, length: int) -> dict[str, tuple[int, ...]]:
    """Positions in a context of n tokens that is repeated up to `length`."""
    return {name: tuple(place + start for start in range(0, length, n) for place in places) for name, places in words.items()}


class AttentionProcessor:
    """What sites do beside their frozen weights. The base class does nothing; a host with program None runs untouched."""

    looks_within = False      # whether `attend_within` is to be asked; where it is not, self-attention is the host's, untouched

    def begin(self, context: Context) -> None:
        """Called before every forward pass with what it will read. With gradient checkpointing the other calls may come again after it, in
        the backward pass."""

    def enter(self, site: Site, x: Tensor) -> tuple[Tensor, bool] | None:
        """x `[B, S, b]`: what to_q of a site would read. A program that works better on cells in another order gives what to_q, and then
        `attend`, are to have instead, and whether it reads the text (else keys and values may be empty); `project` of to_out brings the
        cells back. None: all as it is. Only asked where nobody else's code sees what is in between."""
        return None

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        """x: input of a projection `[B, S, b]`; y: its frozen output `[B, S, a]`; returns the output to use."""
        return y

    def attend(self, site: Site, query: Tensor, key: Tensor, value: Tensor, default) -> Tensor:
        """query `[B, S, a]`, key and value `[B, N, a]`, heads side by side; `default(query, key, value)` is the host's attention
        `[B, S, a]`. Where other people's code stands in for it, its attribute `plain` is attention without that."""
        return default(query, key, value)

    def attend_within(self, site: Site, query: Tensor, key: Tensor, value: Tensor, default) -> Tensor:
        """Self-attention of the block that a site is in: query, key and value `[B, S, a]`."""
        return default(query, key, value)


class TextEncoder(ABC):
    """One text encoder of a backbone: its vocabulary, and a forward pass in which learned vectors can stand for tokens."""

    name: str
    width: int            # of the token vectors
    length: int           # tokens per chunk, begin and end included
    start: int
    end: int
    pad: int
    encodes_prefixes: bool = False      # whether `encode` takes shorter rows too; causal as they are, what is cut off changes nothing

    @abstractmethod
    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end."""

    @abstractmethod
    def vectors(self, ids: list[int]) -> Tensor:
        """The vocabulary's vectors, `[n, width]`, float32."""

    @abstractmethod
    def encode(self, ids: Tensor, slots: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """ids `[B, length]`; slots `[B, length]` bool, True where `vectors` `[slots.sum(), width]` stand in, in row order.

        Returns hidden states as the UNet reads them `[B, length, D]` and the pooled output `[B, P]` or None.
        """


class Backbone(ABC):
    """A frozen latent diffusion model."""

    layout: SiteLayout
    schedule: NoiseSchedule
    text: tuple[TextEncoder, ...]
    latent_channels: int
    picture_multiple: int            # pictures' sides are multiples of this; latents are that much smaller
    fingerprint: str                 # of the weights, for provenance
    overlay: str = ""                # digest of what lies over them (LoRA patches, clip skip): another one makes it another run

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in -1..1 to scaled latents `[B, C, H/m, W/m]`, m the picture multiple."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Inverse of `encode_images`, clamped to -1..1."""

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, context: Context, processor: AttentionProcessor | None = None) -> Tensor:
        """The UNet's output (epsilon or v, see schedule) for noisy latents `[B, C, h, w]` at integer timesteps `[B]`."""

    @abstractmethod
    def project(self, site: Site, projection: str, x: Tensor) -> Tensor:
        """One projection of a site, frozen (and folded) weights."""

    @abstractmethod
    def folded(self, deltas: Deltas):
        """Context manager: inside, the weights carry `deltas`; afterwards they are what they were, bit for bit."""

    @contextmanager
    def gradient_checkpointing(self, enabled: bool) -> Iterator[None]:
        """Trades time for memory in `predict` while inside; a host that cannot ignores it."""
        yield
