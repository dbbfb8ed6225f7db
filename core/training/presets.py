"""Presets: what to learn and how long to learn it, as settings for the base's family.

Every row of `_ROWS` names where its values come from. Most values of the embedded bases are measured; those
of published models are published ones of papers and of other trainers, mostly for other methods. No row was
measured on a published checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..demo.bases import TRANSFORMERS, picture_size
from ..errors import ConceptError
from ..methods import DEFAULT
from ..methods.base import Method
from ..model.sites import SiteLayout
from .config import TrainingConfig

AS_SET = "as set"      # no preset: every setting is used as it is
PERSON, OBJECT, STYLE = SUBJECTS = ("person or animal", "object", "style")
QUICK, NORMAL, THOROUGH = EFFORTS = ("quick", "normal", "thorough")
SHORT_NAMES = {"person": PERSON, "object": OBJECT, "style": STYLE}      # as typed in commands and tables
EMBEDDED_FAMILIES = EMBEDDED, EMBEDDED_128, EMBEDDED_DIT = ("embedded-64", "embedded-128", "embedded-dit")
SD1, SD2, SDXL, PREDICT2, OTHER = _PUBLISHED = ("SD1.5", "SD2", "SDXL", "Anima, Cosmos Predict2", "other")
FAMILIES = (*EMBEDDED_FAMILIES, *_PUBLISHED)
_BY_CONTEXT_WIDTH = {768: SD1, 1024: SD2, 2048: SDXL}      # of UNets

# Who reads the result. Others read plain low-rank deltas and one vector per word.
HERE, ELSEWHERE = READERS = ("this pack", "other programs")
FOR_OTHERS, OTHERS_SETTINGS = "lora", {"layerwise": False}
EMBEDDED_RATES = {"lr": 2e-3, "token_lr": 2e-2}      # 200 times smaller than SD1.5: needs higher rates

Steps = tuple[int, int, int]      # of the three efforts


@dataclass(frozen=True)
class Row:
    """Values of one family. steps: by subject; one number per effort. style_rate:
    factor on both rates for a style. resolution: None = that of the base.
    source: where the values come from."""

    steps: Mapping[str, Steps]
    lr: float
    token_lr: float
    resolution: int | None
    training: Mapping[str, Any]
    source: str
    style_rate: float = 1.0

    def rates(self, subject: str) -> dict[str, float]:
        factor = self.style_rate if subject == STYLE else 1.0
        return {"lr": self.lr * factor, "token_lr": self.token_lr * factor}


def _by_subject(person: Steps, other: Steps) -> dict[str, Steps]:
    return {PERSON: person, OBJECT: other, STYLE: other}


_BATCHES_OF_FOUR = {"batch_size": 4, "schedule": "cosine", "warmup": 20}
_UNMEASURED = "Quick and thorough are half and twice. None of this was measured here"
_FACES = "A person or animal gets 1.5 times as many"
_CIDM = ("800 steps, both rates and 512 pixels are those of CIDM's paper (Dong et al., NeurIPS 2024). "
         f"{_FACES}: Hugging Face's study of DreamBooth (2022) found 800 to 1200 steps for faces, and 400 "
         f"for objects. {_UNMEASURED}")

_ROWS: Mapping[str, Row] = {
    EMBEDDED: Row(
        _by_subject((100, 200, 400), (100, 200, 400)), 2e-3, 2e-2, None, _BATCHES_OF_FOUR,
        "Normal is what the benchmark's tuning chose for slots in 12 trials. Quick is one of these. A style "
        "gets four times the rates, because tuning learned four further styles better with them. Thorough "
        "is twice normal and was not measured", style_rate=4.0),
    EMBEDDED_128: Row(
        _by_subject((50, 100, 200), (50, 100, 200)), 4e-3, 2e-2, None, _BATCHES_OF_FOUR,
        "Rates of 0.001 to 0.008 and 50 to 200 steps were tried with two objects and two styles of the "
        "benchmark's tuning suite and one seed. 200 steps were not clearly better than 100"),
    EMBEDDED_DIT: Row(
        _by_subject((100, 200, 400), (100, 200, 400)), 2e-3, 1e-2, None, _BATCHES_OF_FOUR,
        "Rates of 0.001 to 0.004 and 100 or 200 steps were tried with the same objects and styles. At twice "
        "the rates and half the steps they are learned as well, but two dogs in one prompt mix more. "
        "Thorough was not measured. The transformer with joint attention has the same values"),
    SD1: Row(_by_subject((600, 1200, 2400), (400, 800, 1600)), 1e-4, 1e-3, 512, {"batch_size": 1}, _CIDM),
    SD2: Row(_by_subject((600, 1200, 2400), (400, 800, 1600)), 1e-4, 1e-3, 512, {"batch_size": 1},
             f"As {SD1}, of which SD2 is the successor. {_CIDM}"),
    SDXL: Row(
        _by_subject((375, 750, 1500), (250, 500, 1000)), 1e-4, 1e-3, 1024,
        {"batch_size": 1, "accumulation": 4, "schedule": "constant"},
        "500 steps of 4 accumulated pictures, the rate and 1024 pixels are those of diffusers' DreamBooth "
        f"example for SDXL. {_FACES}. {_UNMEASURED}"),
    PREDICT2: Row(
        _by_subject((400, 800, 1600), (400, 800, 1600)), 1e-4, 1e-3, 1024, {"batch_size": 1},
        "The rate is that of sd-scripts' guide for Anima. 800 steps are its 10 epochs for 8 photos that are "
        f"repeated 10 times. {_UNMEASURED}"),
    OTHER: Row(_by_subject((600, 1200, 2400), (400, 800, 1600)), 1e-4, 1e-3, 512, {"batch_size": 1},
               "No values are known for Flux.1, Flux.2 Klein, Chroma and other models. These are those of "
               f"{SD1}"),
}


@dataclass(frozen=True)
class Preset:
    """Settings for one subject, effort and family.

    Attributes:
        subject, effort, family: What it is for.
        kind: The concept's kind.
        method: How it is learned.
        rates: Settings of the method: lr and token_lr.
        training: Settings of training, by name.
        source: Where the values come from.
        settings: Further settings of the method.
        base: Name of the embedded base; empty for others.
    """

    subject: str
    effort: str
    family: str
    kind: str
    method: str
    rates: Mapping[str, float]
    training: Mapping[str, Any]
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""

    def describe(self, method: Method, config: TrainingConfig) -> str:
        """One line with the values that are used: those of the method and of the training, which may differ
        from the preset's where single settings were given."""
        rates = {name: f"{getattr(method.config, name):g}" for name in self.rates
                 if hasattr(method.config, name)}
        training = {name: getattr(config, name) for name in self.training}
        values = ", ".join(f"{name} {value}" for name, value in {**rates, **training}.items())
        base = self.base or self.family
        same = "" if base == self.family else f", as for {self.family}"
        return f"preset {self.subject}, {self.effort}, for {base}{same}: method {method.name}, {values}"


