"""A method is one short file: the toy in toy.py learns, samples, is saved and composes in every way.

The other tests are about a bank of methods that compose differently.
"""

from __future__ import annotations

import importlib.util
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.composition import Composition, Kind
from continual_concepts.core.bank.concepts import Concept
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.conditioning.routing import (
    aggregate,
    always_on_shares,
    averaged_names,
    learning_deltas,
    token_lora_deltas,
)
from continual_concepts.core.methods import METHODS
from continual_concepts.core.methods.base import register
from continual_concepts.core.model.deltas import LowRankDelta
from continual_concepts.core.regional.regions import Region
from continual_concepts.core.sampling.regions import sample_regions
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings
from continual_concepts.tests.quick import thinned

QUICK = SampleSettings(steps=2, cfg=2.0, size=(32, 32))
TOY = Path(__file__).with_name("toy.py")
WAYS = ("route", "sum", "average", "bound")


def derived(toy, way: str, alone: bool = False, share: float = 1.0) -> str:
    """Registers a toy that composes in this way."""
    members = {"composition": Composition(Kind(way), share), "builds_on_sum": not alone}
    name = f"toy_{way}{'_alone' if alone else ''}"
    register(name, toy.ToyConfig, "a toy")(type("Toy", (toy.Toy,), members))
    return name


