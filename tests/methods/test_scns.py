"""SCNS's reading: lazy greedy is greedy, coverage and risk by brute force, a budget over all weights, and
exact resuming."""

from __future__ import annotations

import itertools

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.routing import always_on_deltas
from continual_concepts.core.data.batch import Batch
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import Task, make
from continual_concepts.core.model.deltas import SparseDelta
from continual_concepts.core.neurons.neurons import NeuronSelection
from continual_concepts.core.neurons.scores import GradientProcessor, key_value_weights, weight_of
from continual_concepts.core.neurons.sparse import SparseAdapters
from continual_concepts.core.neurons.submodular import lazy_greedy, similarities
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.objective import denoising_loss, draw, predict
from continual_concepts.core.training.trainer import Trainer

QUICK = {"selection_steps": 2}


@pytest.fixture(scope="module")
def banks(slim_backbone, teach):
    one = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "scns", QUICK, steps=4).bank
    return one, teach(slim_backbone, one, "mimi", "scns", QUICK | {"decay": 0.5}, steps=4, noun="cat").bank


def rows_of(concept):
    return {(key, int(row)) for key, d in concept.deltas.items()
            for row in (d.indices.long() // d.size[1]).unique()}


def value_of(blocks, risks, chosen):
    covered = sum(float(block[:, rows].max(1).values.sum())
                  for block, rows in zip(blocks, chosen, strict=True) if rows)
    return covered - sum(float(risk[rows].sum()) for risk, rows in zip(risks, chosen, strict=True))


def plain_greedy(blocks, risks, costs, budget):
    """Every gain anew in every round."""
    chosen = [[] for _ in blocks]
    while True:
        now, found = value_of(blocks, risks, chosen), []
        for n, block in enumerate(blocks):
            for j in set(range(len(block))) - set(chosen[n]):
                more = [[*rows, j] if m == n else rows for m, rows in enumerate(chosen)]
                found.append(((value_of(blocks, risks, more) - now) / costs[n], n, j))
        found = [one for one in found if one[0] > 1e-6 and costs[one[1]] <= budget]
        if not found:
            return chosen
        _, n, j = max(found)
        chosen[n].append(j)
        budget -= costs[n]


@pytest.mark.parametrize("risk", [0.0, 1.0])
def test_lazy_greedy_is_greedy(risk):
    g = torch.Generator().manual_seed(0)
    blocks = [similarities(torch.randn(a, 6, generator=g)) for a in (9, 5, 7)]
    risks = [risk * torch.rand(len(block), generator=g) for block in blocks]
    costs, budget = (2, 3, 5), 31
    found = lazy_greedy(blocks, risks, costs, budget)
    assert found == plain_greedy(blocks, risks, costs, budget) and all(found)
    assert sum(cost * len(rows) for cost, rows in zip(costs, found, strict=True)) <= budget


def test_greedy_is_within_its_guarantee():
    """1 - 1/e of the best set of its size, found by trying all of them."""
    g = torch.Generator().manual_seed(1)
    blocks, nothing = [similarities(torch.randn(8, 3, generator=g))], [torch.zeros(8)]
    best = max(value_of(blocks, nothing, [list(rows)]) for rows in itertools.combinations(range(8), 3))
    assert value_of(blocks, nothing, lazy_greedy(blocks, nothing, [1], 3)) >= (1 - 1 / torch.e) * best


def test_similarity_is_scaled_and_never_negative():
    signatures = torch.tensor([[3.0, 4.0], [0.3, 0.4], [-3.0, -4.0], [0.0, 0.0]])
    found = similarities(signatures)
    assert torch.allclose(found.diagonal(), torch.tensor([5.0, 0.5, 5.0, 0.0]), atol=1e-5)
    assert found[0, 1].item() == pytest.approx((5.0 * 0.5) ** 0.5) and found[0, 2] == 0 and not found[3].any()


def test_a_redundant_row_waits_and_a_risky_or_forbidden_one_stays_out():
    twins = [similarities(torch.tensor([[2.0, 0.0], [1.9, 0.0], [0.0, 1.0]]))]
    assert lazy_greedy(twins, [torch.zeros(3)], [1], 2) == [[0, 2]]
    assert lazy_greedy(twins, [torch.tensor([9.0, 0.0, 0.0])], [1], 3) == [[1, 2]]
    assert lazy_greedy(twins, [torch.zeros(3)], [1], 3, [torch.tensor([False, True, False])]) == [[1]]


def test_signatures_are_what_each_step_would_lose(slim_backbone, banks):
    """First order: sum of weight times gradient over a row, and its squared gradient; of own pictures."""
    data, config = prepare(slim_backbone, [Picture(torch.zeros(3, 32, 32))], "bear", "bear",
                           Framing(32)), TrainingConfig(resolution=32)
    run = Trainer(Task("bear", "bear", slim_backbone, banks[0]), make("scns", QUICK), data, config)
    batch = run.method.on_batch(data.draw(2, 1.0, torch.Generator().manual_seed(0)))
    drawn, context = draw(batch, 1000, config, torch.Generator().manual_seed(0)), run.context(batch)
    denoising_loss(slim_backbone, predict(slim_backbone, batch, context, drawn, run.method.processor()),
                   config).backward()
    run.method.end_step()
    plain = GradientProcessor(key_value_weights(slim_backbone.layout))
    denoising_loss(slim_backbone, predict(slim_backbone, batch, run.context(batch), drawn, plain),
                   config).backward()
    assert run.method.signatures.keys() == plain.sums.keys() and not run.method.gradients.sums
    for key, gradient in plain.sums.items():
        (signature,), size = run.method.signatures[key], gradient.abs().max()
        assert torch.allclose(signature, (weight_of(slim_backbone, key) * gradient).sum(1),
                              atol=1e-5 * float(size))
        assert torch.allclose(run.method.squares[key], gradient.square().sum(1), rtol=1e-3)


def test_a_concept_spends_the_budget_on_whole_rows_of_any_weights(banks, slim_backbone):
    sizes = {key: slim_backbone.layout.sites[key[0]].shape(key[1])
             for key in key_value_weights(slim_backbone.layout)}
    budget = sum(max(1, int(0.184 * a)) * b for a, b in sizes.values())
    # signatures of two steps are soon covered; then there is the risk
    for concept, least in zip(banks[1], (0.7, 0.2), strict=True):
        assert all(isinstance(d, SparseDelta) and d.values.any() for d in concept.deltas.values())
        spent = sum(d.indices.numel() for d in concept.deltas.values())
        assert spent == len(rows_of(concept)) * 32 and least * budget < spent <= budget
    counts = {key: d.indices.numel() / (d.size[0] * d.size[1]) for key, d in banks[1]["rex"].deltas.items()}
    assert len({round(share, 3) for share in counts.values()}) > 2      # not the same share everywhere
    assert rows_of(banks[1]["rex"]) != rows_of(banks[1]["mimi"])


def test_the_default_share_is_the_papers_of_stable_diffusion():
    weights = 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280)
    assert make("scns").config.share * weights / 859.5e6 == pytest.approx(0.0041, abs=0.00005)


def test_risk_keeps_off_what_old_concepts_need(slim_backbone, banks, teach):
    fisher = {key: banks[0].shared["scns"][f"fisher.{key[0]}-{key[1]}"]
              for key in key_value_weights(slim_backbone.layout)}
    touched = []
    for risk in (0.0, 3.0):
        concept = teach(slim_backbone, banks[0], "mimi", "scns", QUICK | {"risk": risk}, steps=4,
                        noun="cat").concept
        rows = rows_of(concept)
        touched.append(sum(float(fisher[key][row]) for key, row in rows) / max(1, len(rows)))
    assert touched[1] < 0.7 * touched[0]


def test_a_risk_beyond_every_gain_leaves_the_words(slim_backbone, banks, teach):
    concept = teach(slim_backbone, banks[0], "mimi", "scns", QUICK | {"risk": 1e9}, steps=4,
                    noun="cat").concept
    assert not concept.deltas and concept.tokens.vectors["clip_l"].any()


def test_fisher_runs_with_mean_one_and_fades(banks):
    first, second = ({name: f for name, f in bank.shared["scns"].items() if name.startswith("fisher.")}
                     for bank in banks)
    assert [float(torch.cat(list(f.values())).mean())
            for f in (first, second)] == pytest.approx([1.0, 1.5], rel=1e-4)
    assert all(bool((second[name] >= 0.5 * f - 1e-6).all()) for name, f in first.items())


def test_other_weights_stay_bit_identical(banks, slim_backbone):
    layout, rows = slim_backbone.layout, rows_of(banks[1]["rex"]) | rows_of(banks[1]["mimi"])
    before = {key: slim_backbone.weight(layout.sites[key[0]], key[1]).clone()
              for key in key_value_weights(layout)}
    with slim_backbone.folded(always_on_deltas(banks[1])):
        for key, weight in before.items():
            moved = (slim_backbone.weight(layout.sites[key[0]], key[1])
                     != weight).any(1).nonzero().flatten().tolist()
            assert moved and all((key, row) in rows for row in moved)


def test_general_neurons_and_a_given_selection_are_respected(slim_backbone, teach, monkeypatch):
    empty = ConceptBank(slim_backbone.layout)
    general = {key: torch.arange(0, 32, 2) for key in key_value_weights(slim_backbone.layout)}
    chosen = NeuronSelection.of_rows(general, slim_backbone.layout)
    monkeypatch.setattr("continual_concepts.core.methods.cns.general_neurons", lambda *_: chosen)
    concept = teach(slim_backbone, empty, "rex", "scns", QUICK | {"calibration": 2}, steps=3).concept
    assert concept.deltas and all(row % 2 or row >= 32 for _, row in rows_of(concept))
    method = make("scns")
    method.use_selection(chosen)
    method.begin(Task("rex", "dog", slim_backbone, empty))
    assert method.is_chosen and method.adapters.pool.numel() == len(chosen)
    assert set(method.adapters.sizes) == set(chosen.sizes)


def test_the_pool_is_divided_as_chosen_and_stays_so_in_a_checkpoint(slim_backbone):
    keys = key_value_weights(slim_backbone.layout)
    counts = dict.fromkeys(keys, 0) | {keys[0]: 10}      # the budget is their sum
    one, other = (SparseAdapters(slim_backbone.layout, counts, "cpu") for _ in range(2))
    sizes = {key: one.all_sizes[key] for key in keys[:3]}
    places = torch.arange(4), torch.tensor([], dtype=torch.long), torch.tensor([7, 9])
    one.place(NeuronSelection(dict(zip(keys[:3], places, strict=True)), sizes))
    with torch.no_grad():
        one.pool += torch.arange(10)
    other.load_state_dict(one.state_dict())
    for adapters in (one, other):
        assert list(adapters.sizes) == [keys[0], keys[2]]
        assert adapters.at(keys[2])[0].tolist() == [4.0, 5.0] and adapters.at(keys[2])[1].tolist() == [7, 9]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resuming_is_exact_before_at_and_after_the_choice(slim_backbone, teach, banks, tmp_path, stop_after):
    def stop(info):
        if info.step == stop_after:
            raise KeyboardInterrupt

    settings = QUICK | {"decay": 0.5}
    with pytest.raises(KeyboardInterrupt):
        teach(slim_backbone, banks[0], "mimi", "scns", settings, steps=4, noun="cat", callback=stop,
              checkpoint_file=tmp_path / "c")
    again = teach(slim_backbone, banks[0], "mimi", "scns", settings, steps=4, noun="cat",
                  checkpoint_file=tmp_path / "c").bank
    assert again["mimi"].deltas.keys() == banks[1]["mimi"].deltas.keys()
    for key, delta in banks[1]["mimi"].deltas.items():
        assert torch.equal(again["mimi"].deltas[key].indices, delta.indices)
        assert torch.equal(again["mimi"].deltas[key].values, delta.values)
    assert all(torch.equal(again.shared["scns"][name], tensor)
               for name, tensor in banks[1].shared["scns"].items())


def test_a_step_that_is_broken_off_leaves_nothing_behind(slim_backbone, banks):
    method = make("scns", QUICK)
    method.begin(Task("bear", "bear", slim_backbone, banks[0]))
    method.on_batch(Batch(torch.zeros(1, 4, 8, 8), ("a",), torch.ones(1, 1, 8, 8), torch.tensor([False]),
                          torch.ones(1)))
    method.gradients.note((0, "to_k"), torch.ones(1, 2, 32), torch.ones(1, 2, 32))
    assert method.gradients.sums and not method.extra_state()["sums"]


@pytest.mark.parametrize("settings", [{"unit": "weight"}, {"score": "activation"}, {"risk": -1.0},
                                      {"decay": 2.0}, {"share": 0.0}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ConceptError, match=f"'{next(iter(settings))}'"):
        make("scns", settings)
