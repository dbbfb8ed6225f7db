"""ComfyUI's Train LoRA node on the embedded base. Import after `cost.standalone.start`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import comfy.model_management
import comfy.sample
import comfy.sd
import torch
from comfy_extras.nodes_train import TrainLoraNode
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import nodes

from ...core.comfy.demo import load_demo
from .curves import Point
from .trainers import BATCH, RANK, Subject


class ComfyTrainer:
    """Trains a LoRA of all layers, as the node does, and draws with it by ComfyUI's KSampler."""

    def __init__(self, base: str, subject: Subject) -> None:
        self.base, self.subject = base, subject
        self.model, self.clip, self.vae = load_demo(name=base)
        floor, photos = subject.score(self.drawn(self.model)), subject.levels[1]
        # the sampler differs, so the class noun has a score of its own
        self.subject = Subject(subject.suite, subject.task, (floor, photos))

    def _encode(self, text: str):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def drawn(self, model) -> Tensor:
        """Pictures of the class noun `[B, 3, H, W]` in -1..1."""
        settings, side = self.subject.suite.settings, self.subject.suite.settings.size[0]
        empty, pictures = self._encode(""), []
        for prompt, seed in zip(self.subject.prompts(nouns=True), self.subject.suite.seeds, strict=True):
            latent = torch.zeros(1, self.vae.latent_channels, *[side // self.vae.downscale_ratio] * 2)
            sampled = nodes.common_ksampler(model, seed, settings.steps, settings.cfg, "ddim", "ddim_uniform",
                                            self._encode(prompt), empty, {"samples": latent})[0]
            pictures.append(self.vae.decode(sampled["samples"]))
        return torch.cat(pictures).permute(0, 3, 1, 2) * 2 - 1

    def _trained(self, steps: int, rate: float, seed: int) -> tuple[dict, float]:
        """The LoRA after a number of steps, and the processor seconds of all steps."""
        task, marks = self.subject.task, []
        pixels = torch.stack([picture.pixels for picture in task.pictures]).permute(0, 2, 3, 1) / 2 + 0.5
        captions = [picture.caption.replace(f"<{task.name}>", task.class_noun) for picture in task.pictures]
        wanted = {"steps": steps, "rank": RANK, "learning_rate": rate, "batch_size": BATCH, "seed": seed,
                  "training_dtype": "fp32", "lora_dtype": "fp32", "gradient_checkpointing": False}
        settings = {field.id: [wanted.get(field.id, getattr(field, "default", None))]
                    for field in TrainLoraNode.define_schema().inputs}
        settings["existing_lora"] = ["[None]"]
        model = load_demo(name=self.base)[0]
        # newer versions load a copy
        model.cached_patcher_init = (lambda disable_dynamic=False: load_demo(name=self.base)[0], ())
        hook = register_optimizer_step_post_hook(lambda *_: marks.append(time.process_time()))
        try:
            with torch.inference_mode():
                given = {"model": [model], "latents": [{"samples": self.vae.encode(pixels)}],
                         "positive": [self._encode(caption) for caption in captions]}
                lora = TrainLoraNode.execute(**(settings | given))[0]
        finally:
            hook.remove()
            comfy.model_management.unload_all_models()
        return lora, (marks[-1] - marks[0]) * steps / (len(marks) - 1)

    def curve(self, rate: float, seed: int, marks: Sequence[int]) -> list[Point]:
        """Trains anew for every mark, because the node trains to its end."""
        points = []
        for steps in marks:
            lora, seconds = self._trained(steps, rate, seed)
            with torch.inference_mode():
                patched = comfy.sd.load_lora_for_models(self.model, None, lora, 1.0, 0.0)[0]
                points.append(Point(steps, seconds, self.subject.likeness(self.drawn(patched))))
        return points
