"""Samples prompts that may name a bank's concepts, with classifier-free guidance and DPM-Solver++ (CIDM's
protocol), or Euler's method for a base of flow matching.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention.token_lora import TokenLoraProcessor
from ..bank.bank import ConceptBank
from ..bank.prompts import Prompt
from ..conditioning.encoding import encode_prompts, text_positions
from ..conditioning.routing import (
    aggregate,
    averaged_names,
    by_strength,
    name_on_all_words,
    negative_only,
    prompt_deltas,
    refuse_negative_only,
    token_lora_deltas,
)
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.context import Context
from ..model.deltas import Deltas
from ..model.processor import AttentionProcessor
from ..model.solver import Estimate, denoise, guided, solver_for
from .attention_guidance import AttentionGuidance, Subject
from .settings import SampleSettings


def starting_noise(backbone: Backbone, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Starting noise `[B, C, h, w]` for pictures of a size in pixels, on the CPU.

    Every seed has its own generator, so that a picture does not depend on its batch.

    Raises:
        ConceptError: A side is not a multiple of the backbone's picture multiple.
    """
    multiple = backbone.picture_multiple
    if any(side < multiple or side % multiple for side in size):
        raise ConceptError(f"the picture's size is {size[1]}x{size[0]} (width x height); "
                           f"both sides must be multiples of {multiple}")
    shape = (backbone.latent_channels, size[0] // multiple, size[1] // multiple)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def encode(backbone: Backbone, bank: ConceptBank, prompts: Sequence[str | Prompt],
           chunks: int = 1) -> Context:
    """Encodes prompts that may name the bank's concepts, as one batch."""
    parsed = bank.vocabulary.parse_all(prompts)
    named = {name for prompt in parsed for name in prompt.concepts}
    return encode_prompts(backbone, parsed, bank.token_groups(named), chunks,
                          by_strength=by_strength(bank, named))


def encode_negative(backbone: Backbone, bank: ConceptBank, negative: Prompt, positive: Sequence[Prompt],
                    mode: str) -> Context:
    """Encodes a negative prompt. Prompt-activated concepts that only it names act at all its tokens.

    Raises:
        ConceptError: It names such a concept, and the base has joint attention.
    """
    names = negative_only(bank.infos, negative, positive, mode)
    refuse_negative_only(backbone.layout, names)
    context = encode(backbone, bank, [negative])
    for name in names:
        context = context.with_concept(name_on_all_words(bank.infos[name]), negative.strength_of(name))
    return context


def repeated(context: Context, count: int) -> Context:
    return Context.cat([context] * count)


def on_device(backbone: Backbone, deltas: Deltas) -> Deltas:
    return {key: delta.to(backbone.device) for key, delta in deltas.items()}


def word_bound_deltas(backbone: Backbone, bank: ConceptBank, prompts: Sequence[Prompt], negative: Prompt,
                      settings: SampleSettings, others: Sequence[Prompt] = ()) -> dict[str, Deltas]:
    """Deltas of the word-bound concepts that the prompts name, and of those that act in the negative half
    alone. others: Prompts whose deltas act in both halves, too."""
    named = {name for prompt in (*prompts, negative) for name in prompt.concepts}
    only = negative_only(bank.infos, negative, (*prompts, *others), settings.mode)
    deltas = {**token_lora_deltas(bank, settings.strength, tuple(named)),
              **prompt_deltas(bank, only, settings.strength)}
    return {name: on_device(backbone, concept_deltas) for name, concept_deltas in deltas.items()}


def _guidance(backbone: Backbone, prompts: Sequence[Prompt], positive: Context, strength: float,
              processors: Sequence[AttentionProcessor | None]) -> Estimate | None:
    """A function that moves latents by attention guidance; None if guidance does nothing. With averaged
    predictions it is the mean over the models.
    """
    texts = [text_positions(backbone, prompt) for prompt in prompts]
    subjects = [Subject(tuple(words.values()), text)
                for words, text in zip(positive.words, texts, strict=True)]
    guidances = [AttentionGuidance(subjects, strength) for _ in processors]
    if not guidances[0].acts(0.0):
        return None
    backbone.layout.refuse_joint("attention guidance is")

    def move(latents: Tensor, t: int, progress: float) -> Tensor:
        def evaluate(latents: Tensor, processor: AttentionProcessor) -> Tensor:
            timesteps = torch.full((len(latents),), t, device=latents.device)
            return backbone.predict(latents, timesteps, positive, processor)

        if not guidances[0].acts(progress):
            return latents
        moved = [guidance.moved(latents, evaluate, processor)
                 for guidance, processor in zip(guidances, processors, strict=True)]
        return torch.stack(moved).mean(0)

    return move


