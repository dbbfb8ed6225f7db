"""Orthogonal Adaptation: fixed row spaces out of one matrix, disjoint while there is room."""

from __future__ import annotations

import warnings

import pytest
import torch

from continual_concepts.core.attention.adapters import adapter_key
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.routing import always_on_deltas
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import Task, make
from continual_concepts.core.methods.orthogonal_adaptation import (
    draw_columns,
    orthogonal_matrix,
    taken_columns,
)

NAME = "orthogonal_adaptation"
# row 0 of O for width 32; another one would not fit concepts learned before
GOLDEN = [-0.127284, -0.228549, -0.058876]


def empty(backbone):
    return ConceptBank(backbone.layout)


@pytest.fixture(scope="module")
def bank(slim_backbone, teach):
    """Four concepts of eight columns each: all of the narrowest inputs, which are 32 wide."""
    bank = empty(slim_backbone)
    for name in ("rex", "mimi", "bear", "duck"):
        bank = teach(slim_backbone, bank, name, NAME, {"rank": 8}, steps=2).bank
    return bank


def begun(backbone, bank, name="new", **settings):
    method = make(NAME, settings)
    method.begin(Task(name, "dog", backbone, bank))
    return method


def rows(method, key=(0, "to_k")):
    return method.adapters.down[adapter_key(*key)]


def test_the_matrix_is_orthogonal_and_the_same_for_everybody():
    basis = orthogonal_matrix(32)
    assert torch.allclose(basis.T @ basis, torch.eye(32),
                          atol=1e-6) and torch.equal(basis, orthogonal_matrix(32))
    assert torch.allclose(basis[0, :3], torch.tensor(GOLDEN), atol=1e-5)


def test_columns_are_recognised_from_rows_of_any_length_and_precision():
    basis = orthogonal_matrix(16)
    chosen = torch.tensor([3, 7, 15])
    down = (basis[:, chosen].T * torch.tensor([[5.0], [0.1], [1.0]])).half()
    assert taken_columns(basis, [down]).nonzero().flatten().tolist() == [3, 7, 15]
    assert taken_columns(basis, [down[:1], down[1:]]).sum() == 3 and not taken_columns(basis, []).any()
    mixed = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0))).Q.T
    # a foreign row space blocks every column that it reaches
    assert taken_columns(basis, [mixed]).sum() > 3


@pytest.mark.parametrize("free", [10, 4, 2, 0])
def test_free_columns_are_drawn_first(free):
    taken = torch.arange(12) >= free
    drawn = draw_columns(taken, 4, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == 4 and int((~taken[drawn]).sum()) == min(free, 4)


def test_concepts_of_a_sequence_are_orthogonal(bank, slim_backbone):
    concepts = list(bank)
    for key in concepts[0].deltas:
        downs = torch.cat([concept.deltas[key].down for concept in concepts])
        assert torch.allclose(downs @ downs.T, torch.eye(32), atol=1e-5), key


def test_a_concept_does_nothing_to_inputs_in_another_s_space(bank):
    """dW_j X_i = 0 for X_i in the span of B_i: no crosstalk, and not because nothing was learned."""
    one, other = bank["rex"], bank["mimi"]
    for key, delta in one.deltas.items():
        inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)) @ delta.down
        assert delta.apply(inputs).abs().max() > 1e-3
        assert other.deltas[key].apply(inputs).abs().max() < 1e-5 * delta.apply(inputs).abs().max() + 1e-6


def test_only_the_other_factor_trains(slim_backbone, teach):
    method = begun(slim_backbone, empty(slim_backbone), "rex", rank=8)
    _, weights = method.parameter_groups()
    assert len(weights["params"]) == 4 * len(slim_backbone.layout)
    assert all(p.requires_grad for p in weights["params"])
    assert not any(p.requires_grad for p in method.adapters.down.values())
    learned = teach(slim_backbone, empty(slim_backbone), "rex", NAME, {"rank": 8}).concept
    for key, delta in learned.deltas.items():
        assert torch.equal(delta.down, rows(method, key)) and delta.up.any()


def test_the_columns_of_a_removed_concept_are_free_again(bank, slim_backbone):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = begun(slim_backbone, bank.remove("mimi").rename("bear", "other"), rank=8)
    overlap = rows(method) @ bank["mimi"].deltas[0, "to_k"].down.T
    assert torch.allclose(overlap.square().sum(), torch.tensor(8.0), atol=1e-4)      # the very same eight


def test_running_out_of_columns_is_said_and_shares_with_old_ones(bank, slim_backbone):
    with pytest.warns(UserWarning, match="finds 0 of 8 columns of width 32 free"):
        method = begun(slim_backbone, bank, rank=8)
    assert torch.allclose(rows(method) @ rows(method).T, torch.eye(8), atol=1e-5)
    with pytest.warns(UserWarning, match="finds 8 of 12 columns"):
        method = begun(slim_backbone, bank.remove("duck"), rank=12)
    gone = bank["duck"].deltas[0, "to_k"].down
    assert torch.allclose((rows(method) @ gone.T).square().sum(), torch.tensor(8.0), atol=1e-4)


def test_random_columns_depend_on_the_name_and_not_on_the_bank(bank, slim_backbone):
    with warnings.catch_warnings():
        warnings.simplefilter("error")      # the paper's draw has no notion of running out
        first = rows(begun(slim_backbone, empty(slim_backbone), "new", rank=8, columns="random"))
        again = rows(begun(slim_backbone, bank, "new", rank=8, columns="random"))
        other = rows(begun(slim_backbone, bank, "else", rank=8, columns="random"))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_concepts_learned_apart_draw_from_one_matrix(slim_backbone):
    basis = orthogonal_matrix(32)
    for name in ("rex", "mimi"):
        hits = (rows(begun(slim_backbone, empty(slim_backbone), name, rank=8)) @ basis).abs() > 0.999
        assert hits.sum() == 8


def test_the_merge_has_the_paper_s_weight(bank):
    found = always_on_deltas(bank)
    for key, delta in found.items():
        assert torch.allclose(delta.dense(), 0.6 * sum(concept.deltas[key].dense() for concept in bank),
                              atol=1e-6)
    assert [make(NAME).composition.share(g) for g in (1, 2, 9)] == [1.0, 0.6, 0.6]


def test_a_rank_that_no_input_has_is_refused(slim_backbone):
    with pytest.raises(ConceptError, match="'rank' is 33; allowed: 1 to 32"):
        begun(slim_backbone, empty(slim_backbone), rank=33)


@pytest.mark.parametrize("settings", [{"columns": "first"}, {"rank": 129}, {"token_lr": -1.0}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ConceptError, match=f"'{next(iter(settings))}'"):
        make(NAME, settings)
