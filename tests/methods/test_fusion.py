"""Fusing weights over rows: records that add up, and state that follows its concept."""

from __future__ import annotations

from dataclasses import replace

import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.concepts import Concept, ConceptInfo
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.bank.prompts import Vocabulary
from continual_concepts.core.bank.tokens import TokenGroup
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.methods.fusion import (
    fused_concepts,
    fused_outcome,
    mark,
    pack_rows,
    text_rows,
    unpack_rows,
)
from continual_concepts.core.model.compression import compressed
from continual_concepts.core.model.deltas import LowRankDelta
from continual_concepts.core.model.least_squares import Rows, fit


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(a, b, rank, seed=0, scale=1.0):
    return LowRankDelta(random(a, rank, seed=seed), random(rank, b, seed=seed + 1), scale)


def test_compression_is_the_truncated_svd():
    delta = low_rank(7, 9, 5, scale=0.5)
    s = torch.linalg.svdvals(delta.dense())
    # between two and three singular values
    wanted = float((s[:2].sum() / s.sum() + s[:3].sum() / s.sum()) / 2)
    found = compressed({(0, "to_k"): delta}, torch.float32, wanted)[0, "to_k"]
    u, values, v = torch.linalg.svd(delta.dense())
    assert found.up.shape == (7, 3) and found.scale == 1.0
    assert torch.allclose(found.dense(), (u[:, :3] * values[:3]) @ v[:3], atol=1e-5)


def test_compression_keeps_all_that_the_type_can_hold_at_one_rank_per_projection():
    deltas = {(0, "to_k"): low_rank(7, 9, 2), (1, "to_k"): low_rank(4, 9, 6, seed=5),
              (0, "to_v"): low_rank(7, 9, 1)}
    found = compressed(deltas, torch.float32)
    assert {key: delta.up.shape[1]
            for key, delta in found.items()} == {(0, "to_k"): 4, (1, "to_k"): 4, (0, "to_v"): 1}
    assert all(torch.allclose(found[key].dense(), delta.dense(), atol=1e-5) for key, delta in deltas.items())
    noisy = LowRankDelta(torch.cat([random(7, 1), 1e-6 * random(7, 1, seed=2)], 1), random(2, 9, seed=3))
    assert compressed({(0, "to_k"): noisy}, torch.float16)[0, "to_k"].up.shape[1] == 1
    nothing = compressed({(0, "to_k"): LowRankDelta(torch.zeros(7, 3), random(3, 9))},
                         torch.float16)[0, "to_k"]
    assert nothing.up.shape == (7, 1) and not nothing.dense().any()


def test_packed_rows_come_back(layout):
    rows = {(site.index, p): Rows(random(3, site.shape(p)[1], seed=site.index),
                                  random(3, site.shape(p)[0], seed=9))
            for site in layout.sites for p in ("to_q", "to_out")}
    found = unpack_rows(pack_rows(rows, torch.float32), rows, layout)
    assert all(torch.equal(found[key].inputs, r.inputs) and torch.equal(found[key].targets, r.targets)
               for key, r in rows.items())


def test_text_rows_are_the_words_and_the_end(slim_backbone):
    layout = slim_backbone.layout
    words = TokenGroup(("rex-1", "rex-2"), {"clip_l": random(layout.copies, 2, 32)})
    found = text_rows(slim_backbone, words, "rex", ("{}", "dog {}"))
    vocabulary = Vocabulary([ConceptInfo("rex", "", "", words.words)])
    context = encode_prompts(slim_backbone, vocabulary.parse_all(["<rex>", "dog <rex>"]), {"rex": words})
    after = 1 + len(slim_backbone.text[0].ids("dog"))
    for site, rows in zip(layout.sites, found, strict=True):
        one, two = context.at(site)
        assert torch.allclose(rows, torch.cat([one[1:4], two[after:after + 3]]), atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-3)      # layers read their own copies


METHOD, KEYS = "mix_of_show", [(0, "to_k"), (1, "to_k"), (2, "to_k")]


