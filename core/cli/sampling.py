"""The command `sample`: pictures from a prompt and a bank."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from ..bank.bank import ConceptBank
from ..bank.format import open_bank
from ..bank.hints import notes_on
from ..bank.prompts import NO_CONCEPTS
from ..errors import ConceptError
from ..files import check_output_folder, write_new
from ..images import to_pil
from ..regional.noise import NoiseSettings
from ..regional.regions import Region
from ..sampling.regions import sample_regions
from ..sampling.settings import SampleSettings
from ..settings import SEED, require
from . import backbones
from .result import Result


def _region(text: str) -> Region:
    """`TOP,LEFT,BOTTOM,RIGHT:PROMPT` as a region."""
    numbers, separator, prompt = text.partition(":")
    try:
        top, left, bottom, right = (float(part) for part in numbers.split(","))
        if not separator:
            raise ValueError
    except ValueError:
        raise ConceptError(f"region {text!r} is not of the form TOP,LEFT,BOTTOM,RIGHT:PROMPT "
                           "with four fractions") from None
    return Region(prompt, box=(top, left, bottom, right))


def sample(options: Namespace) -> Result:
    """Writes `--count` pictures of the prompt, one per seed. Existing files are kept."""
    check_output_folder(options.output)
    regions = [_region(text) for text in options.region]
    stored = open_bank(options.bank) if options.bank is not None else None
    vocabulary = NO_CONCEPTS if stored is None else stored.vocabulary
    prompts = vocabulary.parse_all([options.prompt, options.negative, *(region.prompt for region in regions)])
    notes = notes_on(vocabulary, prompts)
    side = options.size or backbones.size_of(options)
    cfg = options.cfg if options.cfg is not None else backbones.guidance_of(options)
    noise = NoiseSettings(options.region_noise, crop_denoising=options.solo)
    settings = SampleSettings(options.steps, cfg, (side, side), options.negative, options.mode,
                              options.strength, noise)
    seeds = list(range(options.seed, options.seed + options.count))
    require(SEED[0](seeds[-1]), "seed", seeds[-1], f"{SEED[1]}; each picture after the first adds 1")
    backbone = backbones.load_backbone(options)
    bank = stored or ConceptBank(backbone.layout)
    bank.check_fits(backbone.layout)
    pictures = sample_regions(backbone, bank, options.prompt, regions, seeds, settings)
    files = [write_new(options.output / f"sample_{seed:05d}.png", partial(to_pil(tensor).save, format="PNG"))
             for seed, tensor in zip(seeds, pictures, strict=True)]
    facts = {"prompt": options.prompt, "files": [str(file) for file in files], "notes": notes}
    return facts, [f"wrote {file}" for file in files]