def family_of(layout: SiteLayout) -> str:
    """The family of a base's layout, one of `FAMILIES`."""
    if layout.embedded_base:
        return family_of_embedded(layout.embedded_base)
    if layout.is_joint:
        return OTHER
    if all(site.of_transformer for site in layout.sites):
        return PREDICT2
    return family_of_width(layout.sites[0].context_width)


def family_of_embedded(name: str) -> str:
    """The family of an embedded base with this name. The transformers share one."""
    return EMBEDDED_DIT if name in TRANSFORMERS else name


def family_of_width(context_width: int) -> str:
    """The family of a published UNet whose text states have this width."""
    return _BY_CONTEXT_WIDTH.get(context_width, OTHER)


def kind_of(subject: str) -> str:
    return "style" if subject == STYLE else "object"


def preset(subject: str, effort: str, family: str, size: int = 0) -> Preset:
    """Looks up a preset.

    Args:
        subject: One of `SUBJECTS`.
        effort: One of `EFFORTS`.
        family: One of `FAMILIES`.
        size: Side in pixels of an embedded base's pictures; 0 = that of the base with the family's name.

    Raises:
        ConceptError: Subject or effort is unknown.
    """
    for name, value, allowed in (("preset", subject, SUBJECTS), ("effort", effort, EFFORTS)):
        if value not in allowed:
            raise ConceptError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    row = _ROWS[family]
    training = {"steps": row.steps[subject][EFFORTS.index(effort)],
                "resolution": row.resolution or size or picture_size(family), **row.training}
    return Preset(subject, effort, family, kind_of(subject), DEFAULT,
                  row.rates(subject), training, row.source)


