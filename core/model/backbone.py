"""The interface of a host's model. Everything in core reaches the UNet, the text encoders and the autoencoder
through it.

`Backbone` is the model, `TextEncoder` one of its text encoders, and `Context` an encoded prompt. An
`AttentionProcessor` says what the text cross-attention sites do beside their frozen weights; a `SiteCall` is
one call of one site.

Letters in shapes: B rows of a batch, L layer copies, N tokens, D context width, S cells of a site's grid, a
and b output and input width of a projection, C h w channels and size of latents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .deltas import Deltas
from .schedule import NoiseSchedule
from .sites import Site, SiteLayout


@dataclass(frozen=True)
class Context:
    """Encoded prompts, one per row.

    Attributes:
        hidden: `[B, L, N, D]`. L = 1 where no layer-wise word is in the prompts, else the number of layer
            copies.
        pooled: `[B, P]` for model families that read a pooled text (SDXL), else None.
        words: For every row, concept name -> positions of its words among the N tokens.
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
        """Some of the rows."""
        return Context(self.hidden[rows], None if self.pooled is None else self.pooled[rows],
                       self.words[rows])

    def repeated(self, length: int) -> Context:
        """The same prompts, repeated to `length` tokens, a multiple of N. Softmax does not see the
        repetition."""
        n = self.hidden.shape[2]
        words = tuple({name: tuple(place + start for start in range(0, length, n) for place in places)
                       for name, places in row.items()} for row in self.words)
        return Context(self.hidden.repeat(1, 1, length // n, 1), self.pooled, words)

    @staticmethod
    def cat(parts: list[Context]) -> Context:
        """Joins the rows of several contexts. Shorter contexts, and those without layer copies, are repeated
        to fit."""
        copies = max(part.hidden.shape[1] for part in parts)
        length = math.lcm(*(part.hidden.shape[2] for part in parts))
        parts = [part.repeated(length) for part in parts]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        words = tuple(row for part in parts for row in part.words)
        hidden = torch.cat([part.hidden.expand(-1, copies, -1, -1) for part in parts])
        return Context(hidden, torch.cat(pooled) if len(pooled) == len(parts) else None, words)


class AttentionFunction(Protocol):
    """Multi-head attention, with the heads side by side in the last dimension."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """query `[B, S, a]`, key and value `[B, N, a]` to `[B, S, a]`."""


@dataclass(frozen=True)
class HostAttention:
    """The host's attention at one site.

    Attributes:
        plain: The attention without other nodes' code.
        replaced: What other nodes run in its place, such as an image prompt adapter; None where there is no
            such code.
    """

    plain: AttentionFunction
    replaced: AttentionFunction | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention with other nodes' code."""
        return self.plain(query, key, value) if self.replaced is None else self.replaced(query, key, value)

    def added_by_others(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """What other nodes' code adds to plain attention, `[B, S, a]`; None where there is no such code."""
        if self.replaced is None:
            return None
        return self.replaced(query, key, value) - self.plain(query, key, value)


@dataclass
class SiteCall:
    """One call of one site. It holds everything that one step of the call hands to a later one.

    Every host runs the same steps around its own frozen projections:

        call.enter()      # only where no other code sees what lies between to_q and to_out
        q = call.project("to_q", to_q(call.hidden))
        k = call.project("to_k", to_k(call.key_text))
        v = call.project("to_v", to_v(call.value_text))
        y = call.finish(to_out(call.attend(q, k, v, attention)))

    Attributes:
        processor: What the site does beside its frozen weights.
        site: The site that is called.
        hidden: What to_q reads, `[B, S, b]`; `enter` may replace it.
        key_text, value_text: What to_k and to_v read, `[B, N, D]`. They differ only where another node
            changed one of them.
        reads_text: False where `enter` found that no key or value will be read. The host may then project an
            empty text.
        after_out: What is done with the output of to_out; None for nothing.
    """

    processor: AttentionProcessor
    site: Site
    hidden: Tensor
    key_text: Tensor
    value_text: Tensor
    reads_text: bool = True
    after_out: Callable[[Tensor], Tensor] | None = None
    _attend_reordered: Callable[[Tensor, Tensor, Tensor, HostAttention], Tensor] | None = None
    _attended: Tensor | None = None

    def enter(self) -> None:
        """Lets the processor reorder the cells, or skip the text."""
        self.processor.enter(self)

    def reorder(self, hidden: Tensor, attend: Callable[[Tensor, Tensor, Tensor, HostAttention], Tensor],
                restore: Callable[[Tensor], Tensor]) -> None:
        """For `AttentionProcessor.enter`: runs this call on cells in another order.

        Args:
            hidden: What to_q reads instead, `[B', S', b]`.
            attend: Takes the place of `AttentionProcessor.attend` in this call.
            restore: Brings the output of to_out, `[B', S', a]`, back to `[B, S, a]`.
        """
        self.hidden, self._attend_reordered, self.after_out = hidden, attend, restore

    def project(self, projection: str, y: Tensor) -> Tensor:
        """From the output of the frozen to_q, to_k or to_v, `[B, N, a]`, to the output that `attend`
        takes."""
        if projection == "to_q":
            return self.processor.project(self.site, projection, self.hidden, y)
        if not self.reads_text:
            return y
        return self.processor.project(self.site, projection, self.key_text if projection == "to_k"
                                      else self.value_text, y)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
        """From what `project` gave, query `[B, S, a]`, key and value `[B, N, a]`, to what the frozen to_out
        reads, `[B, S, a]`."""
        if self._attend_reordered is not None:
            self._attended = self._attend_reordered(query, key, value, attention)
        else:
            self._attended = self.processor.attend(self, query, key, value, attention)
        return self._attended

    def finish(self, output: Tensor) -> Tensor:
        """From the output of the frozen to_out to the output of the site. Unchanged where `attend` was not
        called."""
        if self._attended is None:
            return output
        output = self.processor.project(self.site, "to_out", self._attended, output)
        return output if self.after_out is None else self.after_out(output)


class AttentionProcessor:
    """What the sites do beside their frozen weights. This base class changes nothing; subclasses override
    what they need.

    A processor may keep what depends on the text or the layout alone. What belongs to one call of a site goes
    into the `SiteCall`: gradient checkpointing calls a site again in the backward pass, and it must then do
    the same again.
    """

    @property
    def changes_self_attention(self) -> bool:
        """Whether hosts ask `self_attention` now. Where not, self-attention is the host's own."""
        return False

    def prepare(self, context: Context) -> None:
        """Called before every forward pass, with the prompts that the pass reads."""

    def enter(self, call: SiteCall) -> None:
        """May reorder the cells (`call.reorder`) or set `call.reads_text` to False. Called before to_q, and
        only where no other code sees what lies between to_q and to_out."""

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        """A projection with what the processor adds to it.

        Args:
            x: Input of the projection, `[B, S, b]`.
            y: Output of its frozen weights, `[B, S, a]`.

        Returns:
            The output to use, `[B, S, a]`.
        """
        return y

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        """Attention of the picture to the text.

        Args:
            query: `[B, S, a]`, heads side by side, as `project` gave it.
            key, value: `[B, N, a]`, likewise.
            attention: The host's attention, with and without other nodes' code.

        Returns:
            What to_out reads, `[B, S, a]`. What is to happen with the output of to_out goes into
            `call.after_out`.
        """
        return attention(query, key, value)

    def self_attention(self, site: Site, query: Tensor, key: Tensor, value: Tensor,
                       attention: AttentionFunction) -> Tensor:
        """Self-attention of the block that a site is in: query, key and value `[B, S, a]` to `[B, S, a]`."""
        return attention(query, key, value)


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
