"""CIDM end to end: every reading of its losses trains and resumes; tokens stop by their length; maps are
regularised."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from continual_concepts.core.attention.adapters import adapter_key
from continual_concepts.core.attention.maps import MapProcessor, attention_maps, attention_regulariser
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import Task, make
from continual_concepts.core.methods.cidm_losses import orthogonality_released
from continual_concepts.tests.quick import thinned

READINGS = [{"orthogonality": o, "shared": s}
            for o, s in product(("rr", "aa", "released"), ("als", "gradient"))]


def tensors_of(learned):
    concept = learned.concept
    found = {(key, n): t for key, d in concept.deltas.items()
             for n, t in enumerate(d.tensors())} | dict(concept.tokens.vectors)
    return found | {("shared", name): t for name, t in learned.bank.shared.get("cidm", {}).items()}


@pytest.mark.parametrize("reading", thinned(READINGS, lambda place: place in (0, 3, 4)))
def test_every_reading_trains_and_resumes_exactly(slim_backbone, teach, tmp_path, reading):
    first = teach(slim_backbone, ConceptBank(slim_backbone.layout), settings=reading).bank
    given = {name: t.clone() for name, t in first.shared["cidm"].items()}
    infos = []

    def stop(info):
        if info.step == 2:
            raise KeyboardInterrupt

    whole = teach(slim_backbone, first, "mimi", settings=reading, callback=infos.append)
    with pytest.raises(KeyboardInterrupt):
        teach(slim_backbone, first, "mimi", settings=reading, callback=stop, checkpoint_file=tmp_path / "c")
    again = teach(slim_backbone, first, "mimi", settings=reading, checkpoint_file=tmp_path / "c")
    expected, found = tensors_of(whole), tensors_of(again)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert set(infos[-1].terms) == {"specific", "shared"}      # the masks are full, so no attention term
    assert infos[-1].terms["specific"] > 0 < infos[-1].terms["shared"]
    assert all(torch.equal(given[name], t) for name, t in first.shared["cidm"].items())
    assert any(not torch.equal(given[name], t) for name, t in whole.bank.shared["cidm"].items())


def test_the_gammas_hold_for_their_learning_rate(slim_backbone, teach):
    """At twice the rate the penalties weigh a quarter, so their share of a loss of twice the delta stays."""
    first = teach(slim_backbone, ConceptBank(slim_backbone.layout)).bank

    def weight(**settings):
        method = begun(slim_backbone, first, **settings)
        return method.matched

    assert weight(lr=1e-4) == weight(lr=2e-4, gamma_lr=0) == 1 and weight(lr=2e-4) == pytest.approx(0.25)


def test_the_released_loss_is_a_mean():
    g = torch.Generator().manual_seed(0)
    old, up = torch.randn(2, 6, 3, generator=g), torch.randn(6, 3, generator=g)
    products = torch.stack([(o @ up.T).abs().mean() for o in old]).mean()
    expected = products + (up - 1).square().mean()
    torch.testing.assert_close(orthogonality_released(old, up), expected)


def test_losses_can_be_off(slim_backbone, teach):
    off, infos = {"orthogonality": "off", "shared": "off", "attention_weight": 0.0}, []
    first = teach(slim_backbone, ConceptBank(slim_backbone.layout), settings=off)
    assert not first.bank.shared
    teach(slim_backbone, first.bank, "mimi", settings=off, callback=infos.append, steps=1)
    assert infos[0].terms == {}


def test_old_tasks_may_have_another_rank_or_reading(slim_backbone, teach):
    bank = ConceptBank(slim_backbone.layout)
    for i, reading in enumerate(READINGS):
        bank = teach(slim_backbone, bank, f"c{i}", settings=reading | {"rank": 1 + i, "shared_rank": 2 + i},
                     steps=1).bank
    assert len(bank) == len(READINGS)


def begun(backbone, bank, **settings):
    method = make("cidm", {"stored": "float32", **settings})
    method.begin(Task("new", "dog", backbone, bank))
    for i, up in enumerate(method.adapters.up.values()):
        torch.nn.init.normal_(up, generator=torch.Generator().manual_seed(i))
    return method


@pytest.fixture(scope="module")
def bank(slim_backbone, make_concept):
    bank = ConceptBank(slim_backbone.layout)
    for i in range(3):
        bank = bank.add(make_concept(slim_backbone.layout, f"c{i}", i))
    return bank.add(make_concept(slim_backbone.layout, "other", 9, method="finetune"))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_specific_is_r1_over_all_sites_and_the_methods_own_concepts(slim_backbone, bank, scale):
    """The A of old and new deltas, with their scales."""
    method, expected = begun(slim_backbone, bank, rank=2, scale=scale), {"rr": 0.0, "aa": 0.0}
    for (index, projection), up in ((key, method.adapters.up[adapter_key(*key)].detach())
                                    for key in method.adapters.keys):
        for name in ("c0", "c1", "c2"):
            old = bank[name].deltas[index, projection]
            expected["rr"] += scale * float((0.5 * old.up.T @ up).abs().sum())
            expected["aa"] += scale * float((0.5 * old.up @ up.T).abs().sum())
    assert method.specific().item() == pytest.approx(expected["rr"], rel=1e-4)
    printed = begun(slim_backbone, bank, rank=2, scale=scale, orthogonality="aa")
    assert printed.specific().item() == pytest.approx(expected["aa"], rel=1e-4)


@pytest.mark.parametrize("shared", ["als", "gradient"])
def test_the_second_step_lowers_r2_and_leaves_the_deltas(slim_backbone, bank, shared):
    method = begun(slim_backbone, bank, rank=2, shared=shared, lr=1e-3)
    before, weights = method.shared().item(), [p.clone() for p in method.adapters.parameters()]
    for step in range(5):
        method.after_step(step + 1)
    assert 0 < method.shared().item() < before
    assert all(torch.equal(a, b) for a, b in zip(weights, method.adapters.parameters(), strict=True))


def test_tokens_stop_at_their_length(slim_backbone, teach):
    """Deltas go on; the run that resumes afterwards stays stopped (see the next test)."""
    lengths, bank = [], ConceptBank(slim_backbone.layout)
    start = teach(slim_backbone, bank, settings={"token_norm_stop": 1e-6}, steps=1)
    learned = teach(slim_backbone, bank, settings={"token_norm_stop": 1e-6}, steps=3)
    free = teach(slim_backbone, bank, settings={"token_norm_stop": 0.0}, steps=3)
    for one in (start, learned, free):
        lengths.append(one.concept.tokens.vectors["clip_l"])
    # learning rates differ between runs of 1 and 3 steps only after the first step, in which the tokens still
    # moved
    assert torch.equal(lengths[0], lengths[1]) and not torch.equal(lengths[1], lengths[2])
    assert not torch.equal(start.concept.deltas[0, "to_q"].up, learned.concept.deltas[0, "to_q"].up)


def test_a_resumed_run_keeps_its_tokens_stopped(slim_backbone, teach, tmp_path):
    def stop(info):
        raise KeyboardInterrupt

    bank, settings = ConceptBank(slim_backbone.layout), {"token_norm_stop": 1e-6}
    whole = teach(slim_backbone, bank, settings=settings)
    with pytest.raises(KeyboardInterrupt):
        teach(slim_backbone, bank, settings=settings, callback=stop, checkpoint_file=tmp_path / "c")
    resumed = teach(slim_backbone, bank, settings=settings, checkpoint_file=tmp_path / "c")
    expected, found = tensors_of(whole), tensors_of(resumed)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_words_without_layers_have_one_copy(slim_backbone, teach):
    concept = teach(slim_backbone, ConceptBank(slim_backbone.layout), settings={"layerwise": False},
                    steps=1).concept
    assert concept.tokens.vectors["clip_l"].shape == (1, 2, 32)


BAD = [{"orthogonality": "x"}, {"shared": "x"}, {"shared_rank": 0}, {"gamma1": -1}, {"gamma2": float("nan")}]


@pytest.mark.parametrize("settings", BAD)
def test_bad_settings_are_named(settings):
    with pytest.raises(ConceptError, match=next(iter(settings))):
        make("cidm", settings)


MASK = torch.zeros(1, 1, 4, 4)
MASK[..., :2] = 1


def maps(first, second):
    """Maps `[1, 16, 5]` in which words 1 and 2 look like the given pictures."""
    m = torch.full((1, 16, 5), 0.01)
    m[0, :, 1], m[0, :, 2] = first.flatten(), second.flatten()
    return [m]


def regulariser(first, second, mask=MASK, positions=((1, 2),)):
    return attention_regulariser(maps(first, second), positions, mask)


def test_the_regulariser_is_zero_for_maps_that_equal_the_mask():
    assert regulariser(MASK, MASK) == 0
    assert regulariser(0.3 * MASK, 0.2 * MASK) < 1e-9      # maps are divided by their maximum
    even, away = torch.ones(4, 4), 1 - MASK
    assert 0 < regulariser(even, MASK) < regulariser(away, MASK) + 1e-6
    assert 0 < regulariser(MASK, even) < regulariser(MASK, away)


def test_the_regulariser_is_the_released_formula():
    g = torch.Generator().manual_seed(0)
    first, second = torch.rand(4, 4, generator=g), torch.rand(4, 4, generator=g)
    one, two = first / first.max(), second / second.max()
    expected = (two - MASK[0, 0]).square().mean() + one[MASK[0, 0] == 0].mean()
    assert torch.allclose(regulariser(first, second), expected)
    assert regulariser(first, second, torch.ones_like(MASK)) is None      # no outside: both terms drop out


def test_a_full_mask_does_not_change_other_samples():
    g = torch.Generator().manual_seed(0)
    both = [torch.rand(2, 16, 5, generator=g)]
    masks = torch.cat([MASK, torch.ones_like(MASK)])
    alone = attention_regulariser([both[0][:1]], ((1, 2),), MASK)
    assert torch.allclose(attention_regulariser(both, ((1, 2), (1, 2)), masks), alone)


@pytest.mark.parametrize(("mask", "terms"), [(MASK, {"attention"}), (torch.ones_like(MASK), set())])
def test_the_attention_term_needs_an_object_mask(slim_backbone, mask, terms):
    method = begun(slim_backbone, ConceptBank(slim_backbone.layout))
    method.maps.maps = maps(torch.ones(4, 4), MASK)
    context = SimpleNamespace(words=({"new": (1, 2)},))
    seen = SimpleNamespace(context=context, batch=SimpleNamespace(masks=mask))
    assert set(method.penalty(seen)) == terms


def test_the_regulariser_sums_resolutions_and_averages_sites():
    g = torch.Generator().manual_seed(0)
    fine, fine_too, coarse = (torch.rand(1, n, 5, generator=g) for n in (16, 16, 4))
    whole = attention_regulariser([fine, coarse, fine_too], ((1, 2),), MASK)
    parts = attention_regulariser([(fine + fine_too) / 2], ((1, 2),),
                                  MASK) + attention_regulariser([coarse], ((1, 2),), MASK)
    assert torch.allclose(whole, parts)


@pytest.mark.parametrize("positions", [((),), ((1,),)])
def test_samples_without_two_words_have_no_regulariser(positions):
    assert regulariser(MASK, MASK, positions=positions) is None


def test_maps_are_probabilities_averaged_over_heads():
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 8, generator=g), torch.randn(2, 5, 8, generator=g)
    found = attention_maps(query, key, 2)
    heads = [torch.softmax(query[..., s] @ key[..., s].transpose(1, 2) / 2, -1)
             for s in (slice(0, 4), slice(4, 8))]
    assert torch.allclose(found, sum(heads) / 2,
                          atol=1e-6) and torch.allclose(found.sum(-1), torch.ones(2, 6))


def test_only_the_last_forward_pass_is_kept(slim_backbone, bank):
    method = begun(slim_backbone, bank)
    processor = method.processor()
    assert isinstance(processor, MapProcessor)
    context = encode_prompts(slim_backbone, bank.vocabulary.parse_all(["a dog"]), {})
    for _ in range(2):
        slim_backbone.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), context, processor)
    assert [m.shape[1] for m in processor.take()] == [64] * 3 and processor.take() == []
