"""Presets: every family has values that training accepts; the embedded bases' were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from continual_concepts.benchmarks.continual.runs import settings_for
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.demo.bases import JOINT, TRANSFORMERS, file_of
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import make
from continual_concepts.core.model.sites import joint_layout, transformer_layout, unet_layout
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.presets import (
    EFFORTS,
    EMBEDDED,
    EMBEDDED_128,
    EMBEDDED_DIT,
    EMBEDDED_FAMILIES,
    FAMILIES,
    HERE,
    OBJECT,
    OTHER,
    PERSON,
    PREDICT2,
    READERS,
    SD1,
    SD2,
    SDXL,
    STYLE,
    SUBJECTS,
    family_of,
    for_other_programs,
    preset,
    preset_for,
    preset_for_embedded,
    shown_values,
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "presets.md"
TUNING = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "tuning.json"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_preset_can_be_used_and_more_effort_is_more_steps(subject, family):
    chosen = [preset(subject, effort, family) for effort in EFFORTS]
    steps = [TrainingConfig(**each.training).steps for each in chosen]
    assert steps[0] < steps[1] < steps[2]
    for each in chosen:
        assert make(each.method, each.rates).composition_of_kind(each.kind)
        assert each.kind == ("style" if subject == STYLE else "object") and each.source


@pytest.mark.parametrize(("width", "family"), [(768, SD1), (1024, SD2), (2048, SDXL), (4096, OTHER)])
def test_the_family_of_a_unet_is_told_by_its_text(width, family):
    layout = unet_layout({"mid_block.attentions.0.attn2": (8, 64, width)}, (("clip_l", 768),))
    assert family_of(layout) == family


def test_the_family_of_a_transformer():
    layout = transformer_layout({"blocks.0.cross_attn": (8, 64, 1024)}, (("t5xxl", 1024),))
    assert family_of(layout) == PREDICT2


@pytest.mark.parametrize("width", [768, 1024, 2048, 4096])
def test_a_joint_transformer_is_of_no_known_family_whatever_its_width(width):
    assert family_of(joint_layout(1, 1, 8, width, (("t5xxl", 4096),))) == OTHER


def test_the_other_values_are_those_of_sd15():
    for subject in SUBJECTS:
        for effort in EFFORTS:
            other, usual = preset(subject, effort, OTHER), preset(subject, effort, SD1)
            assert (other.training, other.rates) == (usual.training, usual.rates)


def test_the_line_of_a_preset_has_the_values_that_are_used():
    chosen = preset(OBJECT, "quick", SD1)
    given = chosen.describe(make("lora", {"lr": 0.5}), TrainingConfig(**{**chosen.training, "steps": 3}))
    assert given.startswith("preset object, quick, for SD1.5: method lora, lr 0.5, token_lr ")
    assert given.endswith("steps 3, resolution 512, batch_size 1")
    usual = chosen.describe(make(chosen.method, chosen.rates), TrainingConfig(**chosen.training))
    assert usual == ("preset object, quick, for SD1.5: method slots, lr 0.0001, token_lr 0.001, steps 400, "
                     "resolution 512, batch_size 1")


def test_the_line_of_a_preset_names_the_base_and_whose_values_it_has(monkeypatch):
    monkeypatch.setitem(TRANSFORMERS, JOINT, TRANSFORMERS["embedded-dit"])      # its file may be missing
    said = {}
    for name in ("embedded-128", "embedded-joint"):
        chosen = preset_for_embedded(OBJECT, "quick", name)
        said[name] = chosen.describe(make(chosen.method, chosen.rates), TrainingConfig(**chosen.training))
    assert said["embedded-128"].startswith("preset object, quick, for embedded-128: method slots")
    assert said["embedded-joint"].startswith("preset object, quick, for embedded-joint, as for embedded-dit")


@pytest.mark.parametrize("name", ["embedded-64", "embedded-128"])
def test_an_embedded_base_is_learned_in_its_own_size(name):
    chosen = preset_for(OBJECT, "normal", load_base(file_of(name)).layout)
    assert chosen.family == name and chosen.training["resolution"] == int(name.removeprefix("embedded-"))


@pytest.mark.skipif(not TUNING.exists(), reason="the benchmark's tuning has no result in this checkout")
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_embedded_values_are_those_that_tuning_chose(subject):
    best = json.loads(TUNING.read_text())["methods"]["slots"]["chosen"]
    chosen = preset(subject, "normal", EMBEDDED)
    steps = best.pop("steps")
    assert (chosen.rates, chosen.training["steps"]) == (settings_for(best, chosen.kind), steps)


def test_values_are_shown_for_the_embedded_bases_and_as_a_range_for_published_models():
    shown = shown_values()[PERSON]["normal"]
    assert shown["steps"] == {"embedded": "100 or 200", "published": "750, 800 or 1200"}
    assert shown["resolution"] == {"embedded": "its own", "published": "512 or 1024"}
    assert shown["kind"] == {"embedded": "object", "published": "object"}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_shown_values_are_those_that_are_used(subject, reader):
    shown = shown_values(reader)[subject]["quick"]
    families = ((EMBEDDED_128, "embedded"), (EMBEDDED_DIT, "embedded"), (SD1, "published"),
                (SDXL, "published"))
    for family, where in families:
        chosen = preset(subject, "quick", family)
        chosen = chosen if reader == HERE else for_other_programs(chosen)
        assert shown["method"][where] == chosen.method
        for name, rate in chosen.rates.items():
            assert f"{rate:g}" in re.split(", | or ", shown[name][where])


def test_shown_values_fit_into_a_node():
    """A label of more than 30 characters is cut in a node of the usual width."""
    labels = [f"{name} = {text}" for reader in READERS for efforts in shown_values(reader).values()
              for given in efforts.values() for name, texts in given.items() for text in texts.values()]
    assert not [label for label in labels if len(label) > 30]


@pytest.mark.parametrize(("given", "sentence"), [
    (("dog", "normal"), "preset is 'dog'; allowed: person or animal, object, style"),
    ((OBJECT, "much"), "effort is 'much'; allowed: quick, normal, thorough")])
def test_an_unknown_preset_is_refused(given, sentence):
    with pytest.raises(ConceptError, match=sentence):
        preset(*given, SD1)


def documented() -> str:
    """The table of docs/presets.md."""
    rows = []
    for family in FAMILIES:
        chosen = preset(OBJECT, "normal", family)
        steps = [" / ".join(str(preset(subject, effort, family).training["steps"]) for effort in EFFORTS)
                 for subject in (PERSON, OBJECT, STYLE)]
        rest = {key: value for key, value in chosen.training.items() if key not in ("steps", "resolution")}
        pixels = "its own" if family in EMBEDDED_FAMILIES else chosen.training["resolution"]
        of_style = preset(STYLE, "normal", family).rates
        rates = [f"{rate:g}" if of_style[name] == rate else f"{rate:g}, style {of_style[name]:g}"
                 for name, rate in chosen.rates.items()]
        cells = [family, *steps, *rates, pixels,
                 ", ".join(f"{key} {value}" for key, value in rest.items())]
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    head = "| family | steps, person or animal | object | style | lr | token_lr | pixels | training |"
    return "\n".join([head, "|---" * 8 + "|", *rows])


def test_the_document_has_the_values_and_their_sources():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert documented() in text
    for family in FAMILIES:
        assert f"* **{family}**: {preset(OBJECT, 'normal', family).source}." in text
