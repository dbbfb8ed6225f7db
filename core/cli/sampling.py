"""The command `sample`: pictures from a prompt and a bank."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from ..bank.bank import ConceptBank
from ..bank.format import open_bank
from ..bank.hints import notes_on, notes_on_base
from ..bank.prompts import NO_CONCEPTS
from ..data.captions import decoded
from ..errors import ConceptError
from ..files import check_output_folder, write_new
from ..images import to_pil
from ..model.backbone import Backbone
from ..model.solver import solver_for
from ..regional.drawing import parse_regions
from ..regional.noise import NoiseSettings
from ..regional.regions import Region
from ..sampling.found import sample_found
from ..sampling.regions import sample_regions
from ..sampling.settings import SampleSettings
from ..settings import SEED, require
from . import backbones
from .result import Result

OLD_ORDER = ("--region takes TOP,LEFT,BOTTOM,RIGHT, the order of earlier versions; --box takes "
             "LEFT,TOP,RIGHT,BOTTOM, the order of all other places")


def _edges(flag: str, text: str, names: str) -> tuple[list[float], str]:
    """Four fractions and the prompt of a region given as text. names: the order of the edges."""
    numbers, separator, prompt = text.partition(":")
    try:
        edges = [float(part) for part in numbers.split(",")]
    except ValueError:
        edges = []
    if len(edges) != 4 or not separator:
        raise ConceptError(f"{flag} is {text!r}; allowed: {names}:PROMPT, with four fractions of the picture "
                           "from 0 to 1")
    return edges, prompt


def _text_of(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConceptError(f"--regions '{file}' cannot be read ({error})") from error
    return decoded(data, file, "file of --regions")


def _regions(options: Namespace) -> list[Region]:
    """The regions of --regions, --box and --region, in this order."""
    found: list[Region] = []
    if options.regions is not None:
        found += parse_regions(_text_of(options.regions))
    for text in options.box:
        (left, top, right, bottom), prompt = _edges("--box", text, "LEFT,TOP,RIGHT,BOTTOM")
        found.append(Region(prompt, box=(top, left, bottom, right), feather=options.feather))
    for text in options.region:
        (top, left, bottom, right), prompt = _edges("--region", text, "TOP,LEFT,BOTTOM,RIGHT")
        found.append(Region(prompt, box=(top, left, bottom, right), feather=options.feather))
    if options.find_regions and found:
        raise ConceptError("--find-regions finds regions by itself; give it without --box, --region and "
                           "--regions")
    return found


def _drawn(options: Namespace, backbone: Backbone, bank: ConceptBank, regions: list[Region],
           seeds: list[int], settings: SampleSettings) -> Tensor:
    """The pictures `[B, 3, H, W]` of the prompt, with a progress bar. Only pictures without regions are drawn
    in several batches."""
    finds = options.find_regions and len(bank.parse(options.prompt).apart(bank.infos)) > 1
    batches = 1 if regions or finds else -(-len(seeds) // settings.batch)
    steps = len(solver_for(backbone.schedule, settings.steps).timesteps)      # a schedule may have fewer
    with tqdm(total=batches * steps, desc="drawing", disable=options.json) as bar:
        settings = replace(settings, on_step=bar.update)
        if options.find_regions:
            return sample_found(backbone, bank, options.prompt, seeds, settings)
        return sample_regions(backbone, bank, options.prompt, regions, seeds, settings)


def _origin(options: Namespace, regions: list[Region], settings: SampleSettings, seed: int) -> PngInfo:
    """A text in a picture's file with its prompts, seed, steps and cfg. Its key is our own, because ComfyUI's
    page reads the key `prompt` as a graph."""
    drawn = {"prompt": options.prompt, "negative": options.negative, "seed": seed, "steps": settings.steps,
             "cfg": settings.cfg, "regions": [region.prompt for region in regions],
             "bank": None if options.bank is None else options.bank.name}
    info = PngInfo()
    info.add_text("continual-concepts", json.dumps(drawn))
    return info


def sample(options: Namespace) -> Result:
    """Writes `--count` pictures of the prompt, one per seed. Existing files are kept."""
    check_output_folder(options.output)
    regions = _regions(options)
    stored = open_bank(options.bank) if options.bank is not None else None
    vocabulary = NO_CONCEPTS if stored is None else stored.vocabulary
    prompts = vocabulary.parse_all([options.prompt, options.negative, *(region.prompt for region in regions)])
    notes = [*notes_on(vocabulary, prompts), *([OLD_ORDER] if options.region else [])]
    if options.attention_guidance and (regions or options.find_regions):
        notes.append("--attention-guidance has no effect on pictures with regions")
    width, height = options.size or (backbones.size_of(options),) * 2
    cfg = options.cfg if options.cfg is not None else backbones.guidance_of(options)
    noise = NoiseSettings(options.region_noise, options.alpha, options.outside, options.noise_area,
                          options.solo)
    settings = SampleSettings(options.steps, cfg, (height, width), options.negative, options.mode,
                              options.strength, noise, options.overlap, options.isolation,
                              artists=options.attention_guidance)
    seeds = list(range(options.seed, options.seed + options.count))
    require(SEED[0](seeds[-1]), "seed", seeds[-1], f"{SEED[1]}; each picture after the first adds 1")
    backbone = backbones.load_backbone(options)
    bank = stored or ConceptBank(backbone.layout)
    bank.check_fits(backbone.layout)
    named = dict.fromkeys(name for prompt in prompts for name in prompt.concepts)
    notes += notes_on_base([bank.infos[name] for name in named], backbone.layout, backbone.fingerprint)
    pictures = _drawn(options, backbone, bank, regions, seeds, settings)
    broken = [seed for seed, tensor in zip(seeds, pictures, strict=True) if not torch.isfinite(tensor).all()]
    notes += [f"the picture of seed {seed} holds NaN or infinite numbers; lower --cfg or --strength"
              for seed in broken]
    files = [write_new(options.output / f"sample_{seed:05d}.png", partial(
                 to_pil(tensor).save, format="PNG", pnginfo=_origin(options, regions, settings, seed)))
             for seed, tensor in zip(seeds, pictures, strict=True)]
    facts = {"prompt": options.prompt, "files": [str(file) for file in files], "notes": notes}
    return facts, [f"wrote {file}" for file in files]
