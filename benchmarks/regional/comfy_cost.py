"""Cost of regions in ComfyUI, on a UNet of Stable Diffusion 1.5's shape with random weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.supported_models
import torch
from torch import Tensor

from ...core.comfy.apply import with_word_bound
from ...core.comfy.families import find_sites
from ...core.comfy.families.base import Family
from ...core.comfy.prompt_marks import Conditioning, marked
from ...core.comfy.region_run import RegionRun
from ...core.comfy.regions import with_regions
from ...core.comfy.sites import ATTENTION, WORDS, OffsetCond, differentiable_attention
from ...core.comfy.token_lora import code
from ...core.model.deltas import Deltas
from ...core.regional.noise import NoiseSettings
from ...core.regional.processor import Part
from ...core.regional.regions import Box
from ..cost.synthetic import TOKENS, Operations, context_of, deltas_of, peak_gb, random_weights
from .boxes import Measurement, boxes_of, parts_of

_COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False,
}
SHAPES: dict[str, dict] = {
    "sd15": _COMMON | {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "context_dim": 768,
        "num_heads": 8, "num_head_channels": -1, "use_linear_in_transformer": False, "adm_in_channels": None,
    },
    "sdxl": _COMMON | {
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
        "context_dim": 2048, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True,
        "adm_in_channels": 2816, "num_classes": "sequential",
    },
}


def random_model(shape: str = "sd15", base: str = "", small: bool = False, blocks: int = 0):
    """A MODEL of a checkpoint's shape with random weights, scaled so that activations stay finite.

    Args:
        shape: A key of `SHAPES`.
        base: Type of the weights; "" = float32 on a processor, float16 on a graphics card.
        small: Whether the model is narrow: 64 channels instead of 320.
        blocks: Transformer blocks where SDXL has ten; 0 = ten.
    """
    device = comfy.model_management.get_torch_device()
    dtype = getattr(torch, base or ("float32" if device.type == "cpu" else "float16"))
    family = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[shape]
    wanted = SHAPES[shape] | ({"model_channels": 64} if small else {})
    if blocks:
        wanted |= {name: [min(depth, blocks) for depth in wanted[name]]
                   for name in ("transformer_depth", "transformer_depth_output")}
        wanted["transformer_depth_middle"] = min(wanted["transformer_depth_middle"], blocks)
    config = family(wanted | {"dtype": dtype})
    config.unet_config["dtype"] = dtype
    if dtype.itemsize == 1:      # weights of 8 bits are cast for every product
        config.manual_cast_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = config.get_model({}, device=torch.device("cpu"))
    random_weights(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu"))


class ComfyCost:
    """Times single steps of KSampler and measures peak memory. pixels: side of the picture; small: see
    `random_model`."""

    def __init__(self, pixels: int, steps: int, small: bool = False) -> None:
        self.model, self.side, self.steps = random_model(small=small), pixels // 8, steps
        self.counter: Operations | None = None
        self.sites = find_sites(self.model, (("clip_l", 768),))

    def _conditioning(self, seed: int) -> Conditioning:
        return [[context_of(1, 1, seed=seed).hidden[:, 0], {}]]

    def _sampled(self, model, positive: Conditioning, negative: Conditioning) -> Measurement:
        latent, ends = torch.zeros(1, 4, self.side, self.side), []
        counter, steps = self.counter, self.steps if self.counter is None else 3
        if counter is not None:      # as on a graphics card, where attention is a single operation
            model = model.clone()
            model.model_options["transformer_options"][ATTENTION] = differentiable_attention
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))

        def sampling() -> None:
            with ExitStack() as stack:

                def callback(*_) -> None:
                    ends.append(time.perf_counter())
                    if counter is not None and len(ends) == 1:
                        stack.enter_context(counter)
                    elif len(ends) == 2:
                        stack.close()

                comfy.sample.sample(model, noise, steps, 7.0, "euler", "normal", positive, negative, latent,
                                    disable_pbar=True, seed=1, callback=callback)

        peak = peak_gb(sampling)
        return {"peak_gb": peak, "seconds": [end - begin for begin, end in zip(ends, ends[1:], strict=False)]}

    def plain(self) -> Measurement:
        return self._sampled(self.model, self._conditioning(1), self._conditioning(0))

    def regions(self, boxes: Sequence[Box], is_word_bound: bool = True, crops: bool = False,
                isolated: bool = False) -> Measurement:
        """crops, isolated: whether all steps use crop denoising, or self-attention isolation."""
        regions, parts, word_bound = parts_of(self.sites.layout, boxes, is_word_bound)
        parts = [replace(part, word_bound={}) for part in parts]      # the run locates them by the words
        scene, words = Part(context_of(2, 1, seed=5), {}), [(3, 4)] * len(boxes)
        run = RegionRun(self.sites, scene, regions, parts, words, word_bound,
                        isolation=float(isolated))
        model = with_regions(self.model, run, NoiseSettings(crop_denoising=float(crops)))
        return self._sampled(model, marked(self._conditioning(1), 1), marked(self._conditioning(0), 0))

    def prompt(self, count: int) -> Measurement:
        """One prompt with `count` word-bound concepts, without regions."""
        names = [f"concept{i}" for i in range(count)]
        codes = [code(names[i]) if i < count else 0 for i in range(TOKENS)]
        words = OffsetCond(torch.tensor(codes).view(1, 1, -1, 1))
        no_words = OffsetCond(torch.zeros_like(words.cond))
        deltas = {name: deltas_of(self.sites.layout, seed=i) for i, name in enumerate(names)}
        model = with_word_bound(self.model, self.sites, deltas)

        def conditioning(seed: int, own: OffsetCond) -> Conditioning:
            return [[hidden, extra | {"model_conds": {WORDS: own}}]
                    for hidden, extra in self._conditioning(seed)]

        return self._sampled(model, conditioning(1, words), conditioning(0, no_words))

    def hooks(self, count: int) -> Measurement:
        """ComfyUI's built-in way: a LoRA hook and a mask per region."""
        positive: Conditioning = []
        for i, (_, left, _, right) in enumerate(boxes_of(count)):
            mask = torch.zeros(1, 8 * self.side, 8 * self.side)
            mask[..., round(left * mask.shape[-1]):round(right * mask.shape[-1])] = 1.0
            lora = _lora(self.sites, deltas_of(self.sites.layout, seed=i))
            hook = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
            conditioning = [self._conditioning(10 + i)]
            positive += comfy.hooks.set_conds_props(conditioning, 1.0, "default", mask=mask, hooks=hook)[0]
        return self._sampled(self.model, positive, self._conditioning(0))


def _lora(sites: Family, deltas: Deltas) -> dict[str, Tensor]:
    """Low-rank deltas as a LoRA file with ComfyUI's names."""
    lora = {}
    for (index, projection), delta in deltas.items():
        name = sites.key(sites.layout.sites[index], projection).removesuffix(".weight")
        lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"] = delta.tensors()
    return lora
