"""A backbone of a transformer with joint attention of text and picture, in the form of Flux.2."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..model.checkpointing import recomputed
from ..model.context import Context
from ..model.flow import FlowSchedule
from ..model.fused import Projection, offset_of, path_of, projected
from ..model.joint_rows import attend_picture, fill_bias, flat, put_together, restarted, without_picture
from ..model.processor import AttentionProcessor
from ..model.sites import PROJECTIONS, Site, joint_layout
from .diffusers import ClipText
from .modules import ModuleBackbone


class JointBackbone(ModuleBackbone):
    """A backbone of a transformer that predicts the velocity of a flow.

    Args:
        transformer: Called with latents, times, text states and a runner of its blocks, see
            `demo.joint_transformer.JointTransformer`.
        vae: The autoencoder.
        text: Its text encoder. A context has one copy, because all sites read the same text.
        schedule: The flow's schedule.
        picture_size: Side in pixels of the pictures that it was trained on.
        time_scale: The transformer's time is the share of noise times this.
    """

    def __init__(self, transformer: Any, vae: Any, text: ClipText, schedule: FlowSchedule, picture_size: int,
                 time_scale: float = 1.0) -> None:
        text.model.requires_grad_(False).eval()
        double, single = (list(transformer.get_submodule(f"{kind}_blocks").children())
                          for kind in ("double", "single"))
        layout = joint_layout(len(double), len(single), transformer.heads, transformer.width,
                              ((text.name, text.width),))
        super().__init__(transformer, vae, (text,), schedule, layout)
        self._flow, self._picture_size, self._time_scale = schedule, picture_size, time_scale
        self.sites = {transformer.get_submodule(site.name): site for site in layout.sites}
        self.projections: dict[nn.Module, list[Projection]] = {}      # of every fused layer
        for site in layout.sites:
            for name in PROJECTIONS:
                module = transformer.get_submodule(path_of(site, name))
                self.projections.setdefault(module, []).append(
                    Projection(site, name, module, offset_of(site, name)))

    @property
    def picture_size(self) -> int:
        return self._picture_size

    def _linear(self, site: Site, projection: str) -> nn.Linear:
        linear = self.denoiser.get_submodule(path_of(site, projection))
        assert isinstance(linear, nn.Linear)
        return linear

    def part(self, site: Site, projection: str, weight: Tensor) -> Tensor:
        offset = offset_of(site, projection)
        return weight if offset is None else weight.narrow(*offset)

    def project(self, site: Site, projection: str, x: Tensor) -> Tensor:
        self.layout.refuse_joint("projecting text is")
        return x

    def predict(self, latents: Tensor, timesteps: Tensor, context: Context,
                processor: AttentionProcessor | None = None) -> Tensor:
        dtype, text = self.dtype, context.hidden[:, 0]
        fills = None if processor is not None and processor.masks_texts else context.fills()
        if processor is not None:
            processor.prepare(context)
            text = processor.extended(text)
        times = self._flow.sigma(timesteps) * self._time_scale
        return self.denoiser(latents.to(dtype), times, text.to(dtype), _Run(self, processor, fills)).float()

    def gradient_checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        return recomputed(self.denoiser, ("DoubleBlock", "SingleBlock") if enabled else ())


class _Run:
    """Runs projections and attentions of blocks with a processor, see `demo.joint_transformer.Runner`."""

    def __init__(self, backbone: JointBackbone, processor: AttentionProcessor | None,
                 fills: Tensor | None) -> None:
        self.backbone, self.processor, self.fills = backbone, processor, fills

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        x, own = x.to(self.backbone.dtype), self.backbone.projections.get(module)
        if self.processor is None or own is None:
            return module(x)
        return projected(module, own, [self.processor.project], x)

    def attend(self, block: nn.Module, joint) -> Tensor:
        mask = None
        if self.fills is not None:
            mask = fill_bias(self.fills, joint.query.shape[2] - joint.words).to(joint.query)
        if self.processor is None:
            return joint.plain(mask)
        query, key = joint.turned(tuple(restarted(part, self.processor.prompts, 0) for part in joint.table))
        rows = joint.words, query.shape[2]
        picture, mask = attend_picture(self.processor, self.backbone.sites[block], joint.query,
                                       (query, key, joint.value), rows, mask)
        others = F.scaled_dot_product_attention(without_picture(query, rows), key, joint.value, mask)
        return put_together(flat(others), picture, joint.words)
