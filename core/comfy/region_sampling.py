"""Prepares MODEL and prompts for KSampler from a scene, its regions and a bank's concepts."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.hints import notes_on_base
from ..bank.prompts import Prompt
from ..charts import regions_picture
from ..conditioning.routing import (
    always_on_deltas,
    name_on_all_words,
    negative_only,
    refuse_negative_only,
    token_lora_deltas,
)
from ..errors import ConceptError
from ..images import to_tensor
from ..model.context import Context
from ..model.deltas import Deltas
from ..regional.noise import NoiseSettings
from ..regional.processor import Part
from ..regional.regions import Region, masks_of
from ..sampling.settings import SampleSettings
from .apply import context_of, fold, with_attention_guidance, with_word_bound
from .backbone import weight_hash
from .concept_clip import concept_clip, encode, learned_positions, subject_of, vocabulary_of
from .concept_tokenizer import log
from .families import find_sites
from .families.base import Family
from .model_concepts import KnownConcepts, added, concepts_in, without_concepts, without_prompt_activated
from .noun_clip import ROW_COUNT, on_all_rows
from .prompt_marks import Conditioning, marked
from .prompt_states import with_strength
from .region_run import FoundRun, RegionRun
from .regions import refuse_regions, whole_frame_things, with_found, with_regions
from .text import reads_rows, text_widths
from .token_lora import code

PROPORTIONS = 0.05      # allowed relative difference between the aspect ratios of mask and picture


class ConceptPrompts:
    """Prompts of one sampling, encoded by a CLIP with the bank's concepts, and their deltas.

    Args:
        clip: ComfyUI's CLIP.
        model: A MODEL; the concepts that it carries may be named too.
        bank: The sampling's own bank.
        strength: Factor on the deltas of the bank's concepts.
        tell: Takes notes on the prompts.
    """

    def __init__(self, clip, model, bank: ConceptBank, sites: Family, strength: float = 1.0,
                 tell: Callable[[str], None] = log) -> None:
        self._own, self.sites, self.base = token_lora_deltas(bank, strength), sites, model.model
        self.known = KnownConcepts(bank, strength, concepts_in(model))
        self.clip = clip
        for known, _ in reversed(self.known.banks):
            self.clip = concept_clip(self.clip, known, sites.reads_weights, None, tell)
        self._in_negative: set[str] = set()      # prompt-activated concepts that act in a negative half alone
        self.in_weights = {name for carried in concepts_in(model) for name in carried.weights}
        self.everywhere = set(self.in_weights)      # in a joint attention: those that act in regions, too

    def encode(self, prompt: str) -> Conditioning:
        return encode(self.clip, prompt)

    def negative(self, text: str, positive: str | Prompt, but: Collection[str] = ()) -> Conditioning:
        """Encodes a negative prompt. Prompt-activated concepts that only it names act at all its tokens.

        Args:
            text: The negative prompt.
            positive: The prompt beside it.
            but: Concepts that act already.
        """
        conditioning, parsed = self.encode(text), vocabulary_of(self.clip).parse(text)
        infos = {name: self.known.infos[name] for name in parsed.concepts if name in self.known.infos}
        if any(info.composes.acts_on_all_words for info in infos.values()):
            for name in negative_only(infos, parsed, [self.parse(positive)], "sharp"):
                if name not in but:
                    refuse_negative_only(self.sites.layout, [name])
                    self._in_negative.add(name)
                    act_on_all = on_all_rows if reads_rows(self.clip) else with_strength
                    conditioning = act_on_all(conditioning, code(name_on_all_words(infos[name])),
                                              parsed.strength_of(name))
        return conditioning

    @property
    def own(self) -> Mapping[str, Deltas]:
        """Concept -> its deltas, for the sampling's own word-bound concepts and those of negative prompts."""
        return ChainMap(self._own, self.known.each(self._in_negative))  # type: ignore[arg-type]

    @property
    def word_bound(self) -> Mapping[str, Deltas]:
        """The same, with the word-bound concepts that the model carries."""
        return ChainMap(self.known.word_bound, self.known.each(self._in_negative))  # type: ignore[arg-type]

    def parse(self, prompt: str | Prompt) -> Prompt:
        """Parses a prompt; raises ConceptError for a concept that neither the bank nor the model holds."""
        unknown = [name for name in vocabulary_of(self.clip).parse(prompt).concepts
                   if name not in self.known.infos]
        if unknown:
            raise ConceptError(f"the prompt names <{unknown[0]}>, which the CLIP knows, but neither the bank "
                               "nor the model holds it; connect the model of Apply Concepts, or "
                               "the bank")
        return self.known.vocabulary.parse(prompt)

    def deltas(self, prompt: str | Prompt) -> Deltas:
        """Deltas of the prompt-activated concepts in a region's prompt. In a joint attention these act in the
        whole picture, so the scene must name them."""
        if not self.sites.layout.is_joint:
            return self.known.deltas(self.parse(prompt))
        if self.known.deltas(self.parse(prompt), but=self.everywhere):
            raise ConceptError(f"the region '{prompt}' names a concept that acts on the whole picture on "
                               "this model; name it in the scene's prompt instead")
        return {}

    def scene_deltas(self, scene: str) -> Deltas:
        """Deltas of the prompt-activated concepts in the scene's prompt that are not in the weights already.
        """
        self.everywhere |= set(self.parse(scene).concepts)
        return self.known.deltas(self.parse(scene), but=self.in_weights)

    def named(self, scene: str) -> dict[str, Prompt]:
        """Concept -> its own prompt, for a scene with at least two concepts. Empty if the words of one cannot
        be located.
        """
        prompts = self.parse(scene).apart(self.known.infos)
        return prompts if 1 < len(prompts) == len(subject_of(self.clip, scene).concepts) else {}

    def regions(self, scene: Deltas, positive: Conditioning, negative: Conditioning,
                regions: Sequence[Region], overlap: str, isolation: float,
                negative_prompt: str = "") -> RegionRun:
        """Samplings with regions.

        Args:
            scene: The scene's deltas.
            positive, negative: The scene's prompts.
            regions, overlap, isolation: As for `RegionRun`.
            negative_prompt: The text of `negative`; empty if it is not known.
        """
        scene_negative = self._context(negative)
        negatives = [self._context(self.negative(text, region.prompt)) if text else scene_negative
                     for region in regions for text in [region.negative or negative_prompt]]
        parts = [self._part(region.prompt, context)
                 for region, context in zip(regions, negatives, strict=True)]
        words = [learned_positions(self.clip, region.prompt) for region in regions]
        whole = Part(self._both(scene_negative, positive), scene)
        return RegionRun(self.sites, whole, regions, parts, words, self.word_bound, overlap, isolation,
                         self.base)

    def found_regions(self, scene: str, deltas: Deltas, positive: Conditioning, negative: Conditioning,
                      negative_prompt: str = "") -> FoundRun:
        """A sampling that finds the regions of the scene's concepts. deltas: The scene's. negative_prompt: As
        for `regions`."""
        scene_negative, prompts = self._context(negative), self.named(scene)
        negatives = [self._context(self.negative(negative_prompt, prompt)) if negative_prompt
                     else scene_negative for prompt in prompts.values()]
        parts = [self._part(prompt, context)
                 for prompt, context in zip(prompts.values(), negatives, strict=True)]
        whole = Part(self._both(scene_negative, positive), deltas)
        everywhere = [Region(name, box=(0.0, 0.0, 1.0, 1.0)) for name in prompts]
        words = subject_of(self.clip, scene).concepts
        return FoundRun(self.sites, whole, everywhere, parts, words, self.word_bound, base=self.base)

    def _context(self, conditioning: Conditioning) -> Context:
        context = context_of(conditioning, self.known.copies, tuple(self.word_bound), self.sites)
        rows = context.hidden.shape[2]
        shares_calls = reads_rows(self.clip) and not self.sites.layout.is_joint      # if of one length
        if shares_calls and rows > ROW_COUNT:
            raise ConceptError(f"a prompt has {rows} tokens; with regions this model takes at most "
                               f"{ROW_COUNT}")
        return context

    def _part(self, prompt: str | Prompt, negative: Context) -> Part:
        text = prompt.text if isinstance(prompt, Prompt) else prompt      # the CLIP may have more concepts
        return Part(self._both(negative, self.encode(text)), self.deltas(prompt))

    def _both(self, negative: Context, positive: Conditioning) -> Context:
        return Context.cat([negative, self._context(positive)])


