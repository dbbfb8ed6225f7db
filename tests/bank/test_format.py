"""The bank's file: round trips, lazy reading, safe writing, and refusal of damaged files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from continual_concepts.core import files
from continual_concepts.core.bank import format as bankfile
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import METADATA_KEY, open_bank, save_bank, verify_bank
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.deltas import LowRankDelta, SparseDelta


@pytest.fixture
def bank(layout, make_concept):
    sparse = {(1, "to_k"): SparseDelta((6, 5), torch.tensor([1, 7], dtype=torch.int32),
                                       torch.tensor([0.5, -2.0]))}
    first = make_concept(layout, "rex", 1, thumbnail=b"\xff\xd8 a picture")
    first = replace(first, tokens=replace(first.tokens, placeholder_noun="duck toy"))
    third = replace(make_concept(layout, "ink", 3, words=1, layerwise=False, method="cns"), deltas=sparse)
    shared = {"cidm": {"0-to_q": torch.arange(6.0).view(2, 3)}, "cns": {"union": torch.tensor([True, False])}}
    second = make_concept(layout, "mimi", 2, dtype=torch.float16)
    return ConceptBank(layout).add(first, shared).add(second).add(third)


@pytest.fixture
def path(bank, tmp_path):
    save_bank(bank, tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


def same(one: ConceptBank, two: ConceptBank) -> bool:
    """Whether two banks hold the same."""
    def header(bank):
        return bank.layout, bank.infos, bank.names, bank.shared.keys()

    if header(one) != header(two):
        return False
    pairs = [(a[name], b[name]) for m in one.shared for a, b in [(one.shared[m], two.shared[m])]
             for name in a.keys() | b.keys()]
    for a, b in zip(one, two, strict=True):
        parts = [(c.thumbnail, c.deltas.keys(), c.tokens.words, c.tokens.placeholder_noun) for c in (a, b)]
        if parts[0] != parts[1]:
            return False
        pairs += [(a.tokens.vectors[name], b.tokens.vectors[name])
                  for name in a.tokens.vectors.keys() | b.tokens.vectors.keys()]
        pairs += [p for key in a.deltas
                  for p in zip(a.deltas[key].tensors(), b.deltas[key].tensors(), strict=True)]
        if any(a.deltas[key].scale != b.deltas[key].scale for key in a.deltas):
            return False
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_what_was_saved_comes_back(bank, path, layout):
    assert same(open_bank(path), bank)
    save_bank(ConceptBank(layout), path)
    assert same(open_bank(path), ConceptBank(layout))


def test_same_sees_differences(bank, layout, make_concept):
    """Or the test above could not fail."""
    assert not same(bank, bank.remove("rex"))
    other = make_concept(layout, "ink", 4, words=1, layerwise=False, method="cns")
    assert not same(bank, bank.remove("ink").add(other))


def test_opening_reads_no_tensors(path, monkeypatch):
    read = []
    original = bankfile._Tensors.read
    monkeypatch.setattr(bankfile._Tensors, "read", lambda self,
                        group: read.append(group) or original(self, group))
    bank = open_bank(path)
    assert bank.names == ["rex", "mimi", "ink"] and bank.vocabulary.parse("<mimi>") and not read
    assert bank["mimi"] is bank["mimi"]
    assert read == ["concept/1"]
    assert bank.shared["cidm"]["0-to_q"].shape == (2, 3)
    assert read == ["concept/1", "shared/cidm"]


def test_a_bank_can_be_saved_over_the_file_it_came_from(bank, path, layout, make_concept):
    opened = open_bank(path)
    save_bank(opened.remove("mimi"), path)
    assert same(open_bank(path), bank.remove("mimi"))
    # read by the saving
    assert torch.equal(opened["ink"].deltas[1, "to_k"].dense(), bank["ink"].deltas[1, "to_k"].dense())


def test_a_file_that_changed_after_opening_is_not_mixed_up(bank, path):
    opened = open_bank(path)
    save_bank(bank.remove("rex"), path)
    with pytest.raises(ConceptError, match="changed on disk"):
        _ = opened["mimi"]
    with pytest.raises(ConceptError, match="changed on disk"):
        _ = opened.shared["cidm"]["0-to_q"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(bank, path, monkeypatch, error):
    def failing(tensors, file, metadata):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise error

    monkeypatch.setattr(bankfile, "save_file", failing)
    with pytest.raises(ConceptError if isinstance(error, OSError) else KeyboardInterrupt):
        save_bank(bank.remove("rex"), path)
    assert same(open_bank(path), bank)
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def test_a_failing_rename_leaves_the_old_file(bank, path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(ConceptError, match="cannot write"):
        save_bank(bank.remove("rex"), path)
    monkeypatch.undo()
    assert same(open_bank(path), bank)


@pytest.mark.parametrize("bad", [torch.full((4, 2), float("nan")), torch.ones(4, 2, dtype=torch.float64)])
def test_what_could_not_be_read_is_not_written(bank, path, layout, make_concept, bad):
    concept = make_concept(layout, "bad", 5)
    deltas = {(0, "to_q"): LowRankDelta(bad, torch.ones(2, 4))}
    with pytest.raises(ConceptError, match="'bad'"):
        save_bank(bank.add(replace(concept, deltas=deltas)), path)
    assert same(open_bank(path), bank)


def rewrite(path, change):
    """Saves the file's own tensors and header after `change(tensors, header)`."""
    with safe_open(str(path), framework="pt") as file:
        tensors, header = {key: file.get_tensor(key)
                           for key in file.keys()}, json.loads(file.metadata()[METADATA_KEY])
    replaced = change(tensors, header)
    save_file(tensors, str(path),
              {METADATA_KEY: replaced if isinstance(replaced, str) else json.dumps(header)})


