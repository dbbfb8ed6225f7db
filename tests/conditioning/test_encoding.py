"""Prompts to contexts: learned words, layer copies, long prompts, several text encoders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.tokens import TokenGroup
from continual_concepts.core.conditioning.encoding import TextMemory, encode_prompts, encode_words
from continual_concepts.core.conditioning.placeholder_nouns import placeholder_noun_ids
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.context import Context


@pytest.fixture(scope="module")
def bank(tiny_backbone, make_concept):
    layout = tiny_backbone.layout
    bank = ConceptBank(layout).add(make_concept(layout, "rex", 1, size=0.1))
    bank = bank.add(make_concept(layout, "mimi", 2, words=3, size=0.1))
    return bank.add(make_concept(layout, "flat", 3, words=1, layerwise=False, size=0.1))


def encode(backbone, bank, *prompts, tokens=None, chunks=1):
    return encode_prompts(backbone, bank.vocabulary.parse_all(prompts),
                          tokens or {c.name: c.tokens for c in bank}, chunks)


def plain(encoder, text):
    """The model's own output, without our code."""
    ids = encoder.tokenizer(text, padding="max_length", max_length=encoder.length, truncation=True,
                            return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder.model(ids, output_hidden_states=True)


@pytest.mark.parametrize("text", ["", "a photo of a dog", "red dog, blue cat."])
def test_text_alone_is_encoded_as_the_model_does(tiny_backbone, bank, text):
    context = encode(tiny_backbone, bank, text)
    assert context.hidden.shape == (1, 1, 16, 32) and context.pooled is None and context.words == ({},)
    assert torch.allclose(context.hidden[0, 0], plain(tiny_backbone.text[0], text).last_hidden_state[0],
                          atol=1e-6)


def test_two_encoders_lie_side_by_side(tiny_sdxl, make_concept):
    bank = ConceptBank(tiny_sdxl.layout).add(make_concept(tiny_sdxl.layout, size=0.1))
    first, second = (plain(encoder, "a red dog") for encoder in tiny_sdxl.text)
    context = encode(tiny_sdxl, bank, "a red dog")
    expected = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    assert torch.allclose(context.hidden[:, 0], expected, atol=1e-6)
    assert torch.allclose(context.pooled, second.text_embeds, atol=1e-6)
    layered = encode(tiny_sdxl, bank, "a <rex>")
    assert layered.hidden.shape == (1, 7, 16, 56) and layered.pooled.shape == (1, 24)


def single_layer(tokens: TokenGroup, copy: int) -> TokenGroup:
    return TokenGroup(tokens.words,
                      {name: vectors[copy:copy + 1] for name, vectors in tokens.vectors.items()})


def test_a_layer_copy_equals_an_encoding_with_that_copy_alone(tiny_backbone, bank):
    context = encode(tiny_backbone, bank, "a <rex> runs")
    assert context.hidden.shape == (1, 7, 16, 32)
    assert not torch.allclose(context.hidden[0, 0], context.hidden[0, 1])
    for copy in range(7):
        alone = encode(tiny_backbone, bank, "a <rex> runs",
                       tokens={"rex": single_layer(bank["rex"].tokens, copy)})
        assert torch.allclose(context.hidden[0, copy], alone.hidden[0, 0], atol=1e-5)


def test_a_site_reads_its_own_copy(tiny_backbone, bank):
    context, flat = encode(tiny_backbone, bank, "<rex>"), encode(tiny_backbone, bank, "<flat>")
    for site in tiny_backbone.layout.sites:
        assert torch.equal(context.at(site), context.hidden[:, site.index])
        assert torch.equal(flat.at(site), flat.hidden[:, 0])


def test_learned_vectors_that_equal_the_vocabulary_change_nothing(tiny_backbone, bank):
    encoder = tiny_backbone.text[0]
    ids = encoder.ids("red dog")
    assert len(ids) == 2
    group = TokenGroup(bank["rex"].tokens.words, {"clip_l": encoder.vectors(ids).unsqueeze(0)})
    learned = encode(tiny_backbone, bank, "a <rex> on <rex-2>", tokens={"rex": group})
    assert torch.allclose(learned.hidden, encode(tiny_backbone, bank, "a red dog on dog").hidden, atol=1e-6)
    assert learned.words == ({"rex": (2, 3, 5)},)


def test_prompts_in_a_batch_do_not_touch_each_other(tiny_backbone, bank):
    prompts = ["<mimi> and <rex>", "a dog", "<flat>", "", "<rex-2> <rex> <mimi-3>"]
    together = encode(tiny_backbone, bank, *prompts)
    assert len(together) == 5
    for i, prompt in enumerate(prompts):
        alone = encode(tiny_backbone, bank, prompt)
        assert torch.allclose(together.hidden[i], alone.hidden[0].expand(7, -1, -1), atol=1e-5)
        assert together.words[i] == alone.words[0]
    assert together.words[0] == {"mimi": (1, 2, 3), "rex": (5, 6)}
    assert torch.equal(together[1:3].hidden,
                       together.hidden[1:3]) and together[1:3].words == together.words[1:3]


@pytest.mark.parametrize(("words", "chunks"), [(14, 1), (15, 2), (30, 3)])
def test_long_prompts_take_whole_chunks(tiny_backbone, bank, words, chunks):
    prompt = " ".join(["dog"] * (words - 2)) + " <rex>"
    context = encode(tiny_backbone, bank, prompt)
    assert context.hidden.shape[2] == 16 * chunks
    first = encode(tiny_backbone, bank,
                   " ".join(["dog"] * min(14, words - 2)) + (" <rex>" if words == 14 else ""))
    assert torch.allclose(context.hidden[0, :, :16], first.hidden[0].expand(7, -1, -1), atol=1e-5)
    places = context.words[0]["rex"]
    assert len(places) == 2 and all(0 < place % 16 < 15 for place in places)


def test_a_concept_is_not_divided_between_chunks(tiny_backbone, bank):
    context = encode(tiny_backbone, bank, "dog " * 13 + "<rex> cat")
    assert context.words[0]["rex"] == (17, 18)
    second = encode(tiny_backbone, bank, "<rex> cat")
    assert torch.allclose(context.hidden[0, :, 16:], second.hidden[0], atol=1e-5)


@pytest.mark.parametrize("shortest", ["a dog", "<rex> and <flat>"])
def test_a_prompt_is_encoded_as_without_longer_ones_beside_it(tiny_backbone, bank, shortest):
    """Repeated, which changes no attention, and not filled up with empty chunks. Its words are repeated, too;
    gradients reach them."""
    texts = ["dog " * 15, shortest, "dog " * 15, "<mimi>"]
    vectors = {c.name: c.tokens.vectors["clip_l"].clone().requires_grad_() for c in bank}
    tokens = {c.name: replace(c.tokens, vectors={"clip_l": vectors[c.name]}) for c in bank}
    together, memory = encode(tiny_backbone, bank, *texts, tokens=tokens), TextMemory()
    remembered = encode_prompts(tiny_backbone, bank.vocabulary.parse_all(texts),
                                {c.name: c.tokens for c in bank}, memory=memory)
    for i, text in enumerate(texts):
        alone = Context.cat([encode(tiny_backbone, bank, texts[0]), encode(tiny_backbone, bank, text)])[1:]
        expected = alone.hidden.expand(-1, together.hidden.shape[1], -1, -1)
        for found in (together[i:i + 1], remembered[i:i + 1]):
            assert torch.allclose(found.hidden, expected, atol=1e-5) and found.words == alone.words
    together.hidden.square().sum().backward()
    assert vectors["mimi"].grad.any()


def test_more_chunks_on_request(tiny_backbone, bank):
    context = encode(tiny_backbone, bank, "a dog", chunks=2)
    assert torch.allclose(context.hidden[:, :, :16], encode(tiny_backbone, bank, "a dog").hidden, atol=1e-6)
    assert torch.allclose(context.hidden[:, :, 16:], encode(tiny_backbone, bank, "").hidden, atol=1e-6)


def test_gradients_reach_the_words_of_the_prompt_and_no_others(tiny_backbone, bank):
    groups = {c.name: TokenGroup(c.tokens.words,
                                 {"clip_l": c.tokens.vectors["clip_l"].clone().requires_grad_()})
              for c in bank}
    encode(tiny_backbone, bank, "<rex-2> with <flat>", tokens=groups).hidden.square().sum().backward()
    gradient = groups["rex"].vectors["clip_l"].grad
    assert gradient[:, 1].abs().sum(-1).min() > 0 and not gradient[:, 0].any()
    assert groups["flat"].vectors["clip_l"].grad.any() and groups["mimi"].vectors["clip_l"].grad is None
    assert all(p.grad is None for p in tiny_backbone.text[0].model.parameters())


def test_words_that_are_not_loaded_are_named(tiny_backbone, bank):
    with pytest.raises(ConceptError, match="'rex'"):
        encode(tiny_backbone, bank, "<rex>", tokens={"mimi": bank["mimi"].tokens})


def test_contexts_of_different_shapes_join(tiny_backbone, bank):
    short, long, layered = (encode(tiny_backbone, bank, p) for p in ("a dog", "dog " * 15, "<rex>"))
    joined = Context.cat([short, long, layered])
    assert joined.hidden.shape == (3, 7, 32, 32) and len(joined.words) == 3
    site = tiny_backbone.layout.sites[3]
    query = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))

    def attend(states):
        return torch.softmax(query @ states.transpose(1, 2), -1) @ states

    for i, part in enumerate((short, long, layered)):      # repeating a shorter context changes no attention
        assert torch.allclose(attend(joined[i:i + 1].at(site)), attend(part.at(site)), atol=1e-5)


