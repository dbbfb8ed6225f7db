"""Families of models: what the rest of core/comfy must know of the model that it was given.

A family is one file. It says where a model reads text, how these sites run attention processors while the
host samples, and how the model is evaluated for learning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...model.backbone import TextEncoder
from ...model.context import Context
from ...model.schedule import Schedule
from ...model.sites import Site, SiteLayout

EMBEDDED_TEXT = "clip_l"      # of embedded transformers; no other transformer has it as its only encoder
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


class Family(ABC):
    """A MODEL of one family. The MODEL is never changed; hooks go into clones.

    Attributes:
        names: Its models, for messages.
        recomputed: The classes of the blocks that gradient checkpointing recomputes.
        guides_attention: Whether attention guidance knows its latents.
        learns_in_text: Whether gradients pass through the text encoders, so that words can be learned.
        reads_pooled: Whether the denoiser reads a pooled text.
        reads_weights: Whether the host's tokenizer reads weights in prompts, such as `(red:1.2)`; if not,
            they are text.
        learning_notes: What a person who learns on this MODEL should know.
        model: ComfyUI's MODEL.
        denoiser: ComfyUI's module.
        layout: The sites, as in every host.
    """

    names: ClassVar[str]
    recomputed: ClassVar[tuple[str, ...]]
    guides_attention: ClassVar[bool] = True
    learns_in_text: bool = True
    reads_pooled: bool = False
    reads_weights: bool = True
    learning_notes: tuple[str, ...] = ()
    model: Any
    denoiser: Any
    layout: SiteLayout

    def __deepcopy__(self, memo) -> Family:
        return self      # older hosts copy the patches of a MODEL

    @abstractmethod
    def __init__(self, model, text_widths: tuple[tuple[str, int], ...]) -> None: ...

    @classmethod
    @abstractmethod
    def knows(cls, model) -> bool:
        """Whether a MODEL belongs to this family."""

    @abstractmethod
    def path(self, site: Site, projection: str) -> str:
        """Module path of a projection inside the denoiser."""

    @abstractmethod
    def schedule(self) -> Schedule:
        """The MODEL's schedule. Raises ConceptError for one that is not supported."""

    @abstractmethod
    def text_encoders(self, clip, load: Callable[[], None]) -> tuple[TextEncoder, ...]:
        """The text encoders of a CLIP. load: loads their weights, before gradients pass through them."""

    def linear(self, site: Site, projection: str) -> nn.Linear:
        """The module of a projection."""
        return cast(nn.Linear, self.denoiser.get_submodule(self.path(site, projection)))

    def key(self, site: Site, projection: str) -> str:
        """Name of a projection's weight in a MODEL, as `add_patches` expects it."""
        return f"diffusion_model.{self.path(site, projection)}.weight"

    def patch_key(self, site: Site, projection: str) -> str | tuple[str, tuple[int, int, int]]:
        """The same for a patch, with the part of the weight: its dimension, first index, number of indices.
        """
        return self.key(site, projection)

    def project(self, site: Site, projection: str, x: Tensor) -> Tensor:
        """Applies the projection's currently loaded weights: x `[..., b]` to `[..., a]`."""
        return self.linear(site, projection)(x)

    def normalised(self, site: Site, projection: str, y: Tensor) -> Tensor:
        """Applies the site's norm of queries or keys to the output y `[..., a]` of to_q or to_k, heads apart.
        Most models have none.
        """
        return y

    # Sampling

    @abstractmethod
    def hook(self, clone, self_attention: bool = False) -> None:
        """Makes the sites of a MODEL's clone run the processors that its `DiffusionWrapper` selects.

        Args:
            self_attention: Whether processors may also change the self-attention of the sites' blocks.
        """

    @abstractmethod
    def add_layer_copies(self, clone) -> None:
        """Makes the sites of a MODEL's clone read their layer copies. Other nodes' patches stay."""

    @abstractmethod
    def is_alone(self, options: dict) -> bool:
        """Whether no other node's code runs between to_q and to_out of the sites."""

    @abstractmethod
    def reads_own_text(self, options: dict) -> bool:
        """Whether no other node changes the text of the sites. Asked only if `is_alone`."""

    @property
    def channels(self) -> int:
        """Channels of what the denoiser reads: latents, and possibly a picture."""
        return self.denoiser.in_channels

    @property
    def reads_picture(self) -> bool:
        """Whether the denoiser reads a picture beside latents and text, as an inpainting model does."""
        return self.channels > self.model.model.latent_format.latent_channels

    @abstractmethod
    def has_foreign_self_attention(self, options: dict) -> bool:
        """Whether another node replaces the self-attention of the sites' blocks."""

    @contextmanager
    def attached(self, denoiser: Any = None, learns: bool = False) -> Iterator[None]:
        """Context manager around calls of the denoiser, in which its sites run attention processors.

        Args:
            denoiser: The module that is called; the host may have made a copy. None = this MODEL's.
            learns: Whether core itself calls it, with processors that may change projections.
        """
        yield

    def rows(self, states: Tensor, extra: Mapping[str, Any]) -> Tensor:
        """The text that the sites read, `[B, N, D]`, from the states of a CONDITIONING and its dictionary."""
        return states

    # Learning

    @abstractmethod
    def own_options(self) -> Mapping[str, Any]:
        """Transformer options of a call that core makes itself, without other nodes' patches."""

    @abstractmethod
    def evaluate(self, latents: Tensor, timesteps: Tensor, context: Context, options: dict,
                 pixels: int) -> Tensor:
        """One evaluation of the denoiser, inside `attached`.

        Args:
            latents: Noisy latents, `[B, C, h, w]`.
            timesteps: `[B]`, integer timesteps of the schedule.
            context: The prompts, B rows.
            options: Transformer options.
            pixels: Pixels per latent cell along each side.

        Returns:
            The output, `[B, C, h, w]`, in the host's type.
        """


def computation_type(base) -> torch.dtype:
    """The type in which the host computes, which may differ from the type of the stored weights."""
    return base.get_dtype() if base.manual_cast_dtype is None else base.manual_cast_dtype


def is_plain(linear: nn.Module) -> bool:
    """Whether a projection is an ordinary torch linear layer. Other kinds of layers may fail on an empty
    text.
    """
    weight = linear.weight
    is_own = type(weight) in (Tensor, nn.Parameter) and weight.device.type in ("cpu", "cuda")
    return is_own and weight.dtype in _PLAIN


def append_once(clone, name: str, patch) -> None:
    """Appends a patch to a MODEL's clone unless it has one of its class, as with two
    ElasticWeightAggregate nodes."""
    patches = clone.model_options["transformer_options"].get("patches", {}).get(name, [])
    if not any(type(other) is type(patch) for other in patches):
        clone.set_model_patch(patch, name)
