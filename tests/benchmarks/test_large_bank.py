"""A large bank beside a small one: what fills it, and what the command measures."""

from __future__ import annotations

import json

import pytest
import torch

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual.large_bank import compared, filled
from continual_concepts.core.bank.bank import ConceptBank


def test_a_bank_is_filled_with_scaled_copies_behind_its_own(layout, make_concept):
    bank = ConceptBank(layout).add(make_concept(layout, "rex")).add(make_concept(layout, "mimi", seed=1))
    large = filled(bank, 7)
    assert large.names == ["rex", "mimi", *(f"copy{i}" for i in range(2, 7))]
    key = next(iter(bank["rex"].deltas))
    before, same, copy = bank["rex"].deltas[key], large["rex"].deltas[key], large["copy2"].deltas[key]
    assert torch.equal(same.dense(), before.dense()) and not torch.allclose(copy.dense(), before.dense())
    assert torch.allclose(copy.dense() / copy.scale, before.dense() / before.scale)


def test_both_runs_are_measured_in_turn():
    calls = []
    found = compared([lambda: calls.append("small"), lambda: calls.append("large") or sum(range(50_000))], 3)
    assert calls == ["small", "large"] * 3
    assert found["large"] > found["small"] >= 0 and found["ratio"] > 1


@pytest.mark.slow
def test_pictures_do_not_depend_on_the_other_concepts_of_a_bank(tmp_path, capsys):
    file = tmp_path / "large.json"
    assert main(["large-bank", "--json", str(file), "--steps", "1", "--rounds", "1", "--concepts", "9"]) == 0
    result = json.loads(file.read_text())
    assert result["same"] == {"no concept": True, "one": True, "two": True} and result["concepts"] == 9
    assert "with 9 (median ratio" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--concepts", "2"], "concepts is 2; allowed: 3 or more"),
    (["--method", "ewc"], "invalid choice: 'ewc'")])
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, sentence):
    try:
        assert main(["large-bank", "--json", str(tmp_path / "l.json"), *arguments]) == 1
    except SystemExit as stopped:
        assert stopped.code == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())
