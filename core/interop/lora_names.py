"""Maps names of LoRA tensors in files of other programs to projections of sites."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..model.deltas import DeltaKey
from ..model.sites import PROJECTIONS, SiteLayout

# forms of a change that become deltas
LORA, LOHA, LOKR, DIFF, CUSTOM_DIFFUSION = "LoRA", "LoHa", "LoKr", ".diff", "Custom Diffusion"
DORA = "DoRA"       # magnitudes beside one of these forms
FORMS = (LORA, DORA, LOHA, LOKR, DIFF, CUSTOM_DIFFUSION)
ALPHA, BIAS, NORM = "alpha", "bias", "norm"
LONGEST_NAME = 512

# name behind the module's -> (form, side). The sources are the files of kohya's scripts, LyCORIS, PEFT and
# diffusers.
_SIDES = {
    "lora_up": (LORA, "up"), "lora_B": (LORA, "up"), "lora_down": (LORA, "down"), "lora_A": (LORA, "down"),
    "lora_mid": (LORA, "mid"),
    "dora_scale": (DORA, "dora_scale"), "lora_magnitude_vector": (DORA, "lora_magnitude_vector"),
    **{f"hada_{side}": (LOHA, side) for side in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{side}": (LOKR, side) for side in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": (DIFF, "diff"), "alpha": (ALPHA, "alpha"),
    # these are no sums of a weight and a change that is known without further weights
    "set_weight": ("set_weight", ""), "reshape_weight": ("reshape_weight", ""),
    **dict.fromkeys(("oft_blocks", "rescale", "oft_r", "oft_R"), ("OFT", "")),
    **dict.fromkeys(("boft_R", "boft_s"), ("BOFT", "")),
    **dict.fromkeys(("a1", "a2", "b1", "b2", "bm1", "bm2"), ("GLoRA", "")),
    **dict.fromkeys(("q_layer", "p_layer", "lambda_layer"), ("T-LoRA", "")),
    **dict.fromkeys(("lora_E", "ranknum"), ("AdaLoRA", "")),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), ("VeRA", "")),
    **dict.fromkeys(("ia3_l", "on_input"), ("IA3", "")),
    **dict.fromkeys(("hra_u",), ("HRA", "")),
    "w_norm": (NORM, ""),
    **dict.fromkeys(("diff_b", "b_norm", "bias_values", "bias_indices", "bias_size"), (BIAS, "")),
}
# kohya: `<module>.lora_up.weight`; PEFT: `<module>.lora_B.weight`, with or without the adapter's name before
# `weight`; diffusers: `<module>.lora.up.weight`, and in 2023 `<attention>.processor.to_q_lora.up.weight`;
# transformers: `<module>.lora_linear_layer.up.weight`. Numbers are no adapters: they are slices of a weight.
_NAME = re.compile(
    r"(?P<module>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<factor>up|down|A|B|mid)"
    r"|_(?P<whole>custom_diffusion)(?:\.0)?"
    rf"|(?:_lora)?\.(?P<side>{'|'.join(sorted(_SIDES, key=len, reverse=True))}))"
    r"(?:\.(?P<adapter>(?!(?:weight|bias|\d+)(?:\.|$))[\w-]+))?(?:\.(?:weight|(?P<bias>bias)))?$")
_PREFIX = re.compile(r"^(?:base_model_model_|model_|lora_|lycoris_|unet_|diffusion_)+")
_TEXT = re.compile(r"^(?:base_model_model_)?(?:lora_|lycoris_)?"
                   r"(?:te|te1|te2|text_encoders?|text_encoder_2|text_model|cond_stage_model|clip)_")
# name inside a UNet -> kind of layer, the first that is found
_KINDS = (("attn1", "self-attention"), ("attn2", "text cross-attention that this base does not have"),
          (r"_ff_", "feed-forward"), ("norm", "normalisation"), ("time_emb", "time embedding"),
          ("proj_(in|out)", "proj_in and proj_out"),
          (r"resnets|conv|sampl|in_layers|out_layers|skip_connection|_op$", "convolutions"))


@dataclass(frozen=True)
class Part:
    """A parsed tensor name.

    Args:
        module: With `_` for dots, without prefixes.
        path: As the file spells it.
        form: One of FORMS, ALPHA, BIAS or the name of a form that cannot become a delta.
        side: Which part of the form.
        adapter: PEFT's name of the adapter; "" if the file names none.
    """

    module: str
    path: str
    form: str
    side: str
    adapter: str
    is_text: bool


def part_of(key: str) -> Part | None:
    """Parses a tensor's name; None for names outside LoRA files."""
    match = _NAME.match(key) if len(key) <= LONGEST_NAME and key.isprintable() else None
    if match is None:
        return None
    if match["bias"]:
        form, side = BIAS, ""
    elif match["whole"]:
        form, side = CUSTOM_DIFFUSION, "weight"
    else:
        form, side = _SIDES[match["side"] or f"lora_{match['factor']}"]
    name = match["module"].replace(".processor", "").replace(".", "_")
    return Part(_PREFIX.sub("", name), match["module"], form, side, match["adapter"] or "",
                bool(_TEXT.match(name)))


def shown(name: str) -> str:
    """A name from an untrusted file, for messages."""
    return name[:60] if name[:60].isprintable() else ascii(name[:60])


def kind_of(module: str, is_text: bool) -> str:
    """The kind of a layer that is no site of the base, for messages."""
    if is_text:
        return "text encoder"
    return next((kind for name, kind in _KINDS if re.search(name, module)), "other layers")


def site_names(layout: SiteLayout) -> dict[str, DeltaKey]:
    """All names of the sites' projections: diffusers' and the original code's (`input_blocks_1_1_...`) of a
    UNet, the modules' of a transformer."""
    places: dict[str, DeltaKey] = {}
    original = _original_names([site.name for site in layout.sites])
    for site in layout.sites:
        for name in (site.name, original[site.name]):
            for projection in PROJECTIONS:
                flat = f"{name}.{projection}".replace(".", "_")
                places[flat] = places[f"{flat}_0"] = (site.index, projection)
        for projection in PROJECTIONS:
            places[site.path(projection).replace(".", "_")] = (site.index, projection)
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
