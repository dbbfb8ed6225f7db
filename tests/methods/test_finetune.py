"""Sequential finetuning: what is recorded per task adds up to the one adapter that was trained on and on."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.attention.adapters import adapter_key
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.routing import always_on_deltas
from continual_concepts.core.methods import Task, make
from continual_concepts.core.model.deltas import LowRankDelta


@pytest.fixture(scope="module")
def bank(slim_backbone, teach):
    bank = ConceptBank(slim_backbone.layout)
    for name in ("rex", "mimi", "bear"):
        bank = teach(slim_backbone, bank, name, "finetune", {"scale": 0.5}, steps=2).bank
    return bank


def test_recorded_deltas_add_up_to_the_continued_adapter(bank):
    state, total = bank.shared["finetune"], always_on_deltas(bank)
    for key, delta in total.items():
        name = adapter_key(*key)
        expected = 0.5 * state[f"{name}.up"] @ state[f"{name}.down"]
        assert torch.allclose(delta.dense(), expected, atol=1e-7 + 1e-6 * expected.abs().max())
        assert expected.any()


def test_ranks_are_exact(bank):
    assert [concept.deltas[0, "to_q"].up.shape[1] for concept in bank] == [4, 8, 8]


def test_a_new_task_starts_where_the_last_one_ended(slim_backbone, bank):
    method = make("finetune", {"scale": 0.5, "stored": "float32"})
    method.begin(Task("new", "dog", slim_backbone, bank))
    outcome = method.finish()
    assert all(d.dense().abs().max() < 1e-6 for d in outcome.deltas.values())
    site, x = slim_backbone.layout.sites[2], torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    y = slim_backbone.project(site, "to_q", x)
    assert torch.allclose(method.processor().project(site, "to_q", x, y), y, atol=1e-5)


def test_training_sees_the_sum_once(slim_backbone, bank):
    """Folded old sum + difference to the start = base + current adapter."""
    method, key = make("finetune", {"scale": 0.5}), (2, "to_q")
    method.begin(Task("new", "dog", slim_backbone, bank))
    with torch.no_grad():
        method.adapters.up[adapter_key(*key)].add_(0.1)
    site, x = slim_backbone.layout.sites[2], torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    base = slim_backbone.project(site, "to_q", x)
    with slim_backbone.folded(always_on_deltas(bank)):
        y = method.processor().project(site, "to_q", x, slim_backbone.project(site, "to_q", x))
    assert torch.allclose(y, base + method.adapters.delta(key).apply(x), atol=1e-5)


def test_another_rank_starts_anew_and_the_old_tasks_stay(slim_backbone, bank, teach):
    grown = teach(slim_backbone, bank, "new", "finetune", {"rank": 2}, steps=1).bank
    assert grown["new"].deltas[0, "to_q"].up.shape[1] == 2
    before, after = always_on_deltas(bank), always_on_deltas(grown)
    own = grown["new"].deltas[0, "to_q"]
    assert isinstance(own, LowRankDelta)
    assert torch.allclose(after[0, "to_q"].dense(), before[0, "to_q"].dense() + own.dense(), atol=1e-6)
