"""Stages 2 to 4: a UNet by v prediction and two transformers by flow matching, each with its text encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.demo import base, networks
from ...core.demo.base import TRANSFORMER_CLASSES
from ...core.demo.bases import FILES, read_sizes
from ...core.errors import ConceptError
from ...core.model.schedule import NoiseSchedule
from .latent_set import LatentSet
from .long_run import LongRun, Plan

# Share of uniform times. Most others lie near the middle, where it is decided what a picture shows.
UNIFORM_SHARE = 0.3
UNET_CENTRE, FLOW_CENTRE = 0.2, 0.4  # of the logit-normal times


def draw_times(batch: int, centre: float, generator: torch.Generator) -> Tensor:
    """Draws times in 0..1: logit-normal as in Stable Diffusion 3 (Esser et al. 2024), some uniform.

    Quantiles are spread evenly over the batch, which lowers the variance of the loss.

    Args:
        batch: how many.
        centre: mean of the normal distribution under the logistic function.
        generator: of the random numbers.

    Returns:
        `[batch]`.
    """
    even = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    normal = torch.special.ndtri(even[torch.randperm(batch, generator=generator)].clamp(1e-4, 1 - 1e-4))
    uniform = even[torch.randperm(batch, generator=generator)]
    chosen = torch.rand(batch, generator=generator) < UNIFORM_SHARE
    return torch.where(chosen, uniform, torch.sigmoid(centre + normal))


def start_modules(denoiser: nn.Module, known: str = "embedded-64") -> nn.ModuleDict:
    """The denoiser and the text encoder of the base `known`, which knows the captions already."""
    text_encoder = base.load_modules(FILES[known])["text_encoder"]
    return nn.ModuleDict({"denoiser": denoiser, "text_encoder": text_encoder}).requires_grad_(True)


def modules_of(kind: str, file: Path) -> tuple[nn.ModuleDict, int]:
    """The denoiser of this kind and the text encoder of a base file, and the steps that it was trained for.

    Raises:
        ConceptError: The file holds a denoiser of another kind.
    """
    if kind not in read_sizes(file):
        raise ConceptError(f"the base '{file}' holds no {kind}; allowed: a base with one")
    modules = base.load_modules(file)
    trained = nn.ModuleDict({"denoiser": modules[kind], "text_encoder": modules["text_encoder"]})
    return trained.requires_grad_(True), read_sizes(file)["notes"]["steps"]


def _encode(modules: Mapping[str, nn.Module], tokens: Tensor) -> Tensor:
    return modules["text_encoder"](tokens).last_hidden_state


def _compiled(modules: nn.ModuleDict) -> dict[str, nn.Module]:
    return {name: torch.compile(module, dynamic=False) for name, module in modules.items()}


def train_unet(config: dict, data: LatentSet, folder: Path, plan: Plan, stop: Callable[[], bool],
               batch: int = 48) -> LongRun:
    """v prediction on Stable Diffusion's schedule; returns the run, finished or not."""
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(0)
    unet = networks.build_unet(config)
    # On a CPU the fused kernel's backward pass takes two to five times as long.
    unet.set_attn_processor(AttnProcessor())
    modules = start_modules(unet.to(memory_format=torch.channels_last))
    run = LongRun(modules, folder, "unet", plan, stop)
    generator = torch.Generator().manual_seed(1009 + run.start)
    schedule = NoiseSchedule(networks.alphas_cumprod(), networks.SCHEDULE["prediction_type"])
    for _ in run:
        x, tokens = data.draw(batch, generator)
        times = (draw_times(batch, UNET_CENTRE, generator) * len(schedule)).long()
        times = times.clamp(max=len(schedule) - 1)
        noise = torch.randn(x.shape, generator=generator)
        noisy, target = schedule.add_noise(x, noise, times), schedule.target(x, noise, times)
        with torch.autocast("cpu", torch.bfloat16):
            output = modules["denoiser"](noisy, times, _encode(modules, tokens), return_dict=False)[0]
        run.learn((output.float() - target).square().mean())
    return run


def train_flow(kind: str, config: dict, time_scale: float, data: LatentSet, folder: Path, plan: Plan,
               stop: Callable[[], bool], batch: int = 64, compiled: bool = False,
               begun: Path | None = None) -> LongRun:
    """Flow matching: x_t = (1 - t) x + t noise, velocity noise - x; returns the run, finished or not.

    Args:
        kind: One of `TRANSFORMER_CLASSES`, with the sizes `config`.
        time_scale: The denoiser's time is t times this.
        data, folder, plan, stop, batch: As for `train_unet`.
        compiled: Compile the modules first. It takes two minutes and needs a C++ compiler; a step then
            takes 0.6 times as long.
        begun: A base file that holds the training so far; used where there is no checkpoint.
    """
    torch.manual_seed(0)
    if begun is None:
        modules, done = start_modules(TRANSFORMER_CLASSES[kind](**config), "embedded-128"), 0
    else:
        modules, done = modules_of(kind, begun)
    run = LongRun(modules, folder, kind, plan, stop, done)
    fast = _compiled(modules) if compiled else dict(modules.items())
    generator = torch.Generator().manual_seed(2003 + run.start)
    for _ in run:
        x, tokens = data.draw(batch, generator)
        times = draw_times(batch, FLOW_CENTRE, generator)
        noise, t = torch.randn(x.shape, generator=generator), times.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            text = _encode(fast, tokens)
            output = fast["denoiser"](torch.lerp(x, noise, t), times * time_scale, text)
        run.learn((output.float() - (noise - x)).square().mean())
    return run