DAMAGES = {
    "newer version": lambda t, h: h.update(version=99),
    "header is no JSON": lambda t, h: "{",
    "header is a list": lambda t, h: "[]",
    "deep header": lambda t, h: "[" * 100_000,
    "no layout": lambda t, h: h.pop("layout"),
    "deep version": lambda t, h: h.update(version=json.loads("[" * 500 + "]" * 500)),
    "empty layout": lambda t, h: h["layout"].update(sites=[]),
    "concepts are a number": lambda t, h: h.update(concepts=3),
    "concept is a number": lambda t, h: h.update(concepts=[3]),
    "bad name": lambda t, h: h["concepts"][0]["info"].update(name="../../etc"),
    "double name": lambda t, h: h["concepts"][1].update(h["concepts"][0]),
    "no words": lambda t, h: h["concepts"][0]["info"].update(words=[]),
    "words are a number": lambda t, h: h["concepts"][0]["info"].update(words=3),
    "NaN": lambda t, h: t["concept/0/to_q.up"].fill_(float("nan")),
    "NaN in a token": lambda t, h: t["concept/0/token.clip_l"].fill_(float("nan")),
    "wrong type": lambda t, h: t.update({"concept/0/to_q.up": t["concept/0/to_q.up"].double()}),
    "whole numbers": lambda t,
    h: t.update({"concept/0/token.clip_l": torch.ones(3, 2, 3, dtype=torch.int64)}),
    "wide indices": lambda t, h: t.update({"concept/2/to_k.indices": torch.tensor([1, 7])}),
    "indices outside": lambda t, h: t["concept/2/to_k.indices"].fill_(10**6),
    "negative counts": lambda t, h: h["concepts"][2]["deltas"]["to_k"].update(counts=[-2]),
    "missing tensor": lambda t, h: t.pop("concept/0/to_q.up"),
    "missing token": lambda t, h: t.pop("concept/0/token.clip_l"),
    "wrong rank": lambda t, h: t.update({"concept/0/to_q.up": t["concept/0/to_q.up"][:, :1].contiguous()}),
    "wrong shape": lambda t, h: t.update({"concept/0/to_q.up": torch.ones(3, 2)}),
    "cover of numbers": lambda t, h: t.update({"concept/0/cover": torch.ones(3)}),
    "deltas are a list": lambda t, h: h["concepts"][0].update(deltas=[1]),
    "scale is a word": lambda t, h: h["concepts"][0]["deltas"]["to_q"].update(scale=["a", "b", "c"]),
    "NaN in shared state": lambda t, h: t["shared/cidm/0-to_q"].fill_(float("nan")),
    "nameless shared state": lambda t, h: t.update({"shared/x": torch.ones(1)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_with_one_sentence(path, damage):
    rewrite(path, DAMAGES[damage])
    with pytest.raises(ConceptError, match="bank.safetensors") as caught:
        verify_bank(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_damage_of_one_concept_leaves_the_others_usable(path):
    rewrite(path, DAMAGES["NaN"])
    bank = open_bank(path)
    assert bank["mimi"].deltas and bank.remove("rex").names == ["mimi", "ink"]
    with pytest.raises(ConceptError, match="'rex'"):
        _ = bank["rex"]


@pytest.mark.parametrize("content", [b"", b"{}", b"not a bank at all", b"\xff" * 64])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "bank.safetensors").write_bytes(content)
    with pytest.raises(ConceptError, match="bank.safetensors"):
        open_bank(tmp_path / "bank.safetensors")


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.9])
def test_truncated_files_are_refused(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content))])
    with pytest.raises(ConceptError, match="bank.safetensors"):
        open_bank(path)


def test_other_files_and_missing_ones_are_refused(tmp_path):
    save_file({"a": torch.ones(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ConceptError, match="not a concept bank"):
        open_bank(tmp_path / "other.safetensors")
    for name, reason in (("missing.safetensors", "no bank file"), (".", "is a folder")):
        with pytest.raises(ConceptError, match=reason):
            open_bank(tmp_path / name)


def test_verifying_lists_every_concept(path):
    assert [line.split(":")[0] for line in verify_bank(path)] == ["rex", "mimi", "ink"]


@pytest.mark.parametrize("value", [7, "x" * 1000, ["dog"]])
def test_a_foreign_stand_in_is_refused(path, value):
    with safe_open(str(path), framework="pt") as file:
        tensors, header = {key: file.get_tensor(key)
                           for key in file.keys()}, json.loads(file.metadata()[METADATA_KEY])
    header["concepts"][0]["stand_in"] = value
    save_file(tensors, str(path), {METADATA_KEY: json.dumps(header)})
    with pytest.raises(ConceptError, match="placeholder noun is"):
        open_bank(path)["rex"]


@pytest.mark.parametrize("value", [None, 5, ["dog"], {}])
@pytest.mark.parametrize("field", ["class_noun", "method"])
def test_what_is_no_text_is_refused_when_the_bank_is_opened(path, field, value):
    with safe_open(str(path), framework="pt") as file:
        tensors, header = {key: file.get_tensor(key)
                           for key in file.keys()}, json.loads(file.metadata()[METADATA_KEY])
    header["concepts"][0]["info"][field] = value
    save_file(tensors, str(path), {METADATA_KEY: json.dumps(header)})
    what = field.replace("_", " ")
    with pytest.raises(ConceptError, match=f"{what} of concept 'rex' is .*; allowed: a text"):
        open_bank(path)
