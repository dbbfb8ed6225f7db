"""Word-bound deltas against their definition, position by position, and what they must not change."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.benchmarks.cost.synthetic import Operations
from continual_concepts.core.attention.cached import CachedTokenLora
from continual_concepts.core.attention.token_lora import TokenLora, TokenLoraProcessor, token_lora_attention
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.hosts.diffusers import multi_head
from continual_concepts.core.interop.export import export_concept
from continual_concepts.core.model.context import Context
from continual_concepts.core.model.deltas import LowRankDelta, SparseDelta
from continual_concepts.core.model.processor import HostAttention, JointRows, SiteCall
from continual_concepts.core.model.sites import Site
from continual_concepts.core.model.slots import SLOTS, SlotDelta
from continual_concepts.core.regional.regions import Region
from continual_concepts.core.sampling.regions import sample_regions
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings

SITE = Site(0, "attn2", 0, 2, 8, 6)
QUICK = SampleSettings(steps=2, cfg=2.0, size=(32, 32))
SHAPES = {"to_q": (8, 8), "to_k": (8, 6), "to_v": (8, 6), "to_out": (8, 8)}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deltas(seed, rank=2, scale=0.7):
    return {(0, name): LowRankDelta(draw(a, rank, seed=seed + i), draw(rank, b, seed=seed + 10 + i), scale)
            for i, (name, (a, b)) in enumerate(SHAPES.items())}


def slots(seed, count=3, scale=0.8):
    return {(0, SLOTS): SlotDelta(draw(count, 8, seed=seed), draw(count, 8, seed=seed + 1), 2, scale)}


def context(*words, length=5):
    return Context(draw(len(words), 1, length, 6, seed=1), None, tuple(words))


def run(processor, found, weights, picture):
    """One site with frozen weights: what to_out gives."""
    processor.prepare(found)
    call = SiteCall(processor, SITE, picture, text := found.at(SITE), text)
    call.enter()
    inputs = ("to_q", call.hidden), ("to_k", text), ("to_v", text)
    query, key, value = (call.project(name, x @ weights[name].T) for name, x in inputs)
    attended = call.attend(query, key, value, HostAttention(lambda q, k, v: multi_head(q, k, v, 2)))
    return call.finish(attended @ weights["to_out"].T)


def by_definition(known, found, weights, picture):
    """Every position with its own four maps, head by head."""
    rows = []
    for b, words in enumerate(found.words):
        owner = {n: name for name, places in words.items() for n in places if name in known}
        text, out = found.hidden[b, 0], torch.zeros(picture.shape[1], 8)
        maps = [{p: weights[p] + (known[owner[n]][0, p].dense() if n in owner and (0, p) in known[owner[n]]
                                  else 0) for p in SHAPES} for n in range(len(text))]
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            logits = [(picture[b] @ m["to_q"].T)[:, part] @ (m["to_k"] @ text[n])[part]
                      for n, m in enumerate(maps)]
            share = (torch.stack(logits, 1) / 2).softmax(1)
            for n, m in enumerate(maps):
                out += share[:, n:n + 1] * (m["to_out"][:, part] @ (m["to_v"] @ text[n])[part])
            query = (picture[b] @ weights["to_q"].T)[:, part]
            for n, name in owner.items():
                if (0, SLOTS) in known[name]:
                    delta = known[name][0, SLOTS]
                    shares = (query @ delta.key[:, part].T / 2).softmax(1)
                    read = shares @ (delta.scale * delta.value[:, part])
                    out += share[:, n:n + 1] * read @ weights["to_out"][:, part].T
        rows.append(out)
    return torch.stack(rows)


@pytest.fixture
def weights():
    return {name: draw(*shape, seed=90 + i) for i, (name, shape) in enumerate(SHAPES.items())}


@pytest.mark.parametrize("words",
                         [({"rex": (1, 2)},), ({"rex": (1,), "mimi": (3, 4)}, {"mimi": (0,)}),
                          ({}, {"rex": (2,)})])
def test_every_position_has_its_own_maps(weights, words):
    known = {"rex": deltas(20), "mimi": deltas(50)}
    found, picture = context(*words), draw(len(words), 9, 8, seed=3)
    expected = by_definition(known, found, weights, picture)
    assert torch.allclose(run(TokenLoraProcessor(known), found, weights, picture), expected, atol=1e-4)


@pytest.mark.parametrize("words",
                         [({"rex": (1, 2)},), ({"rex": (1,), "mimi": (3, 4)}, {"mimi": (0,)}),
                          ({}, {"rex": (2,)})])
@pytest.mark.parametrize("parts", [(), tuple(SHAPES)])
def test_slots_share_the_attention_of_their_words(weights, words, parts):
    known = {name: {key: delta for key, delta in deltas(seed).items() if key[1] in parts} | slots(seed, count)
             for name, seed, count in (("rex", 20, 4), ("mimi", 50, 6))}
    found, picture = context(*words), draw(len(words), 9, 8, seed=3)
    expected = by_definition(known, found, weights, picture)
    assert torch.allclose(run(TokenLoraProcessor(known), found, weights, picture), expected, atol=1e-4)


def test_slots_take_no_attention_from_other_words(weights):
    """However strong the keys of one concept are, another concept reads what it reads without them."""
    found, picture = context({"rex": (1,), "mimi": (3, 4)}), draw(1, 9, 8, seed=3)
    mimi = slots(50)

    def added(strength):
        strong = {(0, SLOTS): SlotDelta(strength * draw(3, 8, seed=20), torch.zeros(3, 8), 2)}
        both, alone = ({"rex": strong} | more for more in ({"mimi": mimi}, {}))
        results = [run(TokenLoraProcessor(known), found, weights, picture) for known in (both, alone)]
        return results[0] - results[1]

    assert torch.allclose(added(1.0), added(100.0), atol=1e-5)


@pytest.mark.parametrize("words",
                         [({"rex": (1, 2)},), ({"rex": (1,), "mimi": (3, 4)}, {"mimi": (0,)}),
                          ({}, {"rex": (2,)})])
@pytest.mark.parametrize("parts", [tuple(SHAPES), ("to_k", "to_v"), ("to_q", "to_k"), ("to_v", "to_out"),
                                   (SLOTS,), (*SHAPES, SLOTS), ("to_out", SLOTS)])
def test_keys_and_values_are_cached(weights, words, parts):
    """Every pass gives what `TokenLoraProcessor` gives, and later ones read no text."""
    known = {name: {key: delta for key, delta in {**deltas(seed), **slots(seed, count)}.items()
                    if key[1] in parts}
             for name, seed, count in (("rex", 20, 4), ("mimi", 50, 6))}
    found = context(*words)
    cached = CachedTokenLora(TokenLora(known, found), len(words), "cpu")
    for i in range(3):
        picture = draw(len(words), 9, 8, seed=3 + i)
        expected = run(TokenLoraProcessor(known), found, weights, picture)
        read = found if i == 0 else context(*({},) * len(words), length=0)
        assert torch.allclose(run(cached, read, weights, picture), expected, atol=1e-5)


def test_a_cached_site_costs_hardly_more_than_a_plain_one(weights):
    known, picture = {"rex": deltas(20), "mimi": deltas(50)}, draw(1, 9, 8, seed=3)
    found = context({"rex": (1,), "mimi": (2,)})
    cached, nothing, counts = CachedTokenLora(TokenLora(known, found), 1, "cpu"), context({}, length=0), []
    run(cached, found, weights, picture)
    with torch.inference_mode():
        for processor, text in ((TokenLoraProcessor({}), found), (cached, nothing),
                                (TokenLoraProcessor(known), found)):
            with Operations() as counter:
                run(processor, text, weights, picture)
            counts.append(counter.count)
    plain, cached, uncached = counts
    assert plain <= cached < plain + (uncached - plain) / 10      # the layout once per sampling is what costs


@pytest.mark.parametrize("known", [deltas, slots])
def test_the_number_of_concepts_adds_no_operation(weights, known):
    counts, picture, nothing = [], draw(1, 9, 8, seed=3), context({}, length=0)
    for names in (("rex",), ("rex", "mimi", "fido")):
        found = context({name: (i + 1,) for i, name in enumerate(names)})
        concepts = TokenLora({name: known(20 + 10 * i) for i, name in enumerate(names)}, found)
        cached = CachedTokenLora(concepts, 1, "cpu")
        run(cached, found, weights, picture)
        with torch.inference_mode(), Operations() as counter:
            run(cached, nothing, weights, picture)
        counts.append(counter.count)
    assert counts[0] == counts[1]


def test_without_its_words_a_concept_does_nothing_bit_for_bit(weights):
    found, picture = context({}, {"mimi": (1,)}), draw(2, 9, 8, seed=3)
    plain = run(TokenLoraProcessor({}), found, weights, picture)
    assert torch.equal(run(TokenLoraProcessor({"rex": deltas(20)}), found, weights, picture), plain)
    assert not torch.allclose(run(TokenLoraProcessor({"mimi": deltas(20)}), found, weights, picture)[1],
                              plain[1], atol=1e-3)


def test_a_part_of_the_deltas_is_enough(weights):
    for name in SHAPES:
        known = {"rex": {key: delta for key, delta in deltas(20).items() if key[1] == name}}
        zero = {p: LowRankDelta(torch.zeros(a, 1), torch.zeros(1, b)) for p, (a, b) in SHAPES.items()}
        whole = {"rex": {(0, p): known["rex"].get((0, p), zero[p]) for p in SHAPES}}
        found, picture = context({"rex": (2, 3)}), draw(1, 9, 8, seed=3)
        expected = by_definition(whole, found, weights, picture)
        assert torch.allclose(run(TokenLoraProcessor(known), found, weights, picture), expected, atol=1e-4)


def test_sparse_deltas_on_the_picture_side_are_refused():
    sparse = SparseDelta((8, 8), torch.tensor([1], dtype=torch.int32), torch.tensor([1.0]))
    concepts = TokenLora({"rex": {(0, "to_q"): sparse}}, context({"rex": (1,)}))
    with pytest.raises(ConceptError, match="'rex' has a sparse delta"):
        concepts.adapters(SITE)


def test_no_binding_is_plain_attention():
    q, k, v = draw(2, 9, 8, seed=1), draw(2, 5, 8, seed=2), draw(2, 5, 8, seed=3)
    out, more = token_lora_attention(2, q, q, k, v, [])
    assert torch.allclose(out, multi_head(q, k, v, 2), atol=1e-6) and more is None


@pytest.fixture(scope="module")
def bank(tiny_backbone, teach):
    bank = teach(tiny_backbone, ConceptBank(tiny_backbone.layout), "rex", "slots").bank
    return teach(tiny_backbone, bank, "mimi", "slots", noun="cat").bank


def test_prompts_without_concepts_are_the_base(tiny_backbone, bank):
    base = sample(tiny_backbone, ConceptBank(bank.layout), ["a dog on a beach"], [1], QUICK)
    assert torch.equal(sample(tiny_backbone, bank, ["a dog on a beach"], [1], QUICK), base)


def test_a_concept_does_not_depend_on_the_others_in_the_bank(tiny_backbone, bank):
    both, alone = (sample(tiny_backbone, b, ["a <rex>"], [1], QUICK) for b in (bank, bank.remove("mimi")))
    assert torch.equal(both, alone)


def test_a_region_over_everything_is_its_prompt(tiny_backbone, bank):
    region = Region("a <rex> and <mimi>", box=(0.0, 0.0, 1.0, 1.0))
    inside = sample_regions(tiny_backbone, bank, "a meadow", [region], [1], QUICK)
    assert torch.allclose(inside, sample(tiny_backbone, bank, ["a <rex> and <mimi>"], [1], QUICK), atol=1e-4)


def test_regions_keep_their_own_concepts(tiny_backbone, bank):
    halves = [Region("a <rex>", box=(0.0, 0.0, 1.0, 0.5)), Region("a <mimi>", box=(0.0, 0.5, 1.0, 1.0))]
    first = sample_regions(tiny_backbone, bank, "a meadow", halves, [1], QUICK)
    assert torch.equal(first, sample_regions(tiny_backbone, bank, "a meadow", halves, [1], QUICK))
    dogs = [Region("a dog", box=half.box) for half in halves]
    others = sample_regions(tiny_backbone, bank, "a meadow", dogs, [1], QUICK)
    assert not torch.allclose(first, others, atol=1e-3)


def test_the_scene_may_name_bound_concepts_too(tiny_backbone, bank):
    region = Region("a <mimi>", box=(0.0, 0.5, 1.0, 1.0))
    named, plain = (sample_regions(tiny_backbone, bank, scene, [region], [1], QUICK)
                    for scene in ("a <rex>", "a dog"))
    assert not torch.allclose(named, plain, atol=1e-3)


def test_strength_zero_leaves_the_words_alone(tiny_backbone, bank):
    zero = SampleSettings(steps=2, cfg=2.0, size=(32, 32), strength=0.0)
    vocabulary, tokens = bank.vocabulary, {"rex": bank["rex"].tokens}
    assert encode_prompts(tiny_backbone, vocabulary.parse_all(["a <rex>"]), tokens).hidden.shape[0] == 1
    assert not torch.equal(sample(tiny_backbone, bank, ["a <rex>"], [1], zero),
                           sample(tiny_backbone, bank, ["a <rex>"], [1], QUICK))


def test_an_export_says_what_a_lora_cannot_hold(layout, make_concept, tmp_path):
    for method, is_said in (("bound", True), ("cidm", False)):
        bank = ConceptBank(layout).add(make_concept(layout, "rex", method=method, layerwise=False))
        notes = export_concept(bank, "rex", tmp_path, ("kohya",)).notes
        assert any("acts on every word of a prompt" in note for note in notes) == is_said


def test_in_a_joint_attention_the_mass_is_the_words_share_of_all_rows():
    """Of text and picture together, with positions in the logits and none in what chooses among slots."""
    query, turned, key, value, own_key, own_value = (draw(1, n, 8, seed=20 + i)
                                                     for i, n in enumerate((4, 4, 5, 5, 6, 6)))
    bias, mask = draw(1, 1, 4, 11, seed=30), torch.tensor([[0.0, 1.0, 0.5, 0.0, 0.0]])
    concepts = TokenLora.at({"rex": mask}, {"rex": slots(31)})
    ours, added = token_lora_attention(2, query, query, key, value, concepts.adapters(SITE),
                                       JointRows(turned, own_key, own_value, bias))
    assert added is None
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        keys, values = torch.cat([key, own_key], 1)[0, :, part], torch.cat([value, own_value], 1)[0, :, part]
        share = (turned[0, :, part] @ keys.T / 2 + bias[0, 0]).softmax(1)
        delta = concepts.deltas["rex"][0, SLOTS]
        read = (query[0, :, part] @ delta.key[:, part].T / 2).softmax(1) @ (0.8 * delta.value[:, part])
        expected = share @ values + (share[:, :5] * mask).sum(1, keepdim=True) * read
        assert torch.allclose(ours[0, :, part], expected, atol=1e-5)
