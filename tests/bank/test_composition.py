"""Compositions: what a concept's file says, what follows from the method where it does not, and shares."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.composition import (
    AVERAGE,
    PROMPT,
    SUM,
    WORDS,
    Composition,
    Kind,
    of_older_file,
)
from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.bank.format import METADATA_KEY, open_bank, save_bank
from continual_concepts.core.conditioning.routing import aggregate, always_on_deltas, token_lora_deltas
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS


@pytest.mark.parametrize("composition",
                         [PROMPT, WORDS, SUM, AVERAGE, Composition(Kind.SUM, None),
                          Composition(Kind.SUM, 0.6)])
def test_json_round_trip(composition):
    data = json.loads(json.dumps(composition.to_json()))
    assert Composition.from_json(data) == composition
    info = ConceptInfo("rex", "dog", "some_method", ("rex-1",), composition=composition)
    assert ConceptInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


@pytest.mark.parametrize("data", [
    None, "sum", 3, [], {}, {"kind": "loud"}, {"kind": ["sum"]}, {"kind": "x" * 10_000},
    *({"kind": "sum", "merged": merged}
      for merged in ("1", True, [1.0], float("nan"), float("inf"), 10**400)),
    {"kind": None, "merged": 1.0},
])
def test_anything_else_is_refused_with_one_sentence(data):
    allowed = "^composition is .*; allowed: kind route, bound, sum, average; merged"
    with pytest.raises(ConceptError, match=allowed) as caught:
        Composition.from_json(data)
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("merged", "expected"),
                         [(1.0, [1, 1, 1, 1]), (0.6, [1, 1, 0.6, 0.6]), (None, [1, 1, 1 / 2, 1 / 5])])
def test_share(merged, expected):
    assert [Composition(Kind.SUM, merged).share(count) for count in (0, 1, 2, 5)] == expected


def without_composition(path) -> None:
    """Checks that a file was written before compositions were."""
    with safe_open(str(path), framework="pt") as file:
        records = json.loads(file.metadata()[METADATA_KEY])["concepts"]
    assert records and not any("composition" in record["info"] for record in records)


@pytest.mark.parametrize("method", ["bound", "cidm", "cns", "lora_c", "textual_inversion"])
def test_files_of_before_compose_as_their_method_does(fixtures_dir, method):
    path = fixtures_dir / "before" / f"{method}.safetensors"
    without_composition(path)
    found = [info.composes for info in open_bank(path).infos.values()]
    assert found == [METHODS[method].method.composition] * 2


def test_every_method_is_known_of_older_files():
    """The methods of before; a new method writes its composition and needs no entry."""
    for name in METHODS.keys() - {"lora", "slots", "tara", "tova"}:
        entry = METHODS[name]
        assert of_older_file(name) == entry.method.composition


def test_an_older_file_stays_without_when_it_is_saved_again(fixtures_dir, tmp_path):
    save_bank(open_bank(fixtures_dir / "before" / "lora_c.safetensors"), tmp_path / "again.safetensors")
    without_composition(tmp_path / "again.safetensors")


@pytest.mark.parametrize("composition", [None, PROMPT, WORDS, SUM, AVERAGE, Composition(Kind.SUM, 0.5)])
def test_concepts_of_unknown_methods_compose_as_their_file_says(layout, make_concept, tmp_path, composition):
    bank = ConceptBank(layout)
    for i, name in enumerate(("rex", "mimi")):
        concept = make_concept(layout, name, i, method="of_the_future")
        bank = bank.add(replace(concept, info=replace(concept.info, composition=composition)))
    save_bank(bank, tmp_path / "bank.safetensors")
    bank = open_bank(tmp_path / "bank.safetensors")
    kind = Kind.PROMPT if composition is None else composition.kind
    assert {info.composes.kind for info in bank.infos.values()} == {kind}
    named = aggregate(None, bank, bank.parse("a <rex>")).deltas
    expected = {Kind.PROMPT: 1.0, Kind.WORDS: 0.0, Kind.SUM: getattr(composition, "merged", 0),
                Kind.AVERAGE: 1.0}[kind]
    rex = bank["rex"].deltas[2, "to_k"].dense()
    if kind in (Kind.PROMPT, Kind.WORDS):
        assert bool(named) == (kind is Kind.PROMPT)
        assert list(token_lora_deltas(bank)) == (bank.names if kind is Kind.WORDS else [])
        assert not always_on_deltas(bank, averages=True)
        if named:
            assert torch.allclose(named[2, "to_k"].dense(), rex)
    else:
        both = expected * (rex + bank["mimi"].deltas[2, "to_k"].dense())
        assert torch.allclose(named[2, "to_k"].dense(), both, atol=1e-6)
        assert torch.allclose(always_on_deltas(bank, averages=True)[2, "to_k"].dense(), both, atol=1e-6)


def test_a_file_with_a_damaged_composition_is_refused(layout, make_concept, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "bank.safetensors"
    save_bank(ConceptBank(layout).add(make_concept(layout)), path)
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    header["concepts"][0]["info"]["composition"] = {"kind": "everything"}
    save_file(load_file(path), path, {METADATA_KEY: json.dumps(header)})
    with pytest.raises(ConceptError, match="cannot be used: composition is .*allowed: kind route"):
        open_bank(path)


def test_earlier_runs_that_are_no_objects_are_damage():
    data = ConceptInfo("rex", "dog", "slots", ("rex-1",)).to_json()
    with pytest.raises(ConceptError, match="provenance 'refined' of concept 'rex'"):
        ConceptInfo.from_json({**data, "provenance": {"refined": ["yesterday"]}})
    with pytest.raises(ConceptError, match="provenance 'captions' of concept 'rex'"):
        ConceptInfo.from_json({**data, "provenance": {"captions": [5]}})


@pytest.mark.parametrize(("key", "value"), [
    ("captions", "abc"), ("captions", {"a": 1}), ("images", [[1]]), ("images", "abc"), ("settings", None),
    ("settings", {"method": 5}), ("versions", []), ("steps", "many"), ("seconds", None), ("base", 5),
    ("date", 5)])
def test_a_provenance_of_other_types_is_damage(key, value):
    data = ConceptInfo("rex", "dog", "slots", ("rex-1",)).to_json()
    with pytest.raises(ConceptError, match=f"provenance '{key}' of concept 'rex' is .*; allowed: a"):
        ConceptInfo.from_json({**data, "provenance": {key: value}})


def test_captions_follow_a_renamed_concept(layout, make_concept):
    concept = make_concept(layout)
    old, word = concept.name, concept.info.words[0]
    origin = replace(concept.info.provenance, captions=(f"<{word}> and <>", "<other>"))
    new = replace(concept, info=replace(concept.info, provenance=origin)).renamed("fido").info
    assert word.startswith(old) and new.provenance.captions == (f"<{new.words[0]}> and <>", "<other>")
