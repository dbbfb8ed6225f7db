"""The benchmark `refine`: two halves of photos that differ, its summary, and bad input."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual.concepts import concepts
from continual_concepts.benchmarks.refine import halves
from continual_concepts.benchmarks.refine.command import _summary
from continual_concepts.benchmarks.refine.halves import PHOTOS, PLACES, SUBJECTS, half_of
from continual_concepts.benchmarks.refine.measure import ROWS
from continual_concepts.core.demo.scenes import BACKGROUNDS

BY_NAME = {concept.name: concept for concept in concepts()}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(halves, "HELD_OUT", 5)


@pytest.mark.parametrize(("name", "shown"), [
    ("rex", {half: [BACKGROUNDS[place] for place in PLACES[half]] for half in PLACES}),
    ("blueprint", SUBJECTS)])
def test_the_halves_show_one_concept_in_different_ways(name, shown):
    old, new = (half_of(BY_NAME[name], half, 32) for half in ("old", "new"))
    assert not set(old.prompts) & set(new.prompts) and not torch.equal(old.held_out, new.held_out)
    for half, part in (("old", old), ("new", new)):
        assert len(part.photos) == len({photo.digest for photo in part.photos}) == PHOTOS
        assert part.held_out.shape == (5, 3, 32, 32) and len(part.prompts) == len(shown[half])
        assert all(f"<{name}>" in text for text in part.prompts)
        assert not any("<" in text for text in part.noun_prompts)
        assert all(any(words in text for text in part.prompts) for words in shown[half])
        assert torch.equal(half_of(BY_NAME[name], half, 32).held_out, part.held_out)


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
