"""C-LoRA: the Hadamard penalty, one random word, keys and values alone, and the norm that tells a
collapse."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.routing import always_on_deltas
from continual_concepts.core.methods import Task, make
from continual_concepts.core.methods.clora import forgetting


@pytest.fixture(scope="module")
def bank(slim_backbone, teach):
    bank = ConceptBank(slim_backbone.layout)
    for name in ("rex", "mimi"):
        bank = teach(slim_backbone, bank, name, "clora", {"rank": 2, "scale": 0.5}, steps=3).bank
    return bank


def begun(backbone, bank, noun="bear", **settings):
    method = make("clora", {"rank": 2, "stored": "float32"} | settings)
    method.begin(Task("bear", noun, backbone, bank).worded(method.word_count))
    return method


def randomise(method):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.adapters.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))


def test_the_penalty_is_equation_3(slim_backbone, bank):
    """Entry by entry, from the deltas of the bank."""
    method = begun(slim_backbone, bank, forget=7.0)
    randomise(method)
    expected = 0.0
    for key in method.adapters.keys:
        past = sum(concept.deltas[key].dense() for concept in bank)
        new = method.adapters.up[f"{key[0]}-{key[1]}"] @ method.adapters.down[f"{key[0]}-{key[1]}"]
        expected += sum(float(p) ** 2 * float(n) ** 2
                        for p, n in zip(past.flatten(), new.detach().flatten(), strict=True))
    assert method.penalty(None)["forget"].item() == pytest.approx(7.0 * expected, rel=1e-4)


def test_the_past_is_what_the_weights_carry(slim_backbone, bank):
    past = begun(slim_backbone, bank).past
    for key, delta in always_on_deltas(bank).items():
        assert torch.allclose(past[key], delta.dense().abs(), atol=1e-7) and past[key].any()
    assert begun(slim_backbone, bank.remove("mimi")).past.keys() == past.keys()
    assert not begun(slim_backbone, bank, forget=0.0).past
    other = make("stamina")      # a C-LoRA too, but with its own concepts
    other.begin(Task("new", "dog", slim_backbone, bank))
    assert not other.past


def test_other_places_cost_nothing():
    """Zero where the past has no change, and gradient only where it has."""
    past = {(0, "to_k"): torch.tensor([[1.0, 0.0], [0.0, 2.0]])}
    apart, over = torch.tensor([[0.0, 3.0], [4.0, 0.0]],
                               requires_grad=True), torch.ones(2, 2, requires_grad=True)
    assert forgetting(past, lambda key: apart) == 0 and forgetting(past, lambda key: over) == 5
    forgetting(past, lambda key: over).backward()
    assert torch.equal(over.grad, torch.tensor([[2.0, 0.0], [0.0, 8.0]]))


def product_of(method):
    return lambda key: method.adapters.delta(key).dense()


def test_the_gradient_is_the_formulas(slim_backbone, bank):
    """Written out for the factors; autograd's is that of the formula."""
    method = begun(slim_backbone, bank, scale=0.5)
    randomise(method)
    parameters, product = list(method.adapters.parameters()), product_of(method)
    losses = method.forgotten(), forgetting(method.past, product)
    quick, plain = (torch.autograd.grad(loss, parameters) for loss in losses)
    assert method.forgotten().item() == pytest.approx(forgetting(method.past, product).item(), rel=1e-5)
    for one, other in zip(quick, plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-9) and other.any()


def test_half_precision_does_not_reach_the_penalty():
    """1e-5 times 1e-5, squared, is far below what 16 bits hold."""
    past = {(0, "to_k"): torch.full((4, 4), 1e-5)}
    product = torch.full((4, 4), 1e-5, dtype=torch.bfloat16)
    assert forgetting(past, lambda key: product).item() == pytest.approx(16e-20, rel=0.02)


def test_the_penalty_holds_the_new_product_small(slim_backbone, bank, teach):
    """The paper's way to keep what is old; also its flaw."""
    norms = [float(teach(slim_backbone, bank, "bear", "clora", {"rank": 2, "forget": forget, "token_lr": 0.0},
                         steps=8)
                   .bank.shared["clora"]["norm.bear"]) for forget in (0.0, 1e9)]
    assert norms[1] < 0.5 * norms[0]


def test_the_norm_is_watched_and_kept(slim_backbone, bank, teach):
    infos = []
    learned = teach(slim_backbone, bank, "bear", "clora", {"rank": 2, "scale": 0.5}, steps=3,
                    callback=infos.append)
    dense = [delta.dense().square().sum() for delta in learned.concept.deltas.values()]
    assert infos[-1].monitors["norm"] == pytest.approx(float(torch.stack(dense).sum().sqrt()), rel=1e-4)
    # lambda is large: the collapse shows
    assert infos[0].monitors["norm"] > 2 * infos[-1].monitors["norm"]
    state = learned.bank.shared["clora"]
    assert set(state) == {"norm.rex", "norm.mimi", "norm.bear"}
    assert float(state["norm.bear"]) == pytest.approx(infos[-1].monitors["norm"])


def test_one_random_word_and_keys_and_values_alone(slim_backbone, bank):
    """The class noun changes nothing; a person's own words are kept."""
    with_noun, without = (begun(slim_backbone, bank, noun).token_group() for noun in ("bear", ""))
    assert with_noun.words == ("bear-1",) and with_noun.vectors["clip_l"].shape[:2] == (1, 1)
    assert torch.equal(with_noun.vectors["clip_l"], without.vectors["clip_l"])
    assert {len(info.words) for info in bank.infos.values()} == {1}
    assert {projection for concept in bank for _, projection in concept.deltas} == {"to_k", "to_v"}
    assert Task("bear", "bear", slim_backbone, bank, words=("a", "b")).worded(1).word_names == ("a", "b")


def test_other_methods_have_no_figures_to_watch(slim_backbone, teach):
    infos = []
    teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "finetune", steps=1, callback=infos.append)
    assert infos[0].monitors == {}
    assert len(teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "finetune",
                     steps=1) .concept.info.words) == 2