@pytest.fixture(scope="module")
def apart(bank):
    """The concepts' tokens, two of them with placeholder nouns."""
    nouns = {"rex": "dog", "mimi": "duck toy"}
    return {c.name: replace(c.tokens, placeholder_noun=nouns.get(c.name, "")) for c in bank}


def test_all_else_is_encoded_with_nouns(tiny_backbone, bank, apart):
    encoder = tiny_backbone.text[0]
    ids = placeholder_noun_ids(encoder, "dog", 2)
    assert len(ids) == 2 and ids == encoder.ids("a dog")[-2:]
    named = encode(tiny_backbone, bank, "big <rex> here", tokens=apart)
    start, end = named.words[0]["rex"][0], named.words[0]["rex"][-1] + 1
    rows = [encoder.start, *encoder.ids("big"), *ids, *encoder.ids("here")]
    rows += [encoder.end] + [encoder.pad] * (encoder.length - len(rows) - 1)
    with torch.no_grad():
        plain = encoder.model(torch.tensor([rows])).last_hidden_state[0]
    others = [i for i in range(encoder.length) if not start <= i < end]
    assert torch.allclose(named.hidden[0, :, others], plain[others].expand_as(named.hidden[0, :, others]),
                          atol=1e-6)
    assert not torch.allclose(named.hidden[0, 0, start:end], plain[start:end], atol=1e-3)