def _processors(backbone: Backbone, bank: ConceptBank, prompts: Sequence[Prompt], negative: Prompt,
                settings: SampleSettings, averaged: Sequence[str]) -> list[AttentionProcessor | None]:
    """The attention processors: a single one, or one per model of averaged predictions. Word-bound concepts
    act in each.
    """
    word_bound = word_bound_deltas(backbone, bank, prompts, negative, settings)
    if averaged:
        return [TokenLoraProcessor(word_bound, on_device(backbone, bank[name].deltas)) for name in averaged]
    return [TokenLoraProcessor(word_bound) if word_bound else None]


def _sample_group(backbone: Backbone, bank: ConceptBank, prompts: list[Prompt], seeds: list[int],
                  settings: SampleSettings) -> Tensor:
    """Samples prompts with the same deltas, which are folded once. Averaging predictions costs one evaluation
    per concept.
    """
    averaged = averaged_names(bank)
    deltas = aggregate(backbone, bank, prompts[0], settings.mode, settings.strength, without=averaged).deltas
    negative_prompt, pictures = bank.parse(settings.negative), []
    processors = _processors(backbone, bank, prompts, negative_prompt, settings, averaged)
    with backbone.folded(deltas):
        for start in range(0, len(prompts), settings.batch):
            chunk = slice(start, start + settings.batch)
            positive = encode(backbone, bank, prompts[chunk])
            negative = repeated(encode_negative(backbone, bank, negative_prompt, prompts, settings.mode),
                                len(positive))
            latents = starting_noise(backbone, seeds[chunk], settings.size).to(backbone.device)

            def estimate(x: Tensor, t: int, _progress: float, negative: Context = negative,
                         positive: Context = positive) -> Tensor:
                noises = [guided(backbone, x, t, negative, positive, settings.cfg, processor)
                          for processor in processors]
                return noises[0] if len(noises) == 1 else torch.stack(noises).mean(0)

            move = None
            if settings.artists:
                move = _guidance(backbone, prompts[chunk], positive, settings.artists, processors)
            latents = denoise(solver_for(backbone.schedule, settings.steps), latents, estimate, move,
                              settings.on_step)
            pictures.append(backbone.decode_latents(latents))
    return torch.cat(pictures)


@torch.inference_mode(False)      # attention guidance needs gradients through the folded weights
@torch.no_grad()
def sample(backbone: Backbone, bank: ConceptBank, prompts: Sequence[str | Prompt], seeds: Sequence[int],
           settings: SampleSettings) -> Tensor:
    """Samples pictures `[B, 3, H, W]` in -1..1, one per prompt and seed. Prompts with the same deltas share a
    batch.

    Raises:
        ConceptError: There are no prompts, or the numbers of seeds and prompts differ.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ConceptError(f"there are {len(prompts)} prompts and {len(seeds)} seeds; "
                           "one seed per prompt is needed, one or more")
    parsed = bank.vocabulary.parse_all(prompts)
    groups: dict[tuple, list[int]] = {}
    for i, prompt in enumerate(parsed):
        named = tuple(sorted((name, prompt.strength_of(name)) for name in prompt.concepts))
        groups.setdefault(named if settings.mode in ("sharp", "equal") else (prompt,), []).append(i)
    pictures: dict[int, Tensor] = {}
    for members in groups.values():
        group = [parsed[i] for i in members], [seeds[i] for i in members]
        sampled = _sample_group(backbone, bank, *group, settings)
        pictures.update(zip(members, sampled, strict=True))
    return torch.stack([pictures[i] for i in range(len(prompts))])