@dataclass(frozen=True)
class Prepared:
    """Inputs for KSampler: model, positive, negative. run: the sampling with regions; None without regions.
    """

    model: Any
    positive: Conditioning
    negative: Conditioning
    run: RegionRun | None = None

    def picture(self, samples: Tensor) -> Tensor | None:
        """Draws the regions and the attention of their words, `[1, H, W, 3]` in 0..1; None without regions.

        Args:
            samples: The sampled latents, `[B, C, h, w]`.
        """
        if self.run is None:
            return None
        if isinstance(self.run, FoundRun):
            found, names = self.run.found(), [f"<{region.prompt}>" for region in self.run.regions]
            if found is None:
                return torch.zeros(1, 64, 64, 3)
            return to_tensor(regions_picture(found, found, names))
        height, width = samples.shape[-2:]
        maps, prompts = self.run.maps((height, width)), [region.prompt for region in self.run.regions]
        return to_tensor(regions_picture(masks_of(self.run.regions, height, width), maps, prompts))


@dataclass(frozen=True)
class Scene:
    """The prompts of the whole picture. positive, negative: CONDITIONINGs of other nodes, which replace the
    encoded texts.
    """

    prompt: str
    negative_prompt: str = ""
    positive: Conditioning | None = None
    negative: Conditioning | None = None