def for_other_programs(chosen: Preset) -> Preset:
    """The same preset with a result that other programs read without loss. Its rates on an embedded base are
    those that the benchmark's methods start from; they were not tuned for it."""
    rates = EMBEDDED_RATES if chosen.family in EMBEDDED_FAMILIES else chosen.rates
    return replace(chosen, method=FOR_OTHERS, rates=rates, settings=OTHERS_SETTINGS)


def check_for_others(settings: Mapping[str, Any]) -> None:
    """Raises ConceptError for a setting of the method with which other programs would not read the result
    without loss."""
    for name, needed in OTHERS_SETTINGS.items():
        if settings.get(name, needed) != needed:
            raise ConceptError(f"setting '{name}' is {settings[name]!r}; allowed for other programs: "
                               f"{needed!r}")


def preset_for(subject: str, effort: str, layout: SiteLayout) -> Preset:
    """The preset for a base with this layout."""
    name = layout.embedded_base
    return preset_for_embedded(subject, effort, name) if name else preset(subject, effort, family_of(layout))


def preset_for_embedded(subject: str, effort: str, name: str) -> Preset:
    """The preset for the embedded base with this name."""
    return replace(preset(subject, effort, family_of_embedded(name), picture_size(name)), base=name)


def shown_values(reader: str = HERE) -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """Subject -> effort -> input of Concept Learner -> the value that a preset gives it, as short text.

    It is given for the embedded bases and for published models. Where these differ, it is a range.

    Args:
        reader: Who reads the result, one of `READERS`.
    """
    return {subject: {effort: _shown(subject, effort, reader) for effort in EFFORTS} for subject in SUBJECTS}


def _shown(subject: str, effort: str, reader: str) -> dict[str, dict[str, str]]:
    by_family = {family: _values(subject, effort, family, reader) for family in FAMILIES}
    embedded = [by_family.pop(family) for family in EMBEDDED_FAMILIES]
    return {name: {"embedded": _joined([values[name] for values in embedded]),
                   "published": _joined([values[name] for values in by_family.values()])}
            for name in embedded[0]}


def _values(subject: str, effort: str, family: str, reader: str) -> dict[str, str | int]:
    chosen = preset(subject, effort, family, size=1)
    chosen = for_other_programs(chosen) if reader == ELSEWHERE else chosen
    return {"kind": chosen.kind, "method": chosen.method, "steps": chosen.training["steps"],
            **{name: f"{rate:g}" for name, rate in chosen.rates.items()},
            "resolution": _ROWS[family].resolution or "its own", "batch_size": chosen.training["batch_size"]}


def _joined(values: Sequence[str | int]) -> str:
    """`800`, `512 or 1024`, `750, 800 or 1200`, or `250 to 1200, by model`. Only numbers may differ."""
    *others, last = sorted(set(values))
    if len(others) > 2:
        return f"{others[0]} to {last}, by model"
    return f"{', '.join(map(str, others))} or {last}" if others else f"{last}"
