"""Concept Learner's presets: what a preset sets, what it leaves alone, and what an old graph gets."""

from __future__ import annotations

import pytest

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.training.presets import (
    AS_SET,
    PERSON,
    READERS,
    STYLE,
    preset_for_embedded,
    shown_values,
)

pytestmark = pytest.mark.usefixtures("as_in_comfyui")

BASE = "embedded-64"      # that of the fixture `studio`


def inputs_of(pack) -> dict:
    return {entry.id: entry for entry in pack.ConceptLearner.define_schema().inputs}


def test_a_new_node_asks_for_name_noun_and_preset(pack):
    entries = inputs_of(pack)
    shown = [name for name, entry in entries.items()
             if hasattr(entry, "default") and not entry.as_dict().get("advanced")]
    assert shown == ["name", "class_noun", "captions", "preset", "effort"]
    assert entries["name"].default == entries["class_noun"].default == ""
    assert entries["preset"].default == AS_SET      # what a saved graph without it gets
    values = {reader: shown_values(reader) for reader in READERS}
    assert entries["preset"].as_dict()["preset_values"] == values
    assert set(shown_values()[PERSON]["quick"]) <= set(entries)


@pytest.mark.parametrize(("field", "sentence"), [
    ("name", "concept name is empty; type into 'name'"), ("class_noun", "class noun is empty; type into")])
def test_an_empty_name_or_noun_is_refused_before_the_graph_runs(pack, studio, field, sentence):
    given = {"name": "rex", "class_noun": "dog", "if_known": "keep it", field: ""}
    assert str(pack.ConceptLearner.validate_inputs(**given)).startswith(sentence)
    with pytest.raises(ConceptError, match=sentence):
        studio.learner(**{"name" if field == "name" else "noun": ""})


def learned(studio, **given):
    bank = studio.learner(method="lora", kind="object", **given).args[0]
    info = bank.infos["spot"]
    return info, info.provenance.settings


def test_a_preset_replaces_the_inputs_and_connected_settings_replace_the_preset(studio):
    connected = {"training_settings": {"steps": 2, "warmup": 1}, "method_settings": {"slots": 3}}
    info, settings = learned(studio, preset=PERSON, effort="quick", steps=7, batch_size=1, **connected)
    assert (info.method, info.kind, settings["method"]["slots"]) == ("slots", "object", 3)
    assert {name: settings["training"][name] for name in ("steps", "warmup", "batch_size", "schedule")} == {
        "steps": 2, "warmup": 1, "batch_size": 4, "schedule": "cosine"}


def test_a_style_is_learned_as_one(studio):
    info, settings = learned(studio, preset=STYLE, training_settings={"steps": 1})
    rates = preset_for_embedded(STYLE, "normal", BASE).rates
    assert (info.kind, settings["method"]["lr"]) == ("style", rates["lr"])


def test_without_a_preset_the_inputs_are_used_as_before(studio):
    old, new = (learned(studio, steps=2, **given) for given in ({}, {"preset": AS_SET, "effort": "thorough"}))
    assert old[1] == new[1]
    assert old[0].method == "lora" and old[1]["training"]["steps"] == 2


def test_an_unknown_preset_is_refused(studio):
    with pytest.raises(ConceptError, match="preset is 'dog'; allowed: as set, person or animal"):
        studio.learner(preset="dog")


@pytest.mark.parametrize("rate", ["lr", "token_lr"])
@pytest.mark.parametrize("value", [-0.5, float("nan")])
def test_a_rate_that_is_no_rate_is_refused(studio, rate, value):
    with pytest.raises(ConceptError, match=f"setting '{rate}' is {value}"):
        studio.learner(method="lora", **{rate: value})


def test_the_notes_name_the_values_that_are_used(studio):
    result = studio.learner(preset=PERSON, effort="quick", training_settings={"steps": 2},
                            method_settings={"lr": 0.003})
    rates = preset_for_embedded(PERSON, "quick", BASE).rates
    said = (f"preset person or animal, quick, for {BASE}: method slots, lr {rates['lr']:g}, token_lr "
            f"{rates['token_lr']:g}, steps 2, resolution 64, batch_size 4, schedule cosine, warmup 20")
    assert said in result.ui["text"][0]
