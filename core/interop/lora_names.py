"""Maps names of LoRA tensors in files of other programs to projections of sites."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..model.deltas import DeltaKey
from ..model.sites import PROJECTIONS, SiteLayout

# kohya: `<module>.lora_up.weight`; PEFT: `<module>.lora_B.weight`, with or without the adapter's name before
# `weight`; diffusers: `<module>.lora.up.weight`, and in 2023 `<attention>.processor.to_q_lora.up.weight`.
_FACTOR = re.compile(r"(?P<module>.+?)(?:[._]lora[._](?P<side>up|down|A|B|mid))(?:\.[\w-]+)?\.weight$")
_ALPHA = re.compile(r"(?P<module>.+?)\.alpha$")
_PREFIX = re.compile(r"^(?:base_model_model_|model_|lora_|unet_|diffusion_)+")
_TEXT = re.compile(r"^(?:base_model_model_)?(?:lora_)?"
                   r"(?:te|te1|te2|text_encoder|text_encoder_2|text_model|cond_stage_model|clip)_")
_SIDES = {"up": "up", "B": "up", "down": "down", "A": "down", "mid": "mid"}


@dataclass(frozen=True)
class Part:
    """A parsed tensor name. module: with `_` for dots, without prefixes; side: up | down | mid | alpha."""

    module: str
    side: str
    is_text: bool


def part_of(key: str) -> Part | None:
    """Parses a tensor's name; None for tensors outside plain LoRA (LoHa, LoKr, DoRA's magnitudes)."""
    match = _FACTOR.match(key) or _ALPHA.match(key)
    if match is None:
        return None
    name = match["module"].replace(".processor", "").replace(".", "_")
    side = _SIDES[match["side"]] if "side" in match.groupdict() else "alpha"
    return Part(_PREFIX.sub("", name), side, bool(_TEXT.match(name)))


def site_names(layout: SiteLayout) -> dict[str, DeltaKey]:
    """All names of the sites' projections: diffusers' and the original code's (`input_blocks_1_1_...`)."""
    places: dict[str, DeltaKey] = {}
    original = _original_names([site.name for site in layout.sites])
    for site in layout.sites:
        for name in (site.name, original[site.name]):
            for projection in PROJECTIONS:
                flat = f"{name}.{projection}".replace(".", "_")
                places[flat] = places[f"{flat}_0"] = (site.index, projection)
    return places


def _original_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' path of an attention layer -> its path in the original Stable Diffusion code.

    In the original code, a down block has one more layer that halves the picture. An up block has one more
    layer than a down block, and its last layer doubles the picture.
    """
    pattern = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.attentions\.(\d+)\.(.+)"
                         r"|mid_block\.attentions\.0\.(.+)")
    matches = {name: pattern.fullmatch(name) for name in names}
    layers = 1 + max((int(m[3]) for m in matches.values() if m and m[1] == "down_blocks"), default=1)
    originals = {}
    for name, m in matches.items():
        if m is None:
            originals[name] = name
        elif m[5]:
            originals[name] = f"middle_block.1.{m[5]}"
        else:
            block, layer = int(m[2]), int(m[3])
            is_down = m[1] == "down_blocks"
            number = block * (layers + 1) + layer + is_down
            originals[name] = f"{'input' if is_down else 'output'}_blocks.{number}.1.{m[4]}"
    return originals
