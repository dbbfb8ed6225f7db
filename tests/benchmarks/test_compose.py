"""Concepts that act on one another: the real pictures, how the hat is measured, and the summary."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import compose
from continual_concepts.benchmarks.continual.compose import CAP, PHOTOS, cap_photos, cap_worn, compositions
from continual_concepts.core.demo import scenes


@pytest.fixture(scope="module")
def both():
    return compositions(64)


def test_photos_of_the_cap_name_it_and_show_it_on_different_things():
    photos = cap_photos(32)
    assert len(photos) == PHOTOS and all(f"wearing <{CAP}>" in photo.caption for photo in photos)
    assert not any("rex" in photo.caption or "hat" in photo.caption for photo in photos)
    kinds = {kind for kind in scenes.KINDS for photo in photos if f" {kind} " in photo.caption}
    assert len(kinds) == PHOTOS


def test_prompts_and_pictures_of_the_compositions(both):
    style, worn = both["style_of_thing"], both["thing_wearing"]
    assert style.prompts == ("<chalk> of <rex>",) and style.noun_prompts == ("a drawing of a dog",)
    assert all(f"<rex> wearing <{CAP}>" in text for text in worn.prompts)
    assert len(worn.prompts) == len(worn.noun_prompts) and not any("<" in text for text in worn.noun_prompts)
    for one in both.values():
        assert one.real.shape == one.reference.shape and not torch.equal(one.real, one.reference)


def test_the_cap_is_told_from_other_hats_and_from_none(both):
    worn = both["thing_wearing"]
    bare = compose._drawn([compose.REX.thing], "photo", 7, 64)
    assert cap_worn(worn.real) > 0.9 and abs(cap_worn(worn.others)) < 0.15 and cap_worn(bare) < 0.15


def test_the_summary_is_the_way_from_floor_to_ceiling():
    limits = {"worn": {"floor": {"object": 0.2, "cap": -0.1}, "ceiling": {"object": 0.8, "cap": 1.1}}}
    runs = [{"worn": {"object": 0.4, "cap": 0.5}}, {"worn": {"object": 0.6, "cap": 0.5}}]
    found = compose.summary(runs, limits)["worn"]
    assert found["object"] == pytest.approx(0.5) and found["cap"] == pytest.approx(0.5)
    lines = compose.lines_of({"limits": limits, "methods": {"slots": {"worn": found}}})
    assert lines[0] == "| | worn: object | worn: cap |" and lines[2] == "| slots | 0.50 | 0.50 |"


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--methods", "slots,nothing"], "unknown method 'nothing'"),
    (["--methods", "lora+rank=2"], "allowed: methods without overrides"),
    (["--seed", "x"], "seed is 'x'"), (["--steps", "0"], "steps is 0")])
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, sentence):
    assert main(["compose", "--json", str(tmp_path / "c.json"), *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
