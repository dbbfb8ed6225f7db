"""`python -m continual_concepts.benchmarks regional`: its figures on pictures that are known, its ways, and a
short run end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import embedded as continual
from continual_concepts.benchmarks.cost.synthetic import Operations, context_of, deltas_of, peak_gb
from continual_concepts.benchmarks.regional import cost as regional_cost
from continual_concepts.benchmarks.regional import pictures as regional_pictures
from continual_concepts.benchmarks.regional import quality as regional_quality
from continual_concepts.benchmarks.regional.quality import (
    NAMES,
    border_gradient,
    boxes_of,
    recognised,
    requests,
)
from continual_concepts.benchmarks.regional.rivals import WAYS, Request
from continual_concepts.core.conditioning.routing import aggregate
from continual_concepts.core.demo import base
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings

LEVELS = torch.tensor([0.5, 0.5])
HALVES = boxes_of(2)


def test_which_concept_a_region_shows():
    found = recognised(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), LEVELS, True)
    assert found.hit.all() and not found.missing.any() and found.shown.tolist() == [0, 1]
    swapped = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    found = recognised(swapped, LEVELS, True)
    assert not found.hit.any() and not found.missing.any()      # both are there, in the wrong places
    assert found.shown.tolist() == [1, 0]
    assert recognised(swapped, LEVELS, False).hit.all()      # nobody asked for places
    twins = recognised(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), LEVELS, True)
    assert twins.hit.tolist() == [True, False] and twins.missing.tolist() == [False, True]
    nobody = recognised(torch.tensor([[0.4, 0.1], [0.2, 0.3]]), LEVELS, True)
    assert nobody.shown.tolist() == [-1, -1] and nobody.missing.all()


def test_borders_are_found_where_there_are_some():
    flat = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    assert border_gradient(flat, HALVES) == pytest.approx(1.0, abs=0.15)
    halves = flat * 0.1
    halves[..., 64:] += 1.0
    assert border_gradient(halves, HALVES) > 10
    assert border_gradient(flat, boxes_of(1)) == 1.0


@pytest.mark.parametrize("count", regional_quality.GRIDS)
def test_requests_name_every_concept_in_boxes_that_cover_the_picture(count):
    found = requests(count, 6)
    assert len({request.names for request in found}) == 6
    assert {name for request in found for name in request.names} == set(NAMES)
    for request in found:
        area = sum((bottom - top) * (right - left) for top, left, bottom, right in request.boxes)
        assert area == pytest.approx(1.0) and all(f"<{name}>" in request.listed for name in request.names)
        height, width = request.settings.size
        assert height * width == count * regional_quality.SIDE**2


@pytest.fixture(scope="module")
def bank(tiny_backbone, make_concept):
    from continual_concepts.core.bank.bank import ConceptBank

    bank = ConceptBank(tiny_backbone.layout)
    for i, name in enumerate(("rex", "mimi")):
        bank = bank.add(make_concept(tiny_backbone.layout, name, i, size=0.2))
    return bank


@pytest.fixture
def both():
    return Request(("rex", "mimi"), HALVES, "at night", (1,), SampleSettings(steps=2, cfg=2.0, size=(32, 64)))


def test_every_way_draws_something_of_its_own(tiny_backbone, bank, both):
    found = {name: way(tiny_backbone, bank, both) for name, way in WAYS.items()}
    assert all(picture.shape == (1, 3, 32, 64) and picture.abs().max() <= 1 for picture in found.values())
    names = [name for name in found if name != "found"]      # two steps are too few to find anything
    for i, one in enumerate(names):
        assert not any(torch.allclose(found[one], found[other], atol=1e-4) for other in names[i + 1:])


def test_with_one_concept_over_everything_all_ways_are_its_prompt(tiny_backbone, bank):
    """So that what differs is how several are kept apart and nothing else."""
    one = Request(("rex",), boxes_of(1), "at night", (1,), SampleSettings(steps=2, cfg=2.0, size=(32, 32)))
    alone = sample(tiny_backbone, bank, [one.listed], [1], one.settings)
    for name, way in WAYS.items():
        assert torch.allclose(way(tiny_backbone, bank, one), alone, atol=1e-4), name


def test_all_at_once_loads_every_concept(tiny_backbone, bank, both):
    assert aggregate(tiny_backbone, bank, bank.parse(both.listed)).weights.min() == 1


class ToyCost:
    """Regions take a tenth more than plain, on a machine that gets slower all the time."""

    def __init__(self):
        self.pace, self.counter = 1.0, None

    def measured(self, times, peak=4.0):
        self.pace *= 1.0001
        if self.counter is not None:
            self.counter.count += round(100 * times)
        return {"seconds": [2 * times * self.pace, times * self.pace], "peak_gb": peak}

    def plain(self):
        return self.measured(1.0)

    def regions(self, boxes, is_word_bound=True):
        return self.measured(1.1 if is_word_bound else 1.2, None if len(boxes) == 2 else 5.0)

    def prompt(self, count):
        return self.measured(1.01)

    def hooks(self, count):
        return self.measured(float(count))


def test_costs_are_ratios_of_neighbours():
    found = regional_cost.measure(ToyCost(), 3, lambda _: None)
    assert found["plain"]["step_seconds"] == pytest.approx(1.0, rel=1e-3) and found["plain"]["peak_gb"] == 4.0
    assert found["regions"]["4"]["over_plain"] == pytest.approx(1.1, rel=1e-3)
    assert found["regions"]["4"]["peak_over_plain"] == 1.25
    assert found["regions"]["2"]["peak_over_plain"] is None
    assert found["hooks"]["4"]["over_plain"] == pytest.approx(4.0, rel=1e-3)
    assert "operations" not in found["hooks"]["4"]
    assert found["plain"]["operations"] == 100 and found["regions"]["8"]["operations_over_plain"] == 1.1
    assert found["routed"]["4"]["over_plain"] == pytest.approx(1.2, rel=1e-3)
    assert found["prompt"]["2"]["operations"] == 101
    assert found["layouts"]["overlap"]["operations_over_plain"] == 1.1


COSTS = {"crop denoising": 1.5, "isolation": 0.8, "region attention": 1.1}


class ToySteps(ToyCost):
    """Steps with crop denoising take 1.5 plain ones, steps with isolation 0.8."""

    def regions(self, boxes, is_word_bound=True, crops=False, isolated=False):
        assert not (crops and isolated)
        return self.measured(1.5 if crops else 0.8 if isolated else 1.1)


def test_pictures_cost_what_their_steps_cost():
    found = regional_pictures.measure(ToySteps(), 3, lambda _: None)
    assert set(found["steps"]) == set(found["pictures"]) == set(regional_pictures.LAYOUTS)
    for costs in found["steps"].values():
        assert costs == pytest.approx(COSTS, rel=1e-3)
    for costs in found["pictures"].values():
        expected = {"0.7 / 1": 0.7 * 1.5 + 0.3 * 0.8, "0.4 / 0": 0.4 * 1.5 + 0.6 * 1.1}
        assert costs == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("crop_denoising", "isolation", "expected"), [
    (0, 0, 1.1), (1, 0, 1.5), (1, 1, 1.5), (0, 1, 0.8), (0.5, 0.25, 0.75 + 0.55),
    (0.25, 0.5, 0.375 + 0.2 + 0.55),
])
def test_isolation_costs_only_after_crop_denoising(crop_denoising, isolation, expected):
    assert regional_pictures.Shares(crop_denoising, isolation).mean(COSTS) == pytest.approx(expected)


@pytest.fixture
def unet_cost(tiny_backbone, monkeypatch):
    """The cost on the tiny UNet, whose texts are narrower than SD1.5's."""
    width = tiny_backbone.layout.sites[0].context_width
    monkeypatch.setattr("continual_concepts.benchmarks.cost.synthetic.WIDTH", width)
    return regional_cost.DiffusersCost(tiny_backbone, 64, 3)


