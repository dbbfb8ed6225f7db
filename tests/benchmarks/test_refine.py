"""The benchmark `refine`: two halves of photos that differ, its summary, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import embedded
from continual_concepts.benchmarks.continual.concepts import concepts
from continual_concepts.benchmarks.refine import halves
from continual_concepts.benchmarks.refine.command import _summary
from continual_concepts.benchmarks.refine.halves import VIEWS, half_of
from continual_concepts.benchmarks.refine.measure import ROWS
from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.demo.render import render
from continual_concepts.core.demo.scenes import BACKGROUNDS

BY_NAME = {concept.name: concept for concept in concepts()}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(halves, "HELD_OUT", 5)


@pytest.mark.parametrize(("name", "shown"), [
    ("rex", {half: [BACKGROUNDS[place] for place in VIEWS[half].places] for half in VIEWS}),
    ("blueprint", {half: VIEWS[half].subjects for half in VIEWS})])
def test_the_halves_show_one_concept_in_different_ways(name, shown):
    old, new = (half_of(BY_NAME[name], half, 32) for half in ("old", "new"))
    assert not set(old.prompts) & set(new.prompts) and not torch.equal(old.held_out, new.held_out)
    for half, part in (("old", old), ("new", new)):
        assert len(part.photos) == len({photo.digest for photo in part.photos}) == VIEWS[half].photos
        assert part.held_out.shape == (5, 3, 32, 32) and len(part.prompts) == len(shown[half])
        assert all(f"<{name}>" in text for text in part.prompts)
        assert not any("<" in text for text in part.noun_prompts)
        assert all(any(words in text for text in part.prompts) for words in shown[half])
        assert torch.equal(half_of(BY_NAME[name], half, 32).held_out, part.held_out)


@pytest.mark.parametrize("half", VIEWS)
def test_a_thing_has_the_size_place_and_direction_of_its_half(half, monkeypatch):
    scenes, view = [], VIEWS[half]
    monkeypatch.setattr(halves, "render", lambda scene, side: scenes.append(scene) or render(scene, side))
    half_of(BY_NAME["rex"], half, 32)
    for i, scene in enumerate(scenes[:view.photos]):
        (placed,) = scene.objects
        across = (placed.x - 0.5 * placed.size) / (1 - placed.size)
        assert view.sizes[0] <= placed.size <= view.sizes[1] and scene.background in view.places
        assert view.across[0] - 1e-9 <= across <= view.across[1] + 1e-9
        assert placed.flip == view.mirrored[i % len(view.mirrored)]
    assert VIEWS["old"].sizes[1] < VIEWS["new"].sizes[0]


@pytest.fixture
def quick(monkeypatch):
    """The command learns one step and draws two pictures of two steps."""
    monkeypatch.setattr(embedded, "SEEDS", (100, 101))
    monkeypatch.setattr(embedded, "SETTINGS", replace(embedded.SETTINGS, steps=2))


@pytest.mark.slow
def test_the_command_learns_every_row_once_and_draws_them(tmp_path, quick, capsys):
    file = tmp_path / "refine.json"
    arguments = ["refine", "--json", str(file), "--concepts", "blueprint", "--steps", "1", "--replay", "2",
                 "--method", "lora", "--base", "embedded-64"]
    assert main(arguments) == 0
    table, result = capsys.readouterr().out, json.loads(file.read_text())
    assert list(result["summary"]) == list(ROWS) and "| new only |" in table
    assert result["photos"] == {"old": 2, "new": 6} and result["settings"]["lr"] > 0
    learned = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(learned) == len(ROWS)
    steps = {path.name.split(".")[1]: open_bank(path)["blueprint"].info.provenance.steps for path in learned}
    assert steps["at_once"] == 2 and steps["before"] == 1
    side = Image.open(file.with_suffix(".png")).size
    assert side == (64 * (1 + len(ROWS)), 2 * 64)
    assert main(arguments) == 0
    assert learned == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_the_summary_compares_with_the_concept_before_and_with_all_photos_at_once():
    part = {"floor": {"old": 0.2, "new": 0.2}, "ceiling": {"old": 1.0, "new": 1.0},
            **{row: {"old": 0.6, "new": 0.4} for row in ROWS}, "at_once": {"old": 0.8, "new": 0.6}}
    found = _summary([part, part], "refined")
    assert found["retained"] == pytest.approx(1) and found["gained"] == pytest.approx(0.4 / 0.6)
    assert found["retained_way"] == pytest.approx(1) and found["gained_way"] == pytest.approx(0.5)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--concepts", "rex,nobody"], "concepts names 'nobody'; allowed: rex"),
    (["--seed", "1,x"], "seed is '1,x'; allowed: numbers of 0 or more"),
    (["--method", "ewc"], "cannot refine a concept; methods that can: bound"),
    (["--replay", "0"], "replay is 0; allowed: 1 or more")])
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, sentence):
    assert main(["refine", "--json", str(tmp_path / "r.json"), *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["refine", "one-class"])
def test_only_embedded_bases_can_be_chosen(tmp_path, capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--json", str(tmp_path / "r.json"), "--base", "folder"])
    assert "embedded-64" in capsys.readouterr().err
