"""The benchmark of shared base neurons: counting against sets, and the command on few prompts."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from PIL import Image

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import neuron_sharing
from continual_concepts.benchmarks.continual.neuron_sharing import shares_of_first
from continual_concepts.core.errors import ConceptError


@pytest.mark.parametrize("first", [0, 2, 4])
def test_shares_are_those_of_sets(first):
    masks = torch.rand(5, 40, generator=torch.Generator().manual_seed(first)) < 0.5
    sets = [set(row.nonzero().flatten().tolist()) for row in masks]
    order = [sets[(first + i) % 5] for i in range(5)]
    every, half = shares_of_first(masks, first)
    for n in range(1, 6):
        assert every[n - 1] == pytest.approx(len(set.intersection(*order[:n])) / len(order[0]))
        assert half[n - 1] == pytest.approx(sum(sum(place in one for one in order[:n]) >= n / 2
                                                for place in order[0]) / len(order[0]))
    assert every[0] == half[0] == 1 and every == sorted(every, reverse=True)


def test_equal_prompts_share_all_and_strangers_nothing():
    same, strangers = torch.tensor([[True, False, True]] * 3), torch.eye(3, dtype=torch.bool)
    assert shares_of_first(same, 1) == ([1, 1, 1], [1, 1, 1])
    # after two prompts one vote is half of them
    assert shares_of_first(strangers, 1) == ([1, 0, 0], [1, 1, 0])


@pytest.mark.slow
def test_the_command_writes_figures_and_a_picture(tmp_path, monkeypatch, capsys):
    few = partial(neuron_sharing.neuron_sharing,
                  prompts=("a photo of a dog", "a cat at night", "a photo of a dog"), firsts=2)
    monkeypatch.setattr(neuron_sharing, "neuron_sharing", few)
    assert main(["neurons", "--json", str(tmp_path / "n.json"), "--draws", "1"]) == 0
    assert "activation-row: " in capsys.readouterr().out
    found = json.loads((tmp_path / "n.json").read_text())
    assert found["prompts"] == [1, 2, 3] and found["paper"] == 0.53
    names = {f"{score}-{unit}" for score in ("gradient", "activation") for unit in ("weight", "row")}
    for part in ("shares", "general"):
        assert set(found[part]) == names and all(len(v) == 3 and v[0] == 1 for v in found[part].values())
    # the third prompt is the first
    assert found["shares"]["activation-weight"][1] == found["shares"]["activation-weight"][2] < 1
    assert found["same_prompt"]["activation-weight"] == 1 > found["same_prompt"]["gradient-weight"] > 0
    with Image.open(tmp_path / "n.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("draws", ["0", "-1"])
def test_no_draws_are_refused(tmp_path, capsys, draws):
    assert main(["neurons", "--json", str(tmp_path / "n.json"), "--draws", draws]) == 1
    assert f"draws are 8 and {draws}; allowed" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_number_of_first_prompts_is_checked(tiny_backbone):
    for firsts in (0, 3):
        with pytest.raises(ConceptError, match="first prompts"):
            neuron_sharing.neuron_sharing(tiny_backbone, ("a dog", "a cat"), firsts)