def test_the_unet_alone(unet_cost):
    for found in (unet_cost.plain(), unet_cost.regions(HALVES), unet_cost.regions(HALVES, False)):
        assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0


OF_A_SITE = 5      # operations: four projections and attention


@pytest.mark.parametrize("is_word_bound", [True, False])
def test_more_regions_are_no_more_operations(tiny_backbone, unet_cost, is_word_bound):
    """On a graphics card each is a kernel launch. In regions that cover the picture a site takes at most as
    many more as it has; in other layouts fewer than thrice as many."""
    def counted(boxes) -> int:
        return regional_cost._counted(unet_cost, lambda: unet_cost.regions(boxes, is_word_bound))

    sites = OF_A_SITE * len(tiny_backbone.layout)
    with torch.inference_mode():
        plain = regional_cost._counted(unet_cost, unet_cost.plain)
        two, four = counted(HALVES), counted(regional_cost.boxes_of(4))
        others = [counted(boxes) for boxes in regional_cost.LAYOUTS.values()]
    assert two == four and plain < four <= plain + sites
    assert four < min(others) and max(others) < plain + 3 * sites


def test_operations_are_what_computes(tiny_backbone):
    counter, x = Operations(), torch.ones(4, 4)
    with counter:
        (x.T.reshape(16)[:3] + 1).mul_(2)      # a transposed matrix has to be copied for that
        torch.empty(3).view(3, 1)
    assert counter.count == 3


