"""From prompts to folded weights and pictures; without a concept the base's picture stays, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.prompts import NO_CONCEPTS
from continual_concepts.core.conditioning.routing import MODES, aggregate, always_on_deltas
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.deltas import LowRankDelta, weighted_sum
from continual_concepts.core.model.sites import SiteLayout
from continual_concepts.core.regional.noise import NoiseSettings
from continual_concepts.core.sampling.sampling import sample, starting_noise
from continual_concepts.core.sampling.settings import SampleSettings

QUICK = SampleSettings(steps=2, cfg=3.0, size=(32, 32))


@pytest.fixture(scope="module")
def bank(tiny_backbone, make_concept):
    bank = ConceptBank(tiny_backbone.layout)
    for i, name in enumerate(("rex", "mimi", "flat")):
        bank = bank.add(make_concept(tiny_backbone.layout, name, i, words=1 + i, layerwise=name != "flat",
                                     size=0.2))
    return bank


@pytest.fixture
def always_on(bank, make_concept):
    """The bank and a concept of a method that folds all its tasks into the weights."""
    return bank.add(make_concept(bank.layout, "tuned", 9, method="finetune", size=0.2))


def picture(backbone, bank, prompt="a photo of a dog", settings=QUICK):
    return sample(backbone, bank, [prompt], [7], settings)


def test_without_a_concept_the_picture_is_the_bases(any_backbone, bank):
    base = picture(any_backbone, ConceptBank(any_backbone.layout))
    assert base.shape == (1, 3, 32, 32) and torch.isfinite(base).all() and base.std() > 0
    assert torch.equal(picture(any_backbone, bank), base)


def test_a_concept_changes_its_own_pictures(tiny_backbone, bank):
    named = picture(tiny_backbone, bank, "<rex>")
    assert not torch.allclose(named, picture(tiny_backbone, bank, "<mimi>"), atol=1e-3)
    assert not torch.allclose(named, picture(tiny_backbone, bank, "<rex>", replace(QUICK, strength=0.0)),
                              atol=1e-3)


def test_the_prediction_type_matters(tiny_backbone, tiny_backbone_v, bank):
    assert not torch.allclose(picture(tiny_backbone, bank), picture(tiny_backbone_v, bank), atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_removing_a_concept_restores_earlier_pictures(tiny_backbone, bank, make_concept, mode):
    settings = replace(QUICK, mode=mode)
    before = picture(tiny_backbone, bank, "a <rex>", settings)
    grown = bank.add(make_concept(bank.layout, "new", 5, size=0.5))
    picture(tiny_backbone, grown, "a <new> and a <rex>", settings)
    assert torch.equal(picture(tiny_backbone, grown.remove("new"), "a <rex>", settings), before)


def test_an_always_on_concept_stays_on_until_removed(tiny_backbone, bank, always_on):
    base = picture(tiny_backbone, bank)
    assert not torch.allclose(picture(tiny_backbone, always_on), base, atol=1e-3)
    assert torch.equal(picture(tiny_backbone, always_on.remove("tuned")), base)
    found = aggregate(tiny_backbone, always_on, always_on.parse("a dog"), "equal", 0.0)
    assert (found.weights[:, :3] == 0).all() and (found.weights[:, 3] == 1).all()
    assert always_on_deltas(always_on).keys() == always_on["tuned"].deltas.keys()
    assert not always_on_deltas(bank)
    assert not aggregate(tiny_backbone, always_on, always_on.parse("a dog"), always_on=False).deltas


@pytest.mark.parametrize("others", [0, 1, 6])
def test_sharp_strength_does_not_depend_on_the_bank(tiny_backbone, bank, make_concept, others):
    grown = ConceptBank(bank.layout).add(bank["rex"])
    for i in range(others):
        grown = grown.add(make_concept(bank.layout, f"c{i}", 20 + i))
    found = aggregate(tiny_backbone, grown, grown.parse("a <rex>"), strength=0.7)
    assert torch.allclose(found.weights[:, 0], torch.tensor(0.7)) and not found.weights[:, 1:].any()
    assert torch.allclose(found.deltas[2, "to_q"].dense(), 0.7 * bank["rex"].deltas[2, "to_q"].dense())


@pytest.mark.parametrize(("mode", "check"), [
    ("equal", lambda w: torch.allclose(w, torch.full_like(w, 1 / 3))),
    ("released", lambda w: torch.allclose(w.sum(1), torch.tensor(0.8)) and (w > 0).all()),
    ("paper", lambda w: torch.allclose(w.norm(dim=1), torch.tensor(1.0)) and (w >= 0).all()),
    ("sharp", lambda w: set(w.flatten().tolist()) <= {0.0, 1.0} and w.max() == 1),
])
@pytest.mark.parametrize("prompt", ["a <rex>", "a <flat>", "<rex> <mimi> <flat> and" + 6 * " dogs"])
def test_weights_of_each_mode(tiny_backbone, bank, mode, check, prompt):
    found = aggregate(tiny_backbone, bank, bank.parse(prompt), mode)
    assert found.names == ("rex", "mimi", "flat") and found.weights.shape == (7, 3)
    assert check(found.weights)
    parts = [(float(found.weights[4, i]), bank[name].deltas[4, "to_v"]) for i, name in enumerate(found.names)]
    assert torch.allclose(found.deltas[4, "to_v"].dense(), weighted_sum(parts).dense(), atol=1e-6)


@pytest.mark.parametrize("name", ["rex", "flat"])
def test_a_single_concept_has_weight_one_in_paper_mode(tiny_backbone, bank, name):
    alone = ConceptBank(bank.layout).add(bank[name])
    for prompt in ("a dog", f"a <{name}>"):
        assert torch.allclose(aggregate(tiny_backbone, alone, alone.parse(prompt), "paper").weights,
                              torch.ones(7, 1))


def test_one_concept_acts_alone_whatever_the_prompt_says(tiny_backbone, bank):
    found = aggregate(tiny_backbone, bank, bank.parse("a photo of <rex>"), strength=0.5, only="mimi")
    assert (found.weights == torch.tensor([0.0, 0.5, 0.0])).all()
    with pytest.raises(ConceptError, match="holds no concept 'nobody'"):
        aggregate(tiny_backbone, bank, bank.parse("a photo of <rex>"), only="nobody")


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_bank_has_no_deltas(tiny_backbone, mode):
    found = aggregate(tiny_backbone, ConceptBank(tiny_backbone.layout), NO_CONCEPTS.parse("a dog"), mode)
    assert found.deltas == {} and found.weights.shape == (7, 0)


def weights_of(backbone):
    return {name: p.detach().clone() for name, p in backbone.unet.named_parameters()}


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_folding_is_undone_bit_for_bit(tiny_backbone, bank, error):
    before, deltas, site = weights_of(tiny_backbone), bank["rex"].deltas, tiny_backbone.layout.sites[1]
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    try:
        with tiny_backbone.folded(deltas), tiny_backbone.folded(bank["mimi"].deltas):
            changed = tiny_backbone.project(site, "to_out", x)
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    own = sum(bank[name].deltas[1, "to_out"].apply(x) for name in ("rex", "mimi"))
    assert torch.allclose(changed, tiny_backbone.project(site, "to_out", x) + own, atol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in tiny_backbone.unet.named_parameters())


def test_folding_what_does_not_fit_changes_nothing(tiny_backbone, bank):
    before = weights_of(tiny_backbone)
    deltas = {**bank["rex"].deltas, (6, "to_q"): LowRankDelta(torch.ones(3, 1), torch.ones(1, 3))}
    with pytest.raises(ConceptError, match="site 6"), tiny_backbone.folded(deltas):
        raise AssertionError("was entered")
    assert all(torch.equal(p, before[name]) for name, p in tiny_backbone.unet.named_parameters())


@pytest.mark.parametrize("mode", ["sharp", "released"])
def test_a_batch_of_mixed_prompts_equals_one_by_one(tiny_backbone, bank, mode):
    settings = replace(QUICK, mode=mode, batch=2)
    prompts = ["<rex>", "a dog", "<mimi> and <rex>", "<rex> runs", "<rex>"]
    together = sample(tiny_backbone, bank, prompts, [1, 2, 3, 4, 5], settings)
    for i, prompt in enumerate(prompts):
        assert torch.allclose(together[i], sample(tiny_backbone, bank, [prompt], [i + 1], settings)[0],
                              atol=1e-4)


def test_noise_of_a_seed_does_not_depend_on_its_batch(tiny_backbone):
    assert torch.equal(starting_noise(tiny_backbone, [3, 4], (32, 48))[1],
                       starting_noise(tiny_backbone, [4], (32, 48))[0])


@pytest.mark.parametrize("make", [
    lambda: SampleSettings(steps=0), lambda: SampleSettings(cfg=-1), lambda: SampleSettings(batch=0),
    lambda: SampleSettings(overlap="x"),
    lambda: NoiseSettings(outside="x"), lambda: NoiseSettings(crop_denoising=1.5),
    lambda: NoiseSettings(alpha=-1),
    lambda: NoiseSettings(area="x"),
])
def test_bad_settings_are_refused(make):
    with pytest.raises(ConceptError):
        make()


def test_bad_requests_are_refused(tiny_backbone, bank):
    other = ConceptBank(SiteLayout(bank.layout.sites[:3], bank.layout.text_widths))
    for backbone_bank, prompts, seeds, settings in [
        (bank, ["a", "b"], [1], QUICK), (bank, [], [], QUICK),
        (bank, ["a"], [1], replace(QUICK, size=(30, 32))),
        (bank, ["a"], [1], replace(QUICK, mode="loud")), (bank, ["<nobody>"], [1], QUICK),
        (other, ["a"], [1], QUICK),
    ]:
        with pytest.raises(ConceptError):
            sample(tiny_backbone, backbone_bank, prompts, seeds, settings)