@pytest.fixture(scope="module")
def toys():
    """Method per way of composing, and two of summing with a share; unregistered afterwards."""
    before = dict(METHODS)
    spec = importlib.util.spec_from_file_location("toy", TOY)
    toy = sys.modules["toy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    yield {way: derived(toy, way) for way in WAYS} | {"alone": derived(toy, "sum", alone=True, share=0.4)}
    del sys.modules["toy"]
    METHODS.clear()
    METHODS.update(before)


def test_a_low_rank_method_is_less_than_80_lines():
    """The file holds its docstring, imports, settings, hooks and registration."""
    assert len(TOY.read_text(encoding="utf-8").splitlines()) < 80


@pytest.fixture(scope="module", params=(*WAYS, "alone"))
def learned(request, toys, slim_backbone, teach):
    """Two concepts of one toy."""
    method, seen = toys[request.param], []
    bank = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", method).bank
    bank = teach(slim_backbone, bank, "mimi", method, noun="cat", callback=seen.append).bank
    return request.param, method, bank, seen


@pytest.fixture(scope="module")
def mixed(toys, slim_backbone, teach):
    """A concept of every way in one bank, each learned on top of the others."""
    bank = ConceptBank(slim_backbone.layout)
    for way in (*WAYS, "alone"):
        bank = teach(slim_backbone, bank, way, toys[way], steps=2).bank
    return bank


def silenced(bank, name):
    """The bank with one concept's deltas zero; its words stay."""
    concept = bank[name]
    zero = {key: LowRankDelta(torch.zeros_like(d.up), d.down) for key, d in concept.deltas.items()}
    return bank.remove(name).add(Concept(concept.info, concept.tokens, zero))


def picture(backbone, bank, prompt, settings=QUICK):
    return sample(backbone, bank, [prompt], [7], settings)


def test_it_learns_through_the_loop(learned):
    _, method, bank, seen = learned
    assert bank.names == ["rex", "mimi"] and {info.method for info in bank.infos.values()} == {method}
    assert [info.step for info in seen] == [1, 2, 3] and seen[1].terms["toy"] > 0
    assert bank.infos["rex"].words == ("rex-1",)
    assert all(delta.up.any() for concept in bank for delta in concept.deltas.values())
    assert float(bank.shared[method]["tasks"]) == 2


def test_it_shows_and_is_saved(learned, slim_backbone, tmp_path):
    _, _, bank, _ = learned
    before = picture(slim_backbone, bank, "a <rex>")
    assert not torch.allclose(before, picture(slim_backbone, bank, "a <mimi>"), atol=1e-3)
    save_bank(bank, tmp_path / "bank.safetensors")
    again = open_bank(tmp_path / "bank.safetensors")
    assert torch.equal(picture(slim_backbone, again, "a <rex>"), before)


def test_a_stopped_run_goes_on_exactly(learned, slim_backbone, teach, tmp_path):
    _, method, bank, _ = learned

    def stop(info):
        if info.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(slim_backbone, bank.remove("mimi"), "mimi", method, noun="cat", callback=stop,
              checkpoint_file=tmp_path / "c")
    again = teach(slim_backbone, bank.remove("mimi"), "mimi", method, noun="cat",
                  checkpoint_file=tmp_path / "c").concept
    assert all(torch.equal(delta.up, bank["mimi"].deltas[key].up) for key, delta in again.deltas.items())


def test_it_composes_as_it_says(learned, slim_backbone, toys):
    way, method, bank, _ = learned
    found = aggregate(slim_backbone, bank, bank.parse("a <mimi>"))
    expected = {"route": [0.0, 1.0], "bound": [0.0, 1.0], "sum": [1.0, 1.0], "alone": [0.4, 0.4],
                "average": [1.0, 1.0]}[way]
    assert torch.allclose(found.weights, torch.tensor(expected))
    assert bool(found.deltas) == (way != "bound")
    assert list(token_lora_deltas(bank)) == (bank.names if way == "bound" else [])
    assert averaged_names(bank) == (bank.names if way == "average" else [])
    assert always_on_shares(bank) == ({"rex": expected[0], "mimi": expected[1]} if way in ("sum", "alone")
                                      else {})


def test_what_it_learns_on_is_what_it_says(learned, slim_backbone):
    """Only a sum that builds on itself has its earlier tasks in the weights."""
    way, method, bank, _ = learned
    below = learning_deltas(bank, method, METHODS[method].method.builds_on_sum)
    assert bool(below) == (way == "sum")
    if below:
        assert torch.allclose(below[2, "to_v"].dense(),
                              sum(bank[n].deltas[2, "to_v"].dense() for n in bank.names), atol=1e-6)


def test_its_pictures_without_concepts(learned, slim_backbone):
    way, _, bank, _ = learned
    base, found = (picture(slim_backbone, b, "a photo of a dog") for b in (ConceptBank(bank.layout), bank))
    assert torch.equal(base, found) == (way in ("route", "bound"))


def test_without_it_nothing_of_it_is_left(learned, slim_backbone):
    _, _, bank, _ = learned
    empty = bank.remove("rex").remove("mimi")
    assert torch.equal(picture(slim_backbone, empty, "a dog"),
                       picture(slim_backbone, ConceptBank(bank.layout), "a dog"))


def test_an_average_is_one_of_predictions(toys, slim_backbone, teach):
    """Two equal models averaged are the one; an average of two is none of either."""
    empty = ConceptBank(slim_backbone.layout)
    one = teach(slim_backbone, empty, "rex", toys["average"]).bank
    twin = one.add(one["rex"].renamed("rexy"))
    assert torch.allclose(picture(slim_backbone, twin, "a dog"), picture(slim_backbone, one, "a dog"),
                          atol=1e-4)


@pytest.mark.parametrize(("mode", "gone"), thinned(product(["sharp", "equal"], [*WAYS, "alone"]),
                                                   lambda place: place % 2 == 0))
def test_removal_restores_a_mixed_bank(mixed, slim_backbone, make_concept, toys, gone, mode):
    settings = SampleSettings(steps=1, cfg=2.0, size=(32, 32), mode=mode)
    prompts = ["a <route> and a <bound>", "a <sum>", "a dog"]
    before = sample(slim_backbone, mixed, prompts, [1, 2, 3], settings)
    grown = mixed.add(make_concept(mixed.layout, "new", 5, method=toys[gone],
                                   composition=METHODS[toys[gone]].method.composition, size=0.5))
    changed = sample(slim_backbone, grown, ["a <new>", *prompts[1:]], [1, 2, 3], settings)
    assert not torch.allclose(changed[0], before[0], atol=1e-3)
    if gone in ("sum", "average", "alone"):      # always on
        assert not torch.allclose(changed[2], before[2], atol=1e-4)
    assert torch.equal(sample(slim_backbone, grown.remove("new"), prompts, [1, 2, 3], settings), before)


@pytest.mark.parametrize("way", [*WAYS, "alone"])
def test_every_concept_of_a_mixed_bank_acts(mixed, slim_backbone, way):
    prompt = f"a <{way}>" if way in ("route", "bound") else "a dog"
    assert not torch.allclose(picture(slim_backbone, mixed, prompt),
                              picture(slim_backbone, silenced(mixed, way), prompt), atol=1e-4)


@pytest.mark.parametrize("settings", [QUICK, SampleSettings(steps=2, cfg=1.0, size=(32, 32))])
def test_prompts_without_concepts_are_the_base_where_nothing_is_always_on(mixed, slim_backbone, settings):
    bank = mixed.remove("sum").remove("average").remove("alone")
    prompts = ["a dog on a beach", "", "a <route>", "a <bound> and a <route>"]
    base = sample(slim_backbone, ConceptBank(bank.layout), prompts[:2], [1, 2], settings)
    found = sample(slim_backbone, bank, prompts, [1, 2, 3, 4], settings)
    assert torch.equal(found[:2], base)
    for other in ("route", "bound"):      # one way does not depend on the other being there
        assert torch.equal(picture(slim_backbone, bank, f"a <{other}>"),
                           picture(slim_backbone, bank.remove({"route": "bound", "bound": "route"}[other]),
                                   f"a <{other}>"))


def test_every_concept_of_a_mixed_bank_acts_in_regions(mixed, slim_backbone):
    regions = [Region("a <route>", box=(0.0, 0.0, 1.0, 0.5)), Region("a <bound>", box=(0.0, 0.5, 1.0, 1.0))]
    one, two = (sample_regions(slim_backbone, mixed, "a meadow", regions, [1], QUICK) for _ in range(2))
    assert torch.equal(one, two) and torch.isfinite(one).all()
    for way in (*WAYS, "alone"):
        quiet = sample_regions(slim_backbone, silenced(mixed, way), "a meadow", regions, [1], QUICK)
        assert not torch.allclose(quiet, one, atol=1e-5), way