def prepare(model, clip, bank: ConceptBank | None, scene: Scene, regions: Sequence[Region],
            latent: tuple[int, int], settings: SampleSettings, find_regions: bool = False,
            tell: Callable[[str], None] = log) -> Prepared:
    """Prepares the inputs of KSampler for a scene, with or without regions.

    Args:
        model, clip: ComfyUI's MODEL and CLIP; neither is changed.
        latent: Height and width of the latents.
        settings: Only strength, noise, overlap, isolation and artists are used.
        find_regions: If no regions are given, whether to find those of the scene's concepts.
        tell: Takes notes on the prompts.

    Raises:
        ConceptError: The bank does not fit the model, a mask does not fit the picture, or settings contradict
            each other.
    """
    if find_regions and settings.artists > 0:
        raise ConceptError(f"find_regions is on and attention guidance (artists) is {settings.artists}; both "
                           "separate concepts without regions, so use one of them")
    sites = find_sites(model, text_widths(clip))
    bank = ConceptBank(sites.layout) if bank is None else bank
    bank.check_fits(sites.layout)
    if sites.layout.embedded_base:
        for note in notes_on_base(bank.infos.values(), sites.layout, weight_hash(model, sites)):
            tell(note)
    regions = [region for region in regions if region.strength > 0]
    if find_regions and not regions:
        sites.layout.refuse_joint("finding regions is")
    refuse_regions(model)
    model = without_concepts(model, sites, bank.names)      # the bank's act instead
    prompts = ConceptPrompts(clip, model, bank, sites, settings.strength, tell)
    positive = prompts.encode(scene.prompt) if scene.positive is None else scene.positive
    negative, negative_prompt = scene.negative, ""
    if negative is None:
        negative_prompt = scene.negative_prompt
        negative = prompts.negative(negative_prompt, scene.prompt, but=prompts.in_weights)
    deltas = prompts.scene_deltas(scene.prompt)
    model = fold(model, sites, always_on_deltas(bank), any(concept.tokens.copies > 1 for concept in bank))
    if regions:
        _check_masks(regions, latent)
        model, deltas = _apart(model, sites, deltas)
        run = prompts.regions(deltas, positive, negative, regions, settings.overlap,
                              settings.isolation, negative_prompt)
        return _with_regions(Prepared(model, positive, negative, run), run, settings.noise, tell)
    if find_regions and prompts.named(scene.prompt):
        model, carried = without_prompt_activated(model, sites)
        found_run = prompts.found_regions(scene.prompt, added([deltas, carried]), positive, negative,
                                          negative_prompt)
        return Prepared(with_found(model, found_run), marked(positive, 1), marked(negative, 0), found_run)
    model = with_word_bound(fold(model, sites, deltas, False), sites, prompts.own)
    if settings.artists > 0:
        subject = subject_of(prompts.clip, scene.prompt)
        model = with_attention_guidance(model, sites, subject, settings.artists)
    return Prepared(model, positive, negative)


