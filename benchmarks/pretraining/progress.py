"""Pictures of a 128-pixel base in training, and the share of unseen captions that it follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.demo import base, judges, networks, vocabulary
from ...core.errors import ConceptError
from ...core.sampling.sampling import sample
from ...core.sampling.settings import SampleSettings
from . import sizes, stages
from .long_run import load_average

PROMPTS = (
    "a photo of a red striped dog on a beach",
    "a photo of a blue checked robot in a meadow",
    "a photo of a green spotted cat in the snow",
    "a photo of a yellow striped fish in a room",
    "a photo of a brown teddy bear wearing a red hat at night",
    "a photo of a pink backpack and a green car in a meadow",
    "an ink drawing of a dog",
    "an ink drawing of a striped fish",
    "a drawing of a robot",
    "a drawing of a spotted cat",
    "a neon sign of a car",
    "a pastel painting of a purple checked duck toy",
)
SHEET_SEED = 5
CAPTIONS_SEED = 33_000  # the captions of the benchmark `base`
FLOW_SHIFT = 2.0
Draw = Callable[[list[str], list[int]], Tensor]


def trained_modules(folder: Path, kind: str) -> tuple[dict, int]:
    """The averaged weights of the newest checkpoints.

    Args:
        folder: of the training.
        kind: One of `base.DENOISERS`.

    Returns:
        The modules as `base.save_base` takes them, and the training step of the denoiser.

    Raises:
        ConceptError: there is no checkpoint.
    """
    tokenizer = vocabulary.load(base.TOKENIZER)
    if kind == "unet":
        denoiser = networks.build_unet(sizes.UNET)
    else:
        denoiser = base.TRANSFORMER_CLASSES[kind](**stages.FLOWS[kind][0])
    text_encoder = networks.build_text_encoder(tokenizer)
    trained = torch.nn.ModuleDict({"denoiser": denoiser, "text_encoder": text_encoder})
    step = load_average(trained, folder / "checkpoints", kind)
    if step == 0:
        raise ConceptError(f"{folder / 'checkpoints'} holds no checkpoint of the {kind}")
    return {kind: denoiser.eval(), "vae": stages.autoencoder_of(folder), "text_encoder": text_encoder.eval(),
            "tokenizer": tokenizer}, step


def draw_with_unet(modules: dict, steps: int, cfg: float) -> Draw:
    """Draws with the library's sampler."""
    backbone = base.as_backbone(modules)
    settings = SampleSettings(steps=steps, cfg=cfg, size=(sizes.PICTURE, sizes.PICTURE))
    return lambda prompts, seeds: sample(backbone, ConceptBank(backbone.layout), prompts, seeds, settings)


def shifted_times(steps: int, shift: float = FLOW_SHIFT) -> Tensor:
    """Times `[steps + 1]` from 1 to 0, denser near 1 (ComfyUI's `time_snr_shift`)."""
    even = torch.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


@torch.no_grad()
def flow_sample(transformer, time_scale: float, noise: Tensor, text: Tensor, empty: Tensor, steps: int,
                cfg: float) -> Tensor:
    """Heun's method on the guided velocity, with one evaluation in the last step.

    Args:
        transformer: predicts the velocity.
        time_scale: its times are the share of noise times this.
        noise: `[B, C, h, w]`.
        text: states of the prompts `[B, L, D]`.
        empty: states of the empty prompt, of the same shape.
        steps: how many.
        cfg: strength of the guidance; 1 is none.

    Returns:
        Latents `[B, C, h, w]`.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times = (t * time_scale).expand(2 * len(x))
        unconditional, conditional = transformer(torch.cat([x, x]), times, torch.cat([empty, text])).chunk(2)
        return unconditional + cfg * (conditional - unconditional)

    x, times = noise, shifted_times(steps)
    for t, following in zip(times[:-1], times[1:], strict=True):
        slope = velocity(x, t)
        euler = x + (following - t) * slope
        x = euler if following == 0 else x + (following - t) * 0.5 * (slope + velocity(euler, following))
    return x


def draw_with_transformer(modules: dict, steps: int, cfg: float) -> Draw:
    """Draws with `flow_sample`; a seed gives the same noise as in the library's sampler."""
    kind = next(name for name in stages.FLOWS if name in modules)
    scale = stages.FLOWS[kind][1]

    def encode(texts: list[str]) -> Tensor:
        tokens = modules["tokenizer"](texts, padding="max_length", truncation=True,
                                      max_length=vocabulary.CONTEXT_LENGTH)
        return modules["text_encoder"](torch.tensor(tokens.input_ids)).last_hidden_state

    @torch.no_grad()
    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        side, pictures = sizes.PICTURE // modules["vae"].patch, []
        for i in range(0, len(prompts), 16):
            chunk = prompts[i : i + 16]
            empty = encode([""] * len(chunk))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + 16]]
            noise = torch.stack([torch.randn(sizes.CHANNELS, side, side, generator=g) for g in generators])
            latents = flow_sample(modules[kind], scale, noise, encode(chunk), empty, steps, cfg)
            pictures.append(modules["vae"].decode(latents).sample.clamp(-1, 1))
        return torch.cat(pictures)

    return draw


@torch.no_grad()
def captions_followed(draw: Draw, count: int) -> dict[str, float]:
    """Shares of pictures with the right class, body colour and both, for captions of unseen combinations."""
    prompts = judges.held_out_prompts(count, CAPTIONS_SEED)
    pictures = draw([text for text, _, _ in prompts], list(range(count)))
    named = judges.load_classifier().name(judges.at_encoder_size(pictures))
    kinds = [k == kind for (k, _), (_, kind, _) in zip(named, prompts, strict=True)]
    colours = [c == colour for (_, c), (_, _, colour) in zip(named, prompts, strict=True)]
    both = [a and b for a, b in zip(kinds, colours, strict=True)]
    return {"class": sum(kinds) / count, "colour": sum(colours) / count, "both": sum(both) / count}
