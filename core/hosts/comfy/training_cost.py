"""`bench training --comfyui`: learning in ComfyUI, and ComfyUI's own Train LoRA node, on Stable Diffusion 1.5's shape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch

from ...synthetic import context_of, random_weights
from ...training_cost import Look, optimizer_steps
from ...training_rivals import RANK, peft_rival
from .backbone import ComfyBackbone
from .cost import random_model


def random_clip():
    """A CLIP of SD1.5's shape."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(target)
    random_weights(clip.cond_stage_model)
    return clip


class ComfyHost:
    """Learning on a loaded MODEL and CLIP, as Concept Learner does."""

    def __init__(self, pixels: int, precision: str) -> None:
        self.backbone = ComfyBackbone(random_model(), random_clip())
        self.side, self.precision = pixels // 8, precision

    def training(self) -> contextlib.AbstractContextManager:
        return self.backbone.training()

    def rivals(self) -> Mapping[str, Callable[[int], Look]]:
        return {**peft_rival(self.side, self.precision),
                "core": lambda steps: self._core(steps, gradient_checkpointing=True),
                "core_without_checkpointing": lambda steps: self._core(steps, gradient_checkpointing=False)}

    def _core(self, steps: int, **other) -> Look:
        """ComfyUI's own node with its defaults but for the rank, which is ours, and float32 where we compute in it."""
        from comfy_extras.nodes_train import TrainLoraNode

        dtype = {"float32": "fp32", "bfloat16": "bf16"}[self.precision]
        wanted = {"steps": steps, "rank": RANK, "training_dtype": dtype, "lora_dtype": "fp32", **other}
        settings = {one.id: [wanted.get(one.id, getattr(one, "default", None))] for one in TrainLoraNode.define_schema().inputs}
        settings["existing_lora"] = ["[None]"]
        model = random_model()
        model.cached_patcher_init = (lambda disable_dynamic=False: random_model(), ())      # newer hosts make their copy by loading again
        latents = torch.randn(1, 4, self.side, self.side, generator=torch.Generator().manual_seed(1))
        things = {"model": [model], "latents": [{"samples": latents}], "positive": [[[context_of(1, 1, seed=1).hidden[:, 0], {}]]]}
        try:
            return optimizer_steps(lambda: TrainLoraNode.execute(**(settings | things)))
        finally:
            comfy.model_management.unload_all_models()