def apply_regions(model, clip, positive: Conditioning, negative: Conditioning | None,
                  regions: Sequence[Region], settings: SampleSettings,
                  tell: Callable[[str], None] = log) -> Prepared:
    """Regions for any sampler: MODEL and CONDITIONINGs that any number of samplings may use, at any size.

    Args:
        model, clip: With concepts or without; neither is changed.
        positive, negative: The prompts of the whole picture; negative None = an empty one.
        settings: Only crop denoising, overlap and isolation are used.
        tell: Takes notes on the prompts and on crop denoising.

    Raises:
        ConceptError: The model has regions already, or a region names a concept that the model does not hold.
    """
    regions = [region for region in regions if region.strength > 0]
    sites = find_sites(model, text_widths(clip))
    prompts = ConceptPrompts(clip, model, ConceptBank(sites.layout), sites, 1.0, tell)
    negative = prompts.encode("") if negative is None else negative
    if not regions:
        return Prepared(model, positive, negative)
    refuse_regions(model)
    model, deltas = _apart(model, sites, {})
    run = prompts.regions(deltas, positive, negative, regions, settings.overlap, settings.isolation)
    return _with_regions(Prepared(model, positive, negative, run), run, settings.noise, tell)


def _apart(model, sites: Family, deltas: Deltas) -> tuple[Any, Deltas]:
    """MODEL and the deltas of prompt-activated concepts that act in the scene alone. In a joint attention,
    text and picture have one weight for all regions: there the deltas stay in the weights."""
    if sites.layout.is_joint:
        return fold(model, sites, deltas, False), {}
    model, carried = without_prompt_activated(model, sites)
    return model, added([deltas, carried])


def _with_regions(prepared: Prepared, run: RegionRun, noise: NoiseSettings,
                  tell: Callable[[str], None]) -> Prepared:
    model, prompts = prepared.model, [*prepared.positive, *prepared.negative]
    whole = whole_frame_things(model.model_options, run.sites, [extra for _, extra in prompts])
    if whole and noise.is_on and noise.area == "crop":
        raise ConceptError(f"noise_area is 'crop', but the prompt or the model carries {whole[0]}, "
                           "which belongs to the whole picture; choose noise_area 'frame'")
    return Prepared(with_regions(model, run, noise, tell), marked(prepared.positive, 1),
                    marked(prepared.negative, 0), run)


def _check_masks(regions: Sequence[Region], latent: tuple[int, int]) -> None:
    height, width = latent
    for region in regions:
        if region.mask is not None:
            rows, columns = region.mask.shape
            if abs(columns / rows - width / height) > PROPORTIONS * width / height:
                raise ConceptError(f"the mask of region '{region.prompt}' is {columns}x{rows}, the picture's "
                                   f"sides are as {width} to {height}; "
                                   "the mask must have the picture's proportions")
