"""Custom Diffusion: full differences of keys and values, exact or cut records, and the constrained merge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from continual_concepts.core.attention.adapters import AdapterProcessor, FullAdapters
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import always_on_deltas, learning_deltas
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, Task, make
from continual_concepts.core.methods.custom_diffusion import CAPTIONS, regularisation_metric
from continual_concepts.core.methods.fusion import text_rows
from continual_concepts.core.neurons.scores import encode_plain, key_value_weights, text_positions, weight_of

RATES = {"lr": 1e-3, "token_lr": 1e-2}


def grown(backbone, teach, method, settings=None, names=("rex", "mimi"), before=None):
    bank = before or ConceptBank(backbone.layout)
    for name in names:
        bank = teach(backbone, bank, name, method, RATES | (settings or {}),
                     noun={"mimi": "cat"}.get(name, "dog")).bank
    return bank


@pytest.fixture(scope="module")
def bank(slim_backbone, teach):
    return grown(slim_backbone, teach, "custom_diffusion")


@pytest.fixture(scope="module")
def merged(slim_backbone, teach):
    return grown(slim_backbone, teach, "custom_diffusion_merge")


def begun(backbone, settings=None, method="custom_diffusion"):
    chosen = make(method, {"stored": "float32"} | (settings or {}))
    chosen.begin(Task("new", "dog", backbone, ConceptBank(backbone.layout)))
    return chosen


def randomise(adapters):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key in adapters.keys:
            adapters.at(key).copy_(0.05 * torch.randn(adapters.at(key).shape, generator=g))


def test_the_program_is_a_changed_weight(slim_backbone):
    """Outputs and gradients are those of a linear layer with W + D."""
    adapters, g = FullAdapters(slim_backbone.layout, key_value_weights(slim_backbone.layout),
                               "cpu"), torch.Generator().manual_seed(1)
    randomise(adapters)
    key, site = (1, "to_v"), slim_backbone.layout.sites[1]
    x, out = torch.randn(2, 3, 32, generator=g,
                         requires_grad=True), torch.randn(2, 3, site.width, generator=g)
    weight = (weight_of(slim_backbone, key) + adapters.at(key).detach()).requires_grad_()
    expected = F.linear(x, weight)
    found = AdapterProcessor(adapters).project(site, "to_v", x, slim_backbone.project(site, "to_v", x))
    assert torch.allclose(found, expected, atol=1e-5)
    for one, other in zip(torch.autograd.grad((found * out).sum(), (x, adapters.at(key))),
                          torch.autograd.grad((expected * out).sum(), (x, weight)), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert AdapterProcessor(adapters).project(site, "to_q", x, out) is out


def test_all_keys_and_values_train_and_nothing_else(bank, slim_backbone):
    for concept in bank:
        assert set(concept.deltas) == set(key_value_weights(slim_backbone.layout))
        assert all(delta.dense().any() for delta in concept.deltas.values())
    groups = begun(slim_backbone).parameter_groups()
    expected = sum(2 * 32 * site.width for site in slim_backbone.layout.sites)
    assert sum(p.numel() for p in groups[1]["params"]) == expected


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_a_record_is_the_difference_exactly(slim_backbone, stored):
    method = begun(slim_backbone, {"stored": stored})
    randomise(method.adapters)
    for key, delta in method.finish().deltas.items():
        exact = method.adapters.at(key).detach()
        assert torch.equal(delta.dense(), exact.half().float() if stored == "float16" else exact)


def test_a_cut_record_keeps_its_share_of_the_singular_values(slim_backbone):
    method = begun(slim_backbone, {"kept": 0.6})
    randomise(method.adapters)
    deltas = method.finish().deltas
    ranks = {key[1]: delta.up.shape[1] for key, delta in deltas.items()}
    needed = {"to_k": 0, "to_v": 0}
    for key, delta in deltas.items():
        u, s, v = torch.linalg.svd(method.adapters.at(key).detach())
        needed[key[1]] = max(needed[key[1]], 1 + int((s.cumsum(0) / s.sum() < 0.6).sum()))
        rank = ranks[key[1]]
        assert torch.allclose(delta.dense(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5)
    assert ranks == needed and all(rank < 32 for rank in ranks.values())


def test_a_later_task_learns_on_top_of_the_sum(bank, slim_backbone, teach, monkeypatch):
    builds_on_sum = METHODS["custom_diffusion"].method.builds_on_sum
    found, expected = learning_deltas(bank, "custom_diffusion", builds_on_sum), always_on_deltas(bank)
    assert all(torch.equal(found[key].dense(), expected[key].dense()) for key in expected)
    assert torch.allclose(found[0, "to_k"].dense(),
                          sum(concept.deltas[0, "to_k"].dense() for concept in bank), atol=1e-7)
    assert learning_deltas(bank, "custom_diffusion_merge",
                           METHODS["custom_diffusion_merge"].method.builds_on_sum).keys() == expected.keys()


def test_the_noun_is_frozen_and_the_first_word_is_not(slim_backbone, teach):
    encoder = slim_backbone.text[0]
    noun = encoder.vectors(encoder.ids("dog"))[-1]
    for settings, moved in (({}, False), ({"train_noun": True}, True)):
        vectors = grown(slim_backbone, teach, "custom_diffusion", settings,
                        ("rex",))["rex"].tokens.vectors["clip_l"]
        start = begun(slim_backbone).token_group().vectors["clip_l"]
        assert torch.equal(vectors[0, 1], noun) is not moved and not torch.equal(vectors[0, 0], start[0, 0])


def test_the_merge_learns_every_task_alone(merged, slim_backbone, teach):
    assert learning_deltas(merged, "custom_diffusion_merge",
                           METHODS["custom_diffusion_merge"].method.builds_on_sum) == {}
    alone = grown(slim_backbone, teach, "custom_diffusion_merge", names=("mimi",))["mimi"]
    assert torch.equal(alone.tokens.vectors["clip_l"], merged["mimi"].tokens.vectors["clip_l"])
    # the same training, not merged
    single = grown(slim_backbone, teach, "custom_diffusion", names=("mimi",))["mimi"]
    assert torch.equal(alone.tokens.vectors["clip_l"], single.tokens.vectors["clip_l"])


@torch.no_grad()
def test_merged_weights_treat_target_words_as_each_concept_s_own(merged, slim_backbone, teach):
    """W C^T = V for both concepts, against the full differences that the same training leaves."""
    total = always_on_deltas(merged)
    for name in ("rex", "mimi"):
        own = grown(slim_backbone, teach, "custom_diffusion", names=(name,))[name]
        rows = text_rows(slim_backbone, merged[name].tokens, name)
        for key, delta in own.deltas.items():
            wanted, found = delta.apply(rows[key[0]]), total[key].apply(rows[key[0]])
            assert torch.allclose(found, wanted, atol=5e-3 * float(wanted.abs().max())), (name, key)
            assert wanted.abs().max() > 1e-4


@torch.no_grad()
def test_merged_weights_are_the_printed_formula(merged, slim_backbone):
    """(V - W_0 C^T)(d C^T)^-1 d, d = C (C_reg^T C_reg)^-1, in plain dense algebra over the state."""
    hidden = encode_plain(slim_backbone, CAPTIONS).hidden[:, 0].double()
    features = torch.cat([row[1:2 + len(p)]
                          for row, p in zip(hidden, text_positions(slim_backbone, CAPTIONS), strict=True)])
    gram = features.T @ features
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(32)
    state, total = merged.shared["custom_diffusion_merge"], always_on_deltas(merged)
    owners = sorted({name.split(".")[0] for name in state})
    assert len(owners) == 2
    keys = key_value_weights(slim_backbone.layout)
    at_in, at_out = 0, 0
    for index, projection in keys:
        a, b = slim_backbone.layout.sites[index].shape(projection)
        c = torch.cat([state[f"{owner}.text.inputs"][:, at_in:at_in + b] for owner in owners]).double()
        v = torch.cat([state[f"{owner}.text.targets"][:, at_out:at_out + a] for owner in owners]).double()
        d = torch.linalg.solve(gram, c.T).T
        inner = d @ c.T
        inner += 1e-8 * inner.diagonal().mean() * torch.eye(len(inner))
        expected = v.T @ torch.linalg.inv(inner) @ d
        found = total[index, projection].dense().double()
        assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
        at_in, at_out = at_in + b, at_out + a


def test_captions_decide_what_the_merge_spares(slim_backbone):
    """What the captions say changes less when they are the ones that regularise."""
    said = ("a dog on a beach", "a cat in the snow")

    def moved(captions):
        method = begun(slim_backbone, {"ridge": 1e-6}, "custom_diffusion_merge")
        method.captions = captions
        randomise(method.adapters)
        deltas = method.finish().deltas
        hidden = encode_prompts(slim_backbone, method.task.bank.vocabulary.parse_all(said), {}).hidden[:, 0]
        rows = torch.cat([row[[*p, len(p) + 1]]
                          for row, p in zip(hidden, text_positions(slim_backbone, said), strict=True)])
        return sum(float(delta.apply(rows).square().sum()) for delta in deltas.values())

    assert moved(said) < 0.5 * moved(("old wooden house by the river", "x y z"))


def test_the_metric_does_not_depend_on_batches(slim_backbone):
    one, other = (regularisation_metric(slim_backbone, CAPTIONS[:7], 1e-2, batch) for batch in (2, 7))
    assert torch.allclose(one, other, rtol=1e-4) and len(CAPTIONS) == 200 == len(set(CAPTIONS))


@pytest.mark.parametrize(("method", "settings"), [
    ("custom_diffusion", {"kept": 0.0}), ("custom_diffusion", {"kept": 1.1}),
    ("custom_diffusion_merge", {"ridge": 0.0}), ("custom_diffusion_merge", {"first_std": -1.0}),
])
def test_settings_out_of_range_are_named(method, settings):
    with pytest.raises(ConceptError, match=f"'{next(iter(settings))}'"):
        make(method, settings)


@pytest.mark.parametrize("method", ["custom_diffusion", "custom_diffusion_merge"])
def test_it_learns_on_two_text_encoders(tiny_sdxl, teach, method):
    concept = teach(tiny_sdxl, ConceptBank(tiny_sdxl.layout), "rex", method, RATES, steps=1).concept
    assert len(concept.deltas) == 2 * len(tiny_sdxl.layout)
    assert all(delta.dense().any() for delta in concept.deltas.values())
