"""Samples a prompt that names several concepts, each restricted to the region where it is found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.prompts import Prompt
from ..conditioning.routing import always_on_deltas
from ..model.backbone import Backbone
from ..model.solver import denoise, guided, solver_for
from ..regional.found import FoundRegions
from .regions import guidance_rows, part_of
from .sampling import repeated, sample, starting_noise
from .settings import SampleSettings


@torch.no_grad()
def sample_found(backbone: Backbone, bank: ConceptBank, scene: str | Prompt, seeds: Sequence[int],
                 settings: SampleSettings) -> Tensor:
    """Samples a prompt whose concepts are each restricted to the region where they are found, see
    `regional.found`.

    For a prompt with fewer than two concepts, the result equals that of `sample`.

    Returns:
        `[B, 3, H, W]` in -1..1, one picture for each seed.
    """
    backbone.layout.refuse_joint("finding regions is")
    scene, count = bank.parse(scene), len(seeds)
    prompts = scene.apart(bank.infos)
    if len(prompts) < 2:
        return sample(backbone, bank, [scene] * count, seeds, settings)
    bank.check_fits(backbone.layout)
    negative_prompt = bank.parse(settings.negative)
    with backbone.folded(always_on_deltas(bank, averages=True)):
        latents = starting_noise(backbone, seeds, settings.size).to(backbone.device)
        size = (latents.shape[-2], latents.shape[-1])
        whole, *parts = (part_of(backbone, bank, prompt, negative_prompt, settings)
                         for prompt in (scene, *prompts.values()))
        words = [whole.context.words[1][name] for name in prompts]
        rows = guidance_rows(backbone, count, settings.cfg)
        processor = FoundRegions(backbone, whole, list(prompts), parts, words, rows, size)
        negative, positive = (repeated(whole.context[half:half + 1], count) for half in (0, 1))

        def estimate(x: Tensor, t: int, progress: float) -> Tensor:
            processor.progress = progress
            return guided(backbone, x, t, negative, positive, settings.cfg, processor)

        latents = denoise(solver_for(backbone.schedule, settings.steps), latents, estimate,
                          on_step=settings.on_step)
        return backbone.decode_latents(latents)