def test_words_do_not_see_other_words(tiny_backbone, bank, apart):
    both = encode(tiny_backbone, bank, "<rex> and <mimi>", tokens=apart)
    other = apart | {"rex": replace(apart["rex"], vectors={"clip_l": apart["rex"].vectors["clip_l"] * 2})}
    changed = encode(tiny_backbone, bank, "<rex> and <mimi>", tokens=other)
    own = list(both.words[0]["rex"])
    rest = [i for i in range(both.hidden.shape[2]) if i not in own]
    assert torch.equal(both.hidden[:, :, rest], changed.hidden[:, :, rest])
    assert not torch.allclose(both.hidden[:, :, own], changed.hidden[:, :, own], atol=1e-3)


def test_words_apart_need_only_what_comes_before_them(tiny_backbone, bank, apart, monkeypatch):
    """The same states from whole rows and from their beginnings, in long prompts too."""
    for prompt in ("a big <rex> in <mimi>", "very " * 20 + "<rex>"):
        short = encode(tiny_backbone, bank, prompt, tokens=apart)
        monkeypatch.setattr(type(tiny_backbone.text[0]), "encodes_prefixes", False)
        whole = encode(tiny_backbone, bank, prompt, tokens=apart)
        monkeypatch.undo()
        assert torch.allclose(short.hidden, whole.hidden, atol=1e-6) and short.words == whole.words


