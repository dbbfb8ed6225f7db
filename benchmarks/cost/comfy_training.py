"""Training in ComfyUI, and ComfyUI's Train LoRA node, on random models of a checkpoint's shape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import torch

from ...core.comfy.backbone import ComfyBackbone
from ...core.model.activations import weights_of
from ..regional.comfy_cost import SHAPES, random_model
from .rivals import RANK, peft_rival
from .synthetic import TOKENS, random_weights
from .training import Setup, Timing, optimizer_steps

TEXTS = {"sd15": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
         "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)}
BLOCKS = 28      # of Anima


def random_parts(setup: Setup) -> tuple:
    """MODEL and CLIP of a setup. Anima's text encoder has a single layer, and that of a model with fewer
    blocks has two.
    """
    if setup.shape != "anima":
        model = random_model(setup.shape, setup.base, setup.small, setup.blocks)
        return model, random_clip(setup.shape, setup.small or setup.blocks > 0)
    from .anima import TINY, Sizes, anima_clip, anima_model

    sizes = TINY if setup.small else Sizes(setup.blocks or BLOCKS, width=2048, adapter_layers=6)
    return anima_model(sizes, getattr(torch, setup.base or "float32")), anima_clip()


def random_clip(shape: str, small: bool = False):
    """A random CLIP of a checkpoint's shape. small: with two layers."""
    target = comfy.supported_models_base.ClipTarget(*TEXTS[shape])
    clip = comfy.sd.CLIP(target)
    for encoder in clip.cond_stage_model.children() if small else ():
        layers = encoder.transformer.text_model.encoder.layers
        del layers[2:]
    random_weights(clip.cond_stage_model)
    return clip


class ComfyHost:
    """Trains on a loaded MODEL and CLIP, like Concept Learner."""

    def __init__(self, setup: Setup) -> None:
        self.backbone, self.setup = ComfyBackbone(*random_parts(setup)), setup

    @property
    def weights(self) -> int:
        """Bytes of the weights of all models."""
        return weights_of(self.backbone.unet, self.backbone.clip.cond_stage_model)[0]

    def training(self) -> contextlib.AbstractContextManager:
        return self.backbone.training()

    def release(self) -> None:
        del self.backbone

    def rivals(self) -> Mapping[str, Callable[[int], Timing]]:
        return {**peft_rival(self.setup),
                "core": lambda steps: self._core(steps, gradient_checkpointing=True),
                "core_without_checkpointing": lambda steps: self._core(steps, gradient_checkpointing=False)}

    def _text(self) -> list:
        """A random prompt."""
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(1, TOKENS, SHAPES[self.setup.shape]["context_dim"], generator=generator)
        return [hidden, {"pooled_output": torch.randn(1, 1280, generator=generator)}
                if self.setup.shape == "sdxl" else {}]

    def _core(self, steps: int, **overrides) -> Timing:
        """Runs ComfyUI's node with its defaults, except for rank and precision, which are ours."""
        from comfy_extras.nodes_train import TrainLoraNode

        dtype = {"float32": "fp32", "bfloat16": "bf16"}[self.setup.precision]
        wanted = {"steps": steps, "rank": RANK, "training_dtype": dtype, "lora_dtype": "fp32", **overrides}
        settings = {field.id: [wanted.get(field.id, getattr(field, "default", None))]
                    for field in TrainLoraNode.define_schema().inputs}
        settings["existing_lora"] = ["[None]"]
        shape, side = self.setup.shape, self.setup.side
        model = random_model(shape)
        # newer versions load a copy
        model.cached_patcher_init = (lambda disable_dynamic=False: random_model(shape), ())
        latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
        inputs = {"model": [model], "latents": [{"samples": latents}], "positive": [[self._text()]]}
        try:
            return optimizer_steps(lambda: TrainLoraNode.execute(**(settings | inputs)))
        finally:
            comfy.model_management.unload_all_models()
