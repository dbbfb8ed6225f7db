"""Deltas: both forms agree with their dense matrix; packing loses nothing and unpacking trusts nothing."""

from __future__ import annotations

import math

import pytest
import torch

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.deltas import (
    LowRankDelta,
    SparseDelta,
    check_fits,
    concatenate,
    pack,
    unpack,
    weighted_sum,
)


def low_rank(a=6, b=5, rank=2, seed=0, scale=0.5):
    g = torch.Generator().manual_seed(seed)
    return LowRankDelta(torch.randn(a, rank, generator=g), torch.randn(rank, b, generator=g), scale)


def sparse(a=6, b=5, count=7, seed=0, scale=0.5):
    g = torch.Generator().manual_seed(seed)
    return SparseDelta((a, b), torch.randperm(a * b, generator=g)[:count].int(),
                       torch.randn(count, generator=g), scale)


FORMS = pytest.mark.parametrize("make", [low_rank, sparse])


@FORMS
def test_applying_equals_the_dense_matrix(make):
    delta, x = make(), torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(delta.apply(x), x @ delta.dense().T, atol=1e-6)
    assert delta.shape == delta.dense().shape == (6, 5)


@FORMS
@pytest.mark.parametrize("weight", [0.0, -1.5, 2.0])
def test_scaling_scales_the_dense_matrix(make, weight):
    assert torch.allclose(make().scaled(weight).dense(), weight * make().dense())


@FORMS
def test_a_type_of_its_own_follows_the_input(make):
    delta = make().to(dtype=torch.float16)
    assert delta.apply(torch.ones(1, 5)).dtype == torch.float32
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(delta.tensors(), make().tensors(), strict=True))


@pytest.mark.parametrize(
    "parts",
    [
        [(2.0, low_rank())],
        [(1.0, low_rank(40, 30)), (-0.5, low_rank(40, 30, seed=1))],
        [(1.0, low_rank(rank=r, seed=r)) for r in (1, 2, 3)],
        [(1.0, sparse()), (0.25, sparse(seed=3))],
        [(0.3, sparse()), (0.7, low_rank())],
        [(1.0, low_rank()), (-1.0, low_rank())],
    ],
)
def test_a_weighted_sum_equals_the_sum_of_dense_matrices(parts):
    expected = sum(weight * delta.dense() for weight, delta in parts)
    assert torch.allclose(weighted_sum(parts).dense(), expected, atol=1e-5)


def test_a_sum_stays_low_rank_only_while_that_is_smaller():
    assert isinstance(weighted_sum([(1.0, low_rank(40, 30))] * 2), LowRankDelta)
    assert isinstance(weighted_sum([(1.0, low_rank(6, 5))] * 9), SparseDelta)


def test_concatenation_adds_ranks():
    joined = concatenate([(1.0, low_rank(rank=2)), (3.0, low_rank(rank=1, seed=1))])
    assert joined.up.shape == (6, 3)
    assert torch.allclose(joined.dense(), low_rank(rank=2).dense() + 3 * low_rank(rank=1, seed=1).dense(),
                          atol=1e-5)


def deltas_for(layout, make, projections=("to_q", "to_k", "to_out"), sites=(0, 1, 2)):
    shapes = {(i, p): layout.sites[i].shape(p) for p in projections for i in sites}
    return {key: make(*shape, seed=n, scale=0.1 + n) for n, (key, shape) in enumerate(shapes.items())}


@FORMS
@pytest.mark.parametrize("sites", [(0, 1, 2), (1,), (0, 2)])
def test_packing_round_trip(layout, make, sites):
    deltas = deltas_for(layout, make, sites=sites)
    again = unpack(*pack(deltas, layout), layout)
    assert again.keys() == deltas.keys()
    for key, delta in deltas.items():
        assert type(again[key]) is type(delta) and again[key].scale == delta.scale
        assert all(torch.equal(a, b) for a, b in zip(again[key].tensors(), delta.tensors(), strict=True))


def test_packing_keeps_both_forms_side_by_side(layout):
    deltas = deltas_for(layout, low_rank, ("to_q",)) | deltas_for(layout, sparse, ("to_k",)) | {}
    again = unpack(*pack(deltas, layout), layout)
    assert all(torch.equal(again[key].dense(), delta.dense()) for key, delta in deltas.items())
    assert pack({}, layout) == ({}, {}) and unpack({}, {}, layout) == {}


def test_a_sparse_delta_may_be_empty(layout):
    deltas = {(0, "to_q"): sparse(4, 4, 0), (1, "to_q"): sparse(6, 6, 3)}
    again = unpack(*pack(deltas, layout), layout)
    assert not again[0, "to_q"].dense().any() and again[1, "to_q"].dense().any()


@pytest.mark.parametrize(
    "deltas",
    [
        {(0, "to_q"): low_rank(4, 4), (1, "to_q"): sparse(6, 6)},
        {(0, "to_q"): low_rank(4, 4, 1), (1, "to_q"): low_rank(6, 6, 2)},
        {(0, "to_q"): low_rank(4, 5)},
        {(3, "to_q"): low_rank(4, 4)},
        {(0, "to_nowhere"): low_rank(4, 4)},
    ],
)
def test_deltas_that_do_not_fit_are_refused(layout, deltas):
    with pytest.raises(ConceptError):
        check_fits(deltas, layout, "it")
        pack(deltas, layout)


def broken_low_rank(layout, change):
    tensors, notes = pack(deltas_for(layout, low_rank, ("to_q",)), layout)
    change(tensors, notes["to_q"])
    return tensors, notes


@pytest.mark.parametrize(
    "change",
    [
        lambda t, n: t.update({"to_q.up": t["to_q.up"][:-1]}),
        lambda t, n: t.update({"to_q.up": t["to_q.up"][:, 0]}),
        lambda t, n: t.update({"to_q.up": t["to_q.up"][:, :1]}),
        lambda t, n: t.update({"to_q.down": t["to_q.down"][:, :-1]}),
        lambda t, n: n.update(sites=[0, 1, 7]),
        lambda t, n: n.update(sites=[0, 1, -1]),
        lambda t, n: n.update(sites=[2, 2, 2]),
        lambda t, n: n.update(scale=[1.0, math.nan, 1.0]),
    ],
)
def test_unpacking_low_rank_trusts_nothing(layout, change):
    with pytest.raises(ConceptError):
        unpack(*broken_low_rank(layout, change), layout)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, n: n.update(counts=[7, 7, 8]),
        lambda t, n: n.update(counts=[-1, 11, 11]),
        lambda t, n: t["to_q.indices"].fill_(1000),
        lambda t, n: t["to_q.indices"].fill_(-1),
        lambda t, n: t.update({"to_q.values": t["to_q.values"][:-1]}),
    ],
)
def test_unpacking_sparse_trusts_nothing(layout, change):
    tensors, notes = pack(deltas_for(layout, sparse, ("to_q",)), layout)
    change(tensors, notes["to_q"])
    with pytest.raises(ConceptError):
        unpack(tensors, notes, layout)
