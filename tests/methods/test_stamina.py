"""STAMINA: hard masks with a gradient, words from an MLP, and a record that is the masked product."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import Task, make
from continual_concepts.core.methods.stamina import hard_mask
from continual_concepts.core.model.deltas import SparseDelta

SETTINGS = {"rank": 2, "mask_rank": 2, "hidden": 8}


@pytest.fixture(scope="module")
def bank(slim_backbone, teach):
    return teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "stamina",
                 SETTINGS | {"mask_lr": 0.3}, steps=5).bank


def begun(backbone, bank, **settings):
    method = make("stamina", SETTINGS | {"stored": "float32"} | settings)
    method.begin(Task("bear", "bear", backbone, bank).worded(1))
    return method


def randomise(method, size=0.5):
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (*method.adapters.parameters(), *method.masks.parameters()):
            parameter.copy_(size * torch.randn(parameter.shape, generator=g))


def test_masks_are_zero_or_one_with_the_logits_probability():
    g = torch.Generator().manual_seed(0)
    logits = torch.tensor([-2.0, 0.0, 3.0]).expand(20000, 3)
    mask = hard_mask(logits, torch.rand(20000, 3, generator=g), 0.7)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(mask.mean(0), torch.sigmoid(logits[0]), atol=0.015)
    ends = hard_mask(logits[:2], torch.tensor([[0.0] * 3, [1.0] * 3]), 0.1)      # infinite logistic noise
    assert ends.tolist() == [[0.0] * 3, [1.0] * 3]


def test_the_gradient_goes_straight_through():
    logits, uniform = torch.tensor([-1.0, 0.3, 2.0], requires_grad=True), torch.tensor([0.2, 0.5, 0.9])
    noise = uniform.log() - (1 - uniform).log()
    hard_mask(logits, uniform, 0.5).sum().backward()
    other = logits.detach().clone().requires_grad_()
    torch.sigmoid((other + noise) / 0.5).sum().backward()
    assert torch.allclose(logits.grad, other.grad) and logits.grad.all()


def test_the_record_is_the_product_where_logits_are_above_zero(slim_backbone, bank):
    method = begun(slim_backbone, bank, scale=0.5)
    randomise(method)
    found, kept, entries = method.finish(), 0, 0
    for key, delta in found.deltas.items():
        name = f"{key[0]}-{key[1]}"
        logits = method.masks.left[name] @ method.masks.right[name] + method.masks.offset[name]
        product = 0.5 * method.adapters.up[name] @ method.adapters.down[name]
        assert isinstance(delta, SparseDelta) and key[1] in ("to_k", "to_v")
        assert torch.allclose(delta.dense(), torch.where(logits > 0, product, 0.0), atol=1e-7)
        kept, entries = kept + int((logits > 0).sum()), entries + logits.numel()
    norm = torch.stack([delta.values.square().sum() for delta in found.deltas.values()]).sum().sqrt()
    assert 0.2 < kept / entries < 0.8
    assert method.monitors() == pytest.approx({"norm": float(norm), "kept": kept / entries}, rel=1e-4)


def test_training_adds_the_masked_product(slim_backbone, bank):
    """Of this batch's noise: the same when asked again, another for the next batch, step and projection."""
    method, key = begun(slim_backbone, bank), (2, "to_k")
    randomise(method)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    y = method.processor().project(slim_backbone.layout.sites[2], "to_k", x, torch.zeros(1, 3, 32))
    first = method.product(key)
    assert torch.allclose(y, x @ first.T, atol=1e-5) and torch.equal(method.product(key), first)
    method.next_batch(None)
    second = method.product(key)
    method.after_step(1)
    assert not torch.equal(second, first) and not torch.equal(method.product(key), second)
    assert not torch.equal(method.product(key), first)
    zero = [(method.product(k) == 0)[:32] for k in ((2, "to_k"), (2, "to_v"))]
    assert not torch.equal(*zero)


def test_the_penalties_are_their_formulas(slim_backbone, bank):
    method = begun(slim_backbone, bank, forget=10.0, sparsity=3.0)
    randomise(method)
    past, terms = method.past, method.penalty(None)
    assert past.keys() == bank["rex"].deltas.keys()
    forget = sum(float((past[key] * method.product(key).detach()).square().sum()) for key in past)
    chance = torch.cat([torch.sigmoid(method.masks.logits(key)).flatten() for key in method.numbers])
    assert terms["forget"].item() == pytest.approx(10 * forget, rel=1e-4) and forget > 0
    assert terms["sparsity"].item() == pytest.approx(3 * float(chance.detach().mean()), rel=1e-4)


def test_the_sparsity_penalty_drops_entries(slim_backbone, teach):
    shares = []
    for sparsity in (0.0, 10.0):
        infos, settings = [], SETTINGS | {"sparsity": sparsity, "mask_lr": 0.5}
        teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "stamina", settings, steps=8,
              callback=infos.append)
        assert infos[0].terms.keys() == ({"sparsity"} if sparsity else set())
        shares.append(infos[-1].monitors["kept"])
    assert shares[1] < 0.5 < shares[0]


def test_words_start_random_and_come_from_the_mlp(slim_backbone, bank):
    method = begun(slim_backbone, bank)
    words = method.words
    start = words.group().vectors["clip_l"]
    assert torch.equal(start, words.starts.clip_l) and start.shape[1] == 1 and start.any()
    assert not any(parameter.shape == start.shape for parameter in words.parameters())
    start.sum().backward()
    with torch.no_grad():      # a step of Adam's size: every entry of the vectors moves by just that much
        for last in words.last.values():
            last += 0.01 * last.grad.sign()
    moved = words.group().vectors["clip_l"] - words.starts.clip_l
    assert torch.allclose(moved, torch.full_like(moved, 0.01), rtol=1e-3)


def test_a_task_of_several_batches_per_step_resumes(slim_backbone, bank, teach, tmp_path):
    def stop(info):
        if info.step == 2:
            raise KeyboardInterrupt

    more = {"steps": 4, "accumulation": 2, "noun": "cat"}
    whole = teach(slim_backbone, bank, "mimi", "stamina", SETTINGS, **more)
    with pytest.raises(KeyboardInterrupt):
        teach(slim_backbone, bank, "mimi", "stamina", SETTINGS, callback=stop, checkpoint_file=tmp_path / "c",
              **more)
    again = teach(slim_backbone, bank, "mimi", "stamina", SETTINGS, checkpoint_file=tmp_path / "c", **more)
    assert again.losses == whole.losses
    for key, delta in whole.concept.deltas.items():
        assert torch.equal(delta.indices, again.concept.deltas[key].indices)
        assert torch.equal(delta.values, again.concept.deltas[key].values)


@pytest.mark.parametrize("settings", [
    {"mask_rank": 0}, {"keep": 1.0}, {"temperature": 0.0}, {"sparsity": -1.0}, {"mask_lr": -1.0},
    {"hidden": 0},
])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ConceptError, match=f"'{next(iter(settings))}'"):
        make("stamina", settings)