def test_words_with_and_without_nouns_mix(tiny_backbone, bank, apart):
    mixed = encode(tiny_backbone, bank, "<flat> and <mimi>", "<flat>", "a dog", tokens=apart)
    alone = encode(tiny_backbone, bank, "<flat>", tokens=apart)
    assert torch.allclose(mixed.hidden[1], alone.hidden[0].expand_as(mixed.hidden[1]), atol=1e-6)
    assert set(mixed.words[0]) == {"flat", "mimi"} and mixed.words[2] == {}


def test_gradients_reach_words_that_are_encoded_apart(tiny_backbone, bank, apart):
    vector = apart["rex"].vectors["clip_l"].clone().requires_grad_()
    context = encode(tiny_backbone, bank, "a <rex> in <mimi>",
                     tokens=apart | {"rex": replace(apart["rex"], vectors={"clip_l": vector})})
    own = list(context.words[0]["rex"])
    context.hidden[:, :, own].square().sum().backward()
    assert vector.grad.abs().sum(-1).gt(0).all()


PROMPTS = ("a <rex> runs", "a red dog", "<flat> and <mimi>", "", "a red dog")


@pytest.mark.parametrize("which", ["together", "apart"])
def test_remembered_texts_change_nothing_and_are_encoded_once(tiny_backbone, bank, apart, which, monkeypatch):
    encoder, memory, calls = tiny_backbone.text[0], TextMemory(), []
    plainly = type(encoder).encode
    tokens = {c.name: c.tokens for c in bank} if which == "together" else apart
    expected = encode(tiny_backbone, bank, *PROMPTS, tokens=tokens)
    monkeypatch.setattr(type(encoder), "encode", lambda self, ids, slots,
                        own: calls.append(slots.any()) or plainly(self, ids, slots, own))
    for look in range(2):
        calls.clear()
        found = encode_prompts(tiny_backbone, bank.vocabulary.parse_all(PROMPTS), tokens, memory=memory)
        assert torch.allclose(found.hidden, expected.hidden, atol=1e-6) and found.words == expected.words
        # apart: "a dog runs" too
        assert calls.count(False) == (0 if look else {"together": 2, "apart": 3}[which])


def test_equal_texts_with_trained_words_are_encoded_once(tiny_backbone, bank, monkeypatch):
    """And their words get the gradient of each of them."""
    texts, kind = ("a <mimi>", "<rex> runs", "a <mimi>", "a <mimi>"), type(tiny_backbone.text[0])
    plainly, sizes, gradients = kind.encode, [], []
    monkeypatch.setattr(kind, "encode", lambda self, ids, slots, own: sizes.append(len(ids)) or plainly(
        self, ids, slots, own))
    for memory in (None, TextMemory()):
        vectors = {c.name: c.tokens.vectors["clip_l"].clone().requires_grad_() for c in bank}
        tokens = {c.name: replace(c.tokens, vectors={"clip_l": vectors[c.name]}) for c in bank}
        found = encode_prompts(tiny_backbone, bank.vocabulary.parse_all(texts), tokens, memory=memory)
        found.hidden.square().sum().backward()
        gradients.append(vectors["mimi"].grad)
    assert sizes[1] == sizes[0] // 2
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


