"""Neuron selections as sets, and the scores that choose them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.processor import AttentionProcessor
from continual_concepts.core.neurons.neurons import (
    NeuronSelection,
    Votes,
    base_neurons,
    concept_neurons,
    unit_count,
)
from continual_concepts.core.neurons.scores import (
    CALIBRATION,
    GradientProcessor,
    activation_scores,
    encode_plain,
    general_neurons,
    gradient_scores,
    imagine,
    key_value_weights,
    text_positions,
    weight_of,
)

KEY = (0, "to_k")
SIZE = (4, 5)      # to_k of the first site of the `layout` fixture


def selection(places, key=KEY, size=SIZE):
    return NeuronSelection({key: torch.tensor(sorted(places), dtype=torch.int32)}, {key: size})


def places(chosen, key=KEY):
    return set(chosen.indices[key].tolist())


def random_scores(seed=0, keys=((0, "to_k"), (0, "to_v")), size=(20, 30)):
    g = torch.Generator().manual_seed(seed)
    return {key: torch.rand(size, generator=g) for key in keys}


entries = st.sets(st.integers(0, SIZE[0] * SIZE[1] - 1))


@given(entries, entries)
@settings(max_examples=30, deadline=None)
def test_selections_are_sets(one, two):
    a, b = selection(one), selection(two)
    assert places(a | b) == one | two and places(a - b) == one - two and places(a & b) == one & two
    assert len(a) == len(one) and a.share() == pytest.approx(len(one) / 20)
    assert a.share(1000) == pytest.approx(len(one) / 1000)
    assert set(a.mask(KEY).flatten().nonzero().flatten().tolist()) == one


@given(entries)
@settings(max_examples=30, deadline=None)
def test_a_selection_survives_as_bits(layout, one):
    packed = selection(one).to_tensors()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()} == {"0-to_k": (torch.uint8, (3,))}
    again = NeuronSelection.from_tensors(packed, layout)
    assert places(again) == one and again.sizes == {KEY: SIZE}


def test_other_weights_are_kept_apart():
    a, b = selection({1}), selection({2}, (1, "to_v"), (6, 5))
    both = a | b
    assert places(both) == {1} and places(both, (1, "to_v")) == {2}
    assert (a - b).indices.keys() == {KEY} and places(a - b) == {1}
    assert len(a & b) == 0


def test_whole_neurons_are_rows(layout):
    found = NeuronSelection.of_rows({KEY: torch.tensor([1, 3])}, layout)
    assert found.mask(KEY).all(1).tolist() == [False, True, False, True] and len(found) == 10


def test_wrong_selections_are_refused(layout):
    for wrong in ([20], [-1], [3, 3]):
        with pytest.raises(ConceptError, match="0 to 19 once"):
            selection(wrong)
    with pytest.raises(ConceptError, match="one size"):
        selection({1}) | selection({1}, size=(5, 5))
    with pytest.raises(ConceptError, match="needs 4x5"):
        selection({1}, size=(5, 5)).check_fits(layout)
    for key in ((3, "to_k"), (0, "to_x")):
        with pytest.raises(ConceptError, match="selection has"):
            selection({1}, key).check_fits(layout)
    selection({1}).check_fits(layout)


@pytest.mark.parametrize("tensors", [
    {"9-to_k": torch.zeros(3, dtype=torch.uint8)}, {"to_k": torch.zeros(3, dtype=torch.uint8)},
    {"0-to_k": torch.zeros(4, dtype=torch.uint8)}, {"0-to_k": torch.zeros(3)},
])
def test_damaged_bits_are_refused(layout, tensors):
    with pytest.raises(ConceptError, match="neuron mask"):
        NeuronSelection.from_tensors(tensors, layout)


@pytest.mark.parametrize("unit", ["weight", "row"])
def test_base_general_and_concept_neurons(unit):
    scores, votes = random_scores(), Votes(0.2, 0.5, unit)
    for seed in (0, 0, 1):
        votes.add(random_scores(seed))
    general = votes.general()
    base = base_neurons(scores, 0.2, unit)
    assert all(places(base, key) <= places(general, key) for key in scores)      # in two votes of three
    concept = concept_neurons(scores, general, 0.1, unit)
    assert len(concept & general) == 0
    assert all(len(concept.indices[key]) == 60 for key in scores) and concept.share() == pytest.approx(0.1)
    for key, own in scores.items():      # nothing better was left out
        units, block = (own.flatten(), 1) if unit == "weight" else (own.sum(1), 30)
        taken = {place // block for place in places(concept, key)}
        rest = set(range(len(units))) - taken - {place // block for place in places(general, key)}
        assert min(units[i] for i in taken) >= max(units[i] for i in rest)


def test_without_general_neurons_base_is_concept():
    scores = random_scores()
    assert all(places(base_neurons(scores, 0.1), key) == places(concept_neurons(scores, None, 0.1), key)
               for key in scores)


def test_votes_count_prompts_apart():
    votes = Votes(1 / 20, 1.0)
    for place in (3, 7):
        scores = torch.zeros(4, 5)
        scores.view(-1)[place] = 1.0
        votes.add({KEY: scores})
    assert len(votes.general()) == 0
    votes.quorum = 0.5
    assert places(votes.general()) == {3, 7}


@pytest.mark.parametrize("share, unit", [(0.0, "weight"), (1.5, "weight"), (0.1, "column")])
def test_bad_shares_and_units_are_named(share, unit):
    with pytest.raises(ConceptError, match="unit and share"):
        unit_count((4, 5), share, unit)
    with pytest.raises(ConceptError, match="quorum"):
        Votes(quorum=0.0)


@pytest.mark.parametrize("projection", ["to_k", "to_v", "to_q", "to_out"])
def test_a_weight_is_read_through_its_projection(tiny_backbone, projection):
    for index in (0, 3):
        real = tiny_backbone.weight(tiny_backbone.layout.sites[index], projection)
        assert torch.allclose(weight_of(tiny_backbone, (index, projection)), real, atol=1e-6)


def test_the_activation_score_is_that_of_pruning(tiny_backbone):
    prompts = ["a red dog", "a cat"]
    context, where = encode_plain(tiny_backbone, prompts), text_positions(tiny_backbone, prompts)
    assert where[0][0] == 1 and len(where[0]) == len(tiny_backbone.text[0].ids("a red dog"))
    scores = activation_scores(tiny_backbone, context, where)
    assert scores.keys() == set(key_value_weights(tiny_backbone.layout))
    x = torch.cat([context.hidden[0, 0, where[0]], context.hidden[1, 0, where[1]]])
    expected = weight_of(tiny_backbone, (2, "to_v"))[5, 7].abs() * x[:, 7].square().sum().sqrt()
    assert scores[2, "to_v"][5, 7] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ConceptError, match="to_k, to_v"):
        activation_scores(tiny_backbone, context, where, [(0, "to_q")])


def loss_inputs(backbone):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8,
                       generator=g), torch.tensor([100, 600]), encode_plain(backbone, ["a red dog", "a cat"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_frozen_weights(tiny_backbone, checkpointing):
    keys = [(0, "to_k"), (3, "to_v"), (6, "to_k"), (2, "to_q"), (5, "to_out")]
    latents, t, context = loss_inputs(tiny_backbone)
    context.hidden.detach_()
    processor = GradientProcessor(keys, AttentionProcessor())
    with tiny_backbone.gradient_checkpointing(checkpointing):
        tiny_backbone.predict(latents, t, context, processor).square().mean().backward()
    weights = [tiny_backbone.weight(tiny_backbone.layout.sites[index], projection)
               for index, projection in keys]
    assert all(weight.grad is None for weight in weights)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        expected = torch.autograd.grad(tiny_backbone.predict(latents, t, context).square().mean(), weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    for key, gradient in zip(keys, expected, strict=True):
        assert torch.allclose(processor.sums[key], gradient, atol=1e-7 + 1e-4 * gradient.abs().max()), key


def test_samples_of_weight_zero_leave_no_gradient(tiny_backbone):
    latents, t, context = loss_inputs(tiny_backbone)
    sums = []
    for rows in (torch.tensor([1.0, 0.0]), None):
        processor = GradientProcessor([KEY])
        processor.rows = rows
        output = tiny_backbone.predict(latents, t, context, processor)
        (output if rows is not None else output[:1]).square().sum().backward()
        sums.append(processor.sums[KEY])
    assert torch.allclose(*sums, atol=1e-3 * sums[0].abs().max())


def test_gradient_scores_see_the_pictures(tiny_backbone):
    context, told = encode_plain(tiny_backbone, ["a dog"]), []

    def scores(seed, picture):
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(picture))
        return gradient_scores(tiny_backbone, latents, context, torch.Generator().manual_seed(seed), 3, 2,
                               [KEY], lambda done, total: told.append((done, total)))[KEY]

    one = scores(0, 0)
    assert torch.equal(one, scores(0, 0)) and not torch.equal(one, scores(0, 1)) and (one >= 0).all()
    assert told[:2] == [(2, 3), (3, 3)]
    assert all(p.grad is None for p in tiny_backbone.unet.parameters())


def test_scores_work_under_inference_mode(tiny_backbone):
    with torch.inference_mode():
        context, g = encode_plain(tiny_backbone, ["a dog"]), torch.Generator().manual_seed(0)
        found = gradient_scores(tiny_backbone, torch.randn(1, 4, 8, 8), context, g, 1, 1, [KEY])
    assert found[KEY].any()


def test_imagined_pictures_are_finite_and_seeded(tiny_backbone_v):
    one, two = (imagine(tiny_backbone_v, "a dog", (8, 8), torch.Generator().manual_seed(seed), 3)
                for seed in (0, 0))
    assert one.shape == (1, 4, 8, 8) and torch.isfinite(one).all() and torch.equal(one, two)


@pytest.mark.parametrize("score", ["gradient", "activation"])
def test_general_neurons_of_a_base(tiny_backbone, score):
    keys, told = [(0, "to_k"), (4, "to_v")], []

    def general(quorum):
        return general_neurons(tiny_backbone, torch.Generator().manual_seed(0), CALIBRATION[:3], score, 0.1,
                               quorum, size=(8, 8), draws=1, keys=keys, progress=lambda done,
                               total: told.append((done, total)))

    most, all_three = general(0.6), general(1.0)
    assert told[:3] == [(1, 3), (2, 3), (3, 3)]
    assert len(all_three
               - most) == 0 and 0 < len(most) <= 0.1 / 0.6 * sum(a * b for a, b in most.sizes.values())
    most.check_fits(tiny_backbone.layout)


def test_unknown_scores_and_empty_calibration_are_refused(tiny_backbone):
    for score, prompts in (("fisher", CALIBRATION), ("gradient", ())):
        with pytest.raises(ConceptError, match="gradient or activation"):
            general_neurons(tiny_backbone, torch.Generator(), prompts, score)


def test_calibration_prompts_differ():
    assert len(set(CALIBRATION)) == len(CALIBRATION) == 32
