"""What the backbones of torch modules have in common."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConceptError
from ..model.activations import free_memory, weights_of
from ..model.backbone import Backbone, TextEncoder
from ..model.deltas import Deltas
from ..model.schedule import Schedule
from ..model.sites import Site, SiteLayout


def multi_head(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention with concatenated heads: query `[B, S, a]`, key and value `[B, N, a]` to `[B, S, a]`."""
    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    return F.scaled_dot_product_attention(split(query), split(key), split(value)).transpose(1, 2).flatten(2)


class ModuleBackbone(Backbone):
    """A denoiser and an autoencoder with the interface of diffusers' AutoencoderKL, both frozen.

    Args:
        denoiser: A UNet or a transformer.
        vae: The autoencoder.
        text: The text encoders.
        schedule: The schedule that the denoiser was trained with.
        layout: The denoiser's sites.
    """

    def __init__(self, denoiser: nn.Module, vae: Any, text: tuple[TextEncoder, ...], schedule: Schedule,
                 layout: SiteLayout) -> None:
        for module in (denoiser, vae):
            module.requires_grad_(False).eval()
        self.denoiser, self.vae, self.text, self.schedule = denoiser, vae, text, schedule
        self.layout = layout
        self.latent_channels = vae.config.latent_channels
        self.picture_multiple = 2 ** (len(vae.config.block_out_channels) - 1)
        self.fingerprint = self._weight_hash()

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    @abstractmethod
    def picture_size(self) -> int:
        """Side in pixels of the pictures that the denoiser was trained on."""

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.denoiser.parameters())

    def loaded_weights(self, with_text: bool) -> tuple[int, str]:
        """All modules stay on the device, whether they are needed or not."""
        encoders = [getattr(encoder, "model", None) for encoder in self.text]
        return weights_of(self.denoiser, self.vae, *(model for model in encoders if model is not None))

    def free_memory(self, with_text: bool) -> int | None:
        return free_memory(self.device)

    def _weight_hash(self) -> str:
        """Hash of the first and last site's key weights in fp16, so that fp32 and fp16 files of a base have
        the same hash.
        """
        digest = hashlib.sha256()
        for site in (self.layout.sites[0], self.layout.sites[-1]):
            digest.update(self._linear(site, "to_k").weight.detach().half().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @abstractmethod
    def _linear(self, site: Site, projection: str) -> nn.Linear:
        """The module of a projection."""

    def part(self, site: Site, projection: str, weight: Tensor) -> Tensor:
        """The part of its layer's weight that is a projection: all of it, unless layers are fused."""
        return weight

    def weight(self, site: Site, projection: str) -> Tensor:
        """The weight of a projection `[out, in]`."""
        return self.part(site, projection, self._linear(site, projection).weight)

    def encode_images(self, images: Tensor) -> Tensor:
        config = self.vae.config
        parameter = next(self.vae.parameters())
        latents = self.vae.encode(images.to(parameter.device, parameter.dtype)).latent_dist.mean.float()
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return self.vae.decode(unscaled.to(next(self.vae.parameters()).dtype)).sample.float().clamp(-1, 1)

    def project(self, site: Site, projection: str, x: Tensor) -> Tensor:
        return self._linear(site, projection)(x.to(self.dtype))

    @contextmanager
    def folded(self, deltas: Deltas) -> Iterator[None]:
        before: dict[nn.Linear, Tensor] = {}
        try:
            for (index, projection), delta in deltas.items():
                site = self.layout.sites[index]
                linear = self._linear(site, projection)
                shape = tuple(self.weight(site, projection).shape)
                if tuple(delta.shape) != shape:
                    raise ConceptError(f"a {tuple(delta.shape)} delta does not fit {projection} of site "
                                       f"{index}, which is {shape}")
                if linear not in before:
                    before[linear] = linear.weight.data
                    linear.weight.data = linear.weight.data.clone()
                part = self.part(site, projection, linear.weight.data)
                part.copy_(part.float() + delta.dense().to(part.device))
            yield
        finally:
            for linear, data in before.items():
                linear.weight.data = data