def rows_of(layout, seed, count=2):
    return {key: Rows(random(count, layout.sites[key[0]].shape(key[1])[1], seed=seed),
                      random(count, layout.sites[key[0]].shape(key[1])[0], seed=seed + 50)) for key in KEYS}


def fuse(bank, name, seed, dtype=torch.float32):
    words = TokenGroup((f"{name}-1",),
                       {e: random(1, 1, w, seed=seed).to(dtype) for e, w in bank.layout.text_widths})
    outcome = fused_outcome(bank, METHOD, words, {"text": rows_of(bank.layout, seed)},
                            lambda rows: fit(rows, 1e-3), dtype)
    concept = Concept(ConceptInfo(name, "dog", METHOD, words.words), outcome.tokens, outcome.deltas)
    return bank.add(concept, {METHOD: outcome.shared})


def fused_by_hand(layout, seeds):
    return {key: fit(Rows.stacked([rows_of(layout, seed)[key] for seed in seeds]), 1e-3).dense()
            for key in KEYS}


def total(bank):
    return {key: sum(concept.deltas[key].dense() for concept in bank) for key in KEYS}


def agree(one, two, atol=2e-4):
    return all(torch.allclose(one[key], two[key], atol=atol * float(two[key].abs().max())) for key in KEYS)


def test_records_add_up_to_the_fused_weights(layout):
    bank = ConceptBank(layout)
    for count, name in enumerate(("rex", "mimi", "bear"), start=1):
        bank = fuse(bank, name, count)
        assert agree(total(bank), fused_by_hand(layout, range(1, count + 1)))
    assert not agree(total(bank), fused_by_hand(layout, (1, 2)))


def test_rounded_records_do_not_drift(layout):
    """What rounding an old record cost, the next one makes good."""
    bank = ConceptBank(layout)
    for seed in range(1, 7):
        bank = fuse(bank, f"c{seed}", seed, torch.float16)
    state = bank.shared[METHOD]
    every = [{"inputs": state[f"{owner}.text.inputs"], "targets": state[f"{owner}.text.targets"]}
             for owner in fused_concepts(bank, METHOD)]
    every = [unpack_rows(packed, KEYS, layout) for packed in every]
    expected = {key: fit(Rows.stacked([rows[key] for rows in every]), 1e-3).dense() for key in KEYS}
    assert agree(total(bank), expected, 3e-3)


def test_state_follows_renamed_saved_and_removed_concepts(layout, tmp_path):
    bank = fuse(fuse(ConceptBank(layout), "rex", 1), "mimi", 2).rename("rex", "max")
    save_bank(bank, tmp_path / "bank.safetensors")
    assert agree(total(fuse(open_bank(tmp_path / "bank.safetensors"), "bear", 3)),
                 fused_by_hand(layout, (1, 2, 3)))
    grown = fuse(bank.remove("max"), "bear", 3)
    assert agree(total(grown), fused_by_hand(layout, (2, 3))) and len(grown.shared[METHOD]) == 4


def test_concepts_without_state_stay_as_they_are(layout):
    """A bank merged into another loses its method's state: its records count on, unchanged, and the new
    fusion is of the others."""
    guest = fuse(ConceptBank(layout), "guest", 9)
    bank = fuse(ConceptBank(layout), "rex", 1).merge(guest)
    assert list(fused_concepts(bank, METHOD)) == [mark(bank["rex"].tokens, bank["rex"].deltas)]
    grown, own = fuse(bank, "mimi", 2), fused_by_hand(layout, (1, 2))
    assert agree(total(grown), {key: own[key] + guest["guest"].deltas[key].dense() for key in KEYS})


def test_a_mark_tells_concepts_apart_and_not_names(layout):
    rex = fuse(ConceptBank(layout), "rex", 1)["rex"]
    other = replace(rex.tokens, vectors={**rex.tokens.vectors, "clip_g": rex.tokens.vectors["clip_g"] + 1})
    marks = [mark(rex.tokens, rex.deltas), mark(rex.renamed("max").tokens, rex.deltas),
             mark(other, rex.deltas), mark(rex.tokens, {})]
    assert marks[0] == marks[1] and len(set(marks)) == 3
