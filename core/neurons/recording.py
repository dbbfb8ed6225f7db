"""Recorders of the inputs of the sites' projections: second moments for fusion, and pooled features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bank.prompts import NO_CONCEPTS
from ..conditioning.encoding import encode_prompts
from ..model.backbone import Backbone
from ..model.context import Context
from ..model.deltas import DeltaKey
from ..model.processor import AttentionProcessor
from ..model.sites import Site
from ..model.solver import FirstOrder, denoise, guided

RECORDED = ("to_q", "to_out")      # projections whose inputs depend on the picture
GUIDANCE = 5.0      # number of pictures denoised while recording
FEATURE_NOISE = 0.25      # timestep of the features, as a share of the noise schedule


class MomentRecorder(AttentionProcessor):
    """Means of x x^T `[b, b]` over passes, samples and cells, for the inputs x of to_q and to_out."""

    def __init__(self, inner: AttentionProcessor) -> None:
        self.inner = inner
        self.sums: dict[DeltaKey, Tensor] = {}
        self.counts: dict[DeltaKey, int] = {}

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        if projection in RECORDED:
            key, flat = (site.index, projection), x.detach().flatten(0, -2).float()
            moment = flat.T @ flat
            self.sums[key] = self.sums[key] + moment if key in self.sums else moment
            self.counts[key] = self.counts.get(key, 0) + len(flat)
        return self.inner.project(site, projection, x, y)

    def leading(self, key: DeltaKey, rows: int) -> Tensor:
        """R `[rows, b]`, padded with zeros, such that R^T R best approximates the second moment."""
        moment = self.sums[key].cpu().double() / self.counts[key]
        values, vectors = torch.linalg.eigh(moment)
        best = (values.clamp(min=0).sqrt() * vectors).T.flip(0)[:rows]
        return torch.cat([best, best.new_zeros(rows - len(best), best.shape[1])]).float()


@torch.inference_mode(False)
@torch.no_grad()
def record_moments(backbone: Backbone, context: Context, processor: AttentionProcessor, size: tuple[int, int],
                   passes: int, seed: int) -> MomentRecorder:
    """Records the inputs of the sites while pictures are denoised in first-order steps.

    Args:
        context: The unconditional row first, then one row per picture.
        processor: Attention processor during recording.
        size: (h, w) of the latents.
        passes: Number of denoising steps.
        seed: Seed of the starting noise.
    """
    recorder, count = MomentRecorder(processor), len(context) - 1
    negative, positive = Context.cat([context[0:1]] * count), context[1:]
    noise = torch.randn(count, backbone.latent_channels, *size, generator=torch.Generator().manual_seed(seed))

    def estimate(x: Tensor, t: int, _progress: float) -> Tensor:
        return guided(backbone, x, t, negative, positive, GUIDANCE, recorder)

    denoise(FirstOrder(backbone.schedule, passes), noise.to(backbone.device), estimate)
    return recorder


class PooledRecorder(AttentionProcessor):
    """Mean and standard deviation, over cells, of the input of every site, grouped by number of cells."""

    def __init__(self) -> None:
        self.by_size: dict[int, list[Tensor]] = {}

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        if projection == "to_q":
            wide = x.float()
            pooled = torch.cat([wide.mean(1), wide.std(1, correction=0)], dim=-1)
            self.by_size.setdefault(x.shape[1], []).append(pooled)
        return y

    def deepest(self) -> Tensor:
        """Features of the sites with the fewest cells, `[B, F]`."""
        return torch.cat(self.by_size[min(self.by_size)], dim=-1)


@torch.no_grad()
def unet_features(backbone: Backbone, latents: Tensor) -> Tensor:
    """Describes pictures by pooled activations at the deepest sites of the frozen base: `[B, F]`.

    These replace CLIP image features (our choice). The latents `[B, C, h, w]` get a little noise, the same
    for every picture, so that equal pictures have equal features. The prompt is empty.
    """
    t = int(FEATURE_NOISE * (len(backbone.schedule) - 1))
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
    features = []
    for chunk in latents.split(4):
        timesteps = torch.full((len(chunk),), t, device=chunk.device)
        context = encode_prompts(backbone, NO_CONCEPTS.parse_all([""] * len(chunk)), {})
        recorder = PooledRecorder()
        noisy = backbone.schedule.add_noise(chunk, noise.expand_as(chunk), timesteps)
        backbone.predict(noisy, timesteps, context, recorder)
        features.append(recorder.deepest())
    return torch.cat(features)
