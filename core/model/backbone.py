"""The interface through which core uses a host's denoiser, text encoders and autoencoder.

`Backbone` is the model and `TextEncoder` one of its text encoders. Encoded prompts are a `Context`. An
`AttentionProcessor` changes what the cross-attention layers (sites) compute, without changing their weights.

Letters in shapes: B rows of a batch, L layer copies, N tokens, D context width, a and b output and input
width of a projection; C, h, w channels, height and width of latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ConceptError
from .context import Context
from .deltas import Deltas
from .processor import AttentionProcessor
from .schedule import Schedule
from .sites import Site, SiteLayout


class TextEncoder(ABC):
    """One text encoder of a backbone: its vocabulary, and a forward pass in which learned vectors may replace
    tokens.

    Attributes:
        name: Its name in checkpoints and exports, such as `clip_l`.
        width: Width of its token vectors.
        length: Tokens per chunk, begin and end included.
        start, end, pad: Token ids of begin, end and padding.
        takes_vectors: Whether `encode` puts learned vectors in place of tokens, so that words can be learned
            in front of the encoder.
        encodes_prefixes: Whether `encode` takes rows shorter than `length`. A causal encoder gives the same
            states for a prefix.
    """

    name: str
    width: int
    length: int
    start: int
    end: int
    pad: int
    takes_vectors: bool = True
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
            The hidden states as the denoiser reads them, `[B, length, D]`, and the pooled output `[B, P]` or
            None.
        """


@dataclass(frozen=True)
class TextPiece:
    """A part of a prompt for an encoder that takes no learned vectors.

    Attributes:
        text: Plain text.
        weight: Factor on its states, as in prompts.
        concept: The concept whose class noun the text is, repeated for each of its words; "" for other text.
    """

    text: str
    weight: float = 1.0
    concept: str = ""


class WholeText(NamedTuple):
    """A prompt that was encoded as a whole.

    Attributes:
        states: The text states that the sites read, `[1, N, D]`.
        mentions: For each piece with a concept, in order, the rows of its noun.
        pooled: The pooled text `[1, P]`; None if the model reads none.
    """

    states: Tensor
    mentions: tuple[tuple[int, ...], ...]
    pooled: Tensor | None = None


class WholePromptEncoder(TextEncoder):
    """A text encoder that encodes whole prompts and takes no learned vectors. A concept is encoded as its
    class noun, and what it has learned acts at the tokens of that noun.
    """

    takes_vectors = False

    @abstractmethod
    def encode_pieces(self, pieces: Sequence[TextPiece]) -> WholeText:
        """Encodes a prompt."""

    def encode(self, ids: Tensor, slots: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        raise ConceptError(f"the text encoder '{self.name}' takes no learned vectors")


class Projections(Protocol):
    """Frozen projections of a model's sites. A host can offer these without the rest of a backbone."""

    @property
    def layout(self) -> SiteLayout: ...

    def project(self, site: Site, projection: str, x: Tensor) -> Tensor: ...

    def normalised(self, site: Site, projection: str, y: Tensor) -> Tensor: ...


class Backbone(ABC):
    """A frozen latent diffusion model. Learning never changes its weights.

    Attributes:
        layout: The sites of its denoiser.
        schedule: How it adds noise, and what it predicts.
        text: Its text encoders. The width of a context is the sum of their widths.
        latent_channels: C, the channels of a latent.
        picture_multiple: Pixels per latent cell along each side. Width and height of a picture must be
            multiples of it.
        fingerprint: Hash of the weights. A concept stores the fingerprint of the base that it was learned on.
        known_prompts: Prompts of pictures that the model draws well, for methods that measure what it does
            without a concept; () = prompts for a general model.
        learning_notes: What a person who learns on this model should know.
        overlay: Hash of changes to the model that the weights do not show (LoRA patches, CLIP skip); "" for
            none. A stopped run only resumes with the same overlay.
    """

    layout: SiteLayout
    schedule: Schedule
    text: tuple[TextEncoder, ...]
    latent_channels: int
    picture_multiple: int
    fingerprint: str
    known_prompts: tuple[str, ...] = ()
    learning_notes: tuple[str, ...] = ()
    overlay: str = ""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the denoiser."""

    @property
    @abstractmethod
    def parameter_count(self) -> int:
        """Number of weights of the denoiser."""

    def loaded_weights(self, with_text: bool) -> tuple[int, str]:
        """Bytes of the weights that are loaded while a concept is learned, and the type of most of them.

        Args:
            with_text: Whether the text encoders are needed in every step.
        """
        return 4 * self.parameter_count, "float32"

    def free_memory(self, with_text: bool) -> int | None:
        """Bytes that learning may still take on the device; None if that is unknown. with_text: as above."""
        return None

    can_offload: bool = False      # whether `make_room` can keep a part of the weights in main memory

    def make_room(self, size: int, offload: bool = False) -> None:
        """Keeps memory free on the device for learning. A host that manages memory unloads other models.

        Args:
            size: Bytes that learning takes beside the weights.
            offload: Whether a part of the weights may stay in main memory.
        """
        return

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in -1..1 to latents `[B, C, H/m, W/m]`, scaled for the denoiser. m is the
        picture multiple.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Inverse of `encode_images`, clamped to -1..1."""

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, context: Context,
                processor: AttentionProcessor | None = None) -> Tensor:
        """One evaluation of the denoiser.

        Args:
            latents: Noisy latents, `[B, C, h, w]`.
            timesteps: `[B]`, integer timesteps of the schedule.
            context: The prompts, B rows.
            processor: Changes what the sites compute. None runs the model unchanged.

        Returns:
            The UNet's output, `[B, C, h, w]` float32: what the schedule's `target` is.
            Gradients reach the context and the processor, never the weights.
        """

    @abstractmethod
    def project(self, site: Site, projection: str, x: Tensor) -> Tensor:
        """Applies one projection of a site, frozen weights plus folded deltas: x `[..., b]` to `[..., a]`."""

    def normalised(self, site: Site, projection: str, y: Tensor) -> Tensor:
        """Applies the site's norm of queries or keys to the output y `[..., a]` of to_q or to_k, heads apart.
        Most models have none.
        """
        return y

    @abstractmethod
    def folded(self, deltas: Deltas) -> AbstractContextManager[None]:
        """Context manager that adds `deltas` to the weights and restores the weights bit for bit on exit."""

    def training(self) -> AbstractContextManager[None]:
        """Context manager around a training run. A host prepares denoiser and text encoders for gradients
        here.
        """
        return nullcontext()

    def gradient_checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        """Context manager in which `predict` recomputes activations in the backward pass. A host may ignore
        it.
        """
        return nullcontext()