def test_remembered_pooled_outputs(tiny_sdxl, make_concept):
    bank, memory = ConceptBank(tiny_sdxl.layout).add(make_concept(tiny_sdxl.layout, size=0.1)), TextMemory()
    expected = encode(tiny_sdxl, bank, "a <rex>", "a red dog")
    for _ in range(2):
        prompts = bank.vocabulary.parse_all(["a <rex>", "a red dog"])
        found = encode_prompts(tiny_sdxl, prompts, bank.token_groups(bank.names), memory=memory)
        assert torch.allclose(found.hidden, expected.hidden,
                              atol=1e-6) and torch.allclose(found.pooled, expected.pooled, atol=1e-6)


def test_a_full_memory_goes_on_without_keeping(tiny_backbone, bank, monkeypatch):
    monkeypatch.setattr(TextMemory, "LIMIT", 1)
    memory = TextMemory()
    for prompt in ("a red dog", "a blue cat", "a red dog"):
        found = encode_prompts(tiny_backbone, bank.vocabulary.parse_all([prompt]), {}, memory=memory)
        assert torch.allclose(found.hidden, encode(tiny_backbone, bank, prompt).hidden, atol=1e-6)
    assert len(memory._encoded) == 1


def test_words_alone_are_those_of_prompts_of_their_own(tiny_backbone, tiny_sdxl, bank, make_concept):
    wide = ConceptBank(tiny_sdxl.layout).add(make_concept(tiny_sdxl.layout, "rex", 1, size=0.1))
    for backbone, known in ((tiny_backbone, bank), (tiny_sdxl, wide)):
        found = encode_words(backbone, known.token_groups(known.names))
        for name, states in zip(known.names, found, strict=True):
            context = encode(backbone, known, f"<{name}>")
            assert torch.allclose(states, context.hidden[0][:, list(context.words[0][name])], atol=1e-6)


def test_weights_of_text_move_states_and_those_of_concepts_do_not(tiny_backbone, bank):
    plain, empty = (encode(tiny_backbone, bank, text) for text in ("a red <rex> dog", ""))
    groups = {concept.name: concept.tokens for concept in bank}
    prompt = bank.parse("a (red:1.5) (<rex>:0.3) dog")
    weighted = encode_prompts(tiny_backbone, [prompt], groups, by_strength={"rex"})
    expected = plain.hidden.clone()
    expected[:, :, 2] = (plain.hidden - empty.hidden)[:, :, 2] * 1.5 + empty.hidden[:, :, 2]
    assert torch.allclose(weighted.hidden, expected, atol=1e-6)
    assert weighted.strengths == ({"rex": (0.3, 0.3)},) and weighted.words == plain.words
    as_text = encode_prompts(tiny_backbone, [prompt], groups)
    assert not as_text.strengths and not torch.allclose(as_text.hidden[:, :, 3:5], expected[:, :, 3:5])


def test_strengths_follow_rows_and_repetition(tiny_backbone, bank):
    groups = {concept.name: concept.tokens for concept in bank}
    weighted = encode_prompts(tiny_backbone, [bank.parse("<rex:0.3>")], groups, by_strength={"rex"})
    plain = encode(tiny_backbone, bank, "<rex>")
    both = Context.cat([plain, weighted])
    assert both.strengths == ({}, {"rex": (0.3, 0.3)}) and not both[0:1].strengths[0]
    assert weighted.repeated(32).strengths == ({"rex": (0.3,) * 4},)
    assert not Context.cat([plain, plain]).strengths
    everywhere = plain.with_concept("mimi", 0.5)
    assert everywhere.words[0]["mimi"] == tuple(range(16)) and everywhere.words[0]["rex"] == (1, 2)
    assert set(everywhere.strengths[0]["mimi"]) == {0.5} and not plain.with_concept("mimi", 1.0).strengths