def test_synthetic_concepts_fit(tiny_backbone):
    from continual_concepts.core.model.deltas import check_fits

    check_fits(deltas_of(tiny_backbone.layout, seed=0), tiny_backbone.layout, "it")
    context = context_of(2, 3, seed=0, words={"rex": (1,)})
    assert context.hidden.shape == (2, 3, 77, 768) and context.words == ({}, {"rex": (1,)})


def test_a_peak_is_that_of_what_runs():
    def large():
        return torch.ones(60_000_000).sum()

    peaks = [peak_gb(run) for run in (large, lambda: None)]
    if None in peaks:
        pytest.skip("this system does not tell a process its peak")
    assert peaks[0] > peaks[1] + 0.15


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--pictures", "0"], "pictures is 0; allowed: 1 or more"),
    (["--steps", "1"], "steps is 1; allowed: 2 or more"),
    (["--only", "cost", "--comfyui", "nowhere"], "'nowhere' is not a ComfyUI folder"),
    (["--only", "pictures", "--comfyui", "nowhere"], "'nowhere' is not a ComfyUI folder"),
    (["--only", "pictures"], "--only pictures needs --comfyui"),
])
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, expected):
    assert main(["regional", "--json", str(tmp_path / "r.json"), *arguments]) == 1
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_short_run(tmp_path, capsys, monkeypatch):
    """Two concepts on small pictures, each learned from few photos."""
    monkeypatch.setattr(base, "load_base", cache(base.load_base))      # both runs of the command use it
    small = {"NAMES": NAMES[:2], "GRIDS": {1: (1, 1), 2: (1, 2)}, "SIDE": 64, "PHOTOS": 2, "BATCH": 1,
             "SEEDS": (100, 101), "SETTINGS": replace(continual.SETTINGS, steps=1)}
    for name, value in small.items():
        monkeypatch.setattr(regional_quality, name, value)
    monkeypatch.setattr(regional_quality, "_tasks", cache(regional_quality._tasks))
    command = ["regional", "--json", str(tmp_path / "r.json"), "--only", "quality", "--pictures", "1",
               "--learn-steps", "1"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["quality"]) == set(WAYS) and "| ours |" in shown
    row = result["quality"]["ours"]["2"]
    assert 0 <= row["hit_rate"] <= 1 and len(row["matrix"]) == 2 and row["pictures"] == 1
    monkeypatch.setattr(regional_quality, "quality", None)      # everything is there
    assert main(command) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == result
