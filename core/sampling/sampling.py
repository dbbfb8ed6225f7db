"""Pictures of prompts that may name the concepts of a bank: classifier-free guidance with DPM-Solver++ (CIDM's protocol)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention.token_lora import TokenLoraProcessor
from ..bank.bank import ConceptBank
from ..bank.prompts import Prompt
from ..conditioning.encoding import encode_prompts, text_positions
from ..conditioning.routing import aggregate, averaged_names, token_lora_deltas
from ..errors import ConceptError
from ..model.backbone import AttentionProcessor, Backbone, Context
from ..model.deltas import Deltas
from ..model.solver import DpmSolver, Estimate, denoise, guided
from ..regional.processor import DeltaAndTokenLoraProcessor
from .attention_guidance import Artists, Subject
from .settings import SampleSettings


def starting_noise(backbone: Backbone, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
    """`[B, C, h, w]`, one generator per seed: a seed's picture does not depend on the batch it is in."""
    multiple = backbone.picture_multiple
    if any(side < multiple or side % multiple for side in size):
        raise ConceptError(f"the picture's size is {size[0]}x{size[1]}; both sides must be multiples of {multiple}")
    shape = (backbone.latent_channels, size[0] // multiple, size[1] // multiple)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def encode(backbone: Backbone, bank: ConceptBank, prompts: Sequence[str | Prompt], chunks: int = 1) -> Context:
    """Prompts that may name the bank's concepts, as one batch."""
    parsed = bank.vocabulary.parse_all(prompts)
    return encode_prompts(backbone, parsed, bank.token_groups({name for prompt in parsed for name in prompt.concepts}), chunks)


def repeated(context: Context, count: int) -> Context:
    return Context.cat([context] * count)


def _mover(backbone: Backbone, prompts: Sequence[Prompt], positive: Context, strength: float,
           processors: Sequence[AttentionProcessor | None]) -> Estimate | None:
    """The attention artists as what moves latents (the mean over an average's programs); None where there is nothing for them to do."""
    texts = [text_positions(backbone, prompt) for prompt in prompts]
    subjects = [Subject(tuple(words.values()), text) for words, text in zip(positive.words, texts, strict=True)]
    artists = [Artists(subjects, strength) for _ in processors]
    if not artists[0].works(0.0):
        return None

    def move(x: Tensor, t: int, progress: float) -> Tensor:
        def look(latents: Tensor, processor: AttentionProcessor) -> Tensor:
            return backbone.predict(latents, torch.full((len(latents),), t, device=latents.device), positive, processor)

        if not artists[0].works(progress):
            return x
        return torch.stack([artist.moved(x, look, processor) for artist, processor in zip(artists, processors, strict=True)]).mean(0)

    return move


def on_device(backbone: Backbone, deltas: Deltas) -> Deltas:
    return {key: delta.to(backbone.device) for key, delta in deltas.items()}


def word_bound_deltas(backbone: Backbone, bank: ConceptBank, prompts: Sequence[Prompt], settings: SampleSettings) -> dict[str, Deltas]:
    """Deltas of the bound concepts that the prompts name."""
    named = {name for prompt in prompts for name in prompt.concepts}
    return {name: on_device(backbone, deltas) for name, deltas in token_lora_deltas(bank, settings.strength, named).items()}


def _processors(backbone: Backbone, bank: ConceptBank, prompts: Sequence[Prompt], settings: SampleSettings,
              averaged: Sequence[str]) -> list[AttentionProcessor | None]:
    """What the sites do beside their folded weights: one program, or one per averaged concept's model; bound concepts are in each."""
    bound = word_bound_deltas(backbone, bank, prompts, settings)
    models = [DeltaAndTokenLoraProcessor(on_device(backbone, bank[name].deltas), bound) for name in averaged]
    return models or [TokenLoraProcessor(bound) if bound else None]


def _sample_group(backbone: Backbone, bank: ConceptBank, prompts: list[Prompt], seeds: list[int], settings: SampleSettings) -> Tensor:
    """Prompts that share their deltas: folded once, no cost per step; averages of predictions cost one evaluation per concept."""
    averaged = averaged_names(bank)
    deltas = aggregate(backbone, bank, prompts[0], settings.mode, settings.strength, without=averaged).deltas
    processors = _processors(backbone, bank, prompts, settings, averaged)
    negative_prompt, pictures = bank.parse(settings.negative), []
    with backbone.folded(deltas):
        for start in range(0, len(prompts), settings.batch):
            chunk = slice(start, start + settings.batch)
            positive = encode(backbone, bank, prompts[chunk])
            negative = repeated(encode(backbone, bank, [negative_prompt]), len(positive))
            latents = starting_noise(backbone, seeds[chunk], settings.size).to(backbone.device)

            def estimate(x: Tensor, t: int, _progress: float, negative: Context = negative, positive: Context = positive) -> Tensor:
                every = [guided(backbone, x, t, negative, positive, settings.cfg, processor) for processor in processors]
                return every[0] if len(every) == 1 else torch.stack(every).mean(0)

            move = _mover(backbone, prompts[chunk], positive, settings.artists, processors) if settings.artists else None
            latents = denoise(DpmSolver(backbone.schedule, settings.steps), latents, estimate, move)
            pictures.append(backbone.decode_latents(latents))
    return torch.cat(pictures)


@torch.inference_mode(False)      # weights folded under it would let no gradient of the artists pass
@torch.no_grad()
def sample(backbone: Backbone, bank: ConceptBank, prompts: Sequence[str | Prompt], seeds: Sequence[int],
           settings: SampleSettings) -> Tensor:
    """One picture per prompt and seed, `[B, 3, H, W]` in -1..1. Prompts that ask for the same deltas run together."""
    if len(prompts) != len(seeds) or not prompts:
        raise ConceptError(f"there are {len(prompts)} prompts and {len(seeds)} seeds; one seed per prompt is needed, one or more")
    parsed = bank.vocabulary.parse_all(prompts)
    groups: dict[tuple, list[int]] = {}
    for i, prompt in enumerate(parsed):
        named = tuple(sorted(prompt.concepts))
        groups.setdefault(named if settings.mode in ("sharp", "equal") else (prompt,), []).append(i)
    result: list[Tensor | None] = [None] * len(prompts)
    for members in groups.values():
        pictures = _sample_group(backbone, bank, [parsed[i] for i in members], [seeds[i] for i in members], settings)
        for i, picture in zip(members, pictures, strict=True):
            result[i] = picture
    return torch.stack(result)


