"""Banks of earlier formats stay readable: a file of each lies beside this test and never changes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.concepts import Concept, ConceptInfo, Provenance
from continual_concepts.core.bank.format import VERSION, open_bank, save_bank
from continual_concepts.core.bank.tokens import TokenGroup
from continual_concepts.core.model.deltas import LowRankDelta, SparseDelta
from continual_concepts.core.model.sites import PROJECTIONS
from continual_concepts.core.model.slots import SLOTS, SlotDelta

FILES = Path(__file__).parent
THUMBNAIL = b"\xff\xd8\xff\xd9"      # the smallest thing that begins and ends like a JPEG


def counted(*shape, start=0, dtype=torch.float16):
    """Numbers that are equal in every version of torch."""
    count = torch.Size(shape).numel()
    return (((torch.arange(count) * 7 + start) % 61 - 30) / 16).reshape(shape).to(dtype)


def first_bank(layout) -> ConceptBank:
    """The bank in the file of format 1, with every kind of delta, word and shared state."""
    shapes = {(site.index, p): site.shape(p) for site in layout.sites for p in PROJECTIONS}
    low = {key: LowRankDelta(counted(a, 2, start=i), counted(2, b, start=i + 1), 0.5)
           for i, (key, (a, b)) in enumerate(shapes.items())}
    places = torch.tensor([0, 3, 5], dtype=torch.int32)
    sparse = {key: SparseDelta(shape, places, counted(3, start=i))
              for i, (key, shape) in enumerate(shapes.items()) if key[1] == "to_k"}
    origin = Provenance("abc", ("11", "22"), {"method": {"rank": 2}, "training": {"steps": 3}},
                        {"torch": "2"},
                        "2026-01-01T00:00:00+00:00", 3, 1.5)

    def words(name, count, copies, placeholder_noun=""):
        vectors = {encoder: counted(copies, count, width, start=count)
                   for encoder, width in layout.text_widths}
        return TokenGroup(tuple(f"{name}-{i}" for i in range(1, count + 1)), vectors, placeholder_noun)

    made = ConceptBank(layout)
    for name, method, kind, group, deltas, thumbnail in (
        ("rex", "bound", "object", words("rex", 2, layout.copies, "dog"), low, THUMBNAIL),
        ("chalk", "cns", "style", words("chalk", 1, 1), sparse, b""),
    ):
        info = ConceptInfo(name, "dog" if kind == "object" else "drawing", method, group.words, kind, origin)
        made = made.add(Concept(info, group, deltas, thumbnail),
                        {method: {"state": counted(4, dtype=torch.float32)}})
    return made


def bank_of(version: int, layout) -> ConceptBank:
    """The bank in the file of a format. Format 2 added slots."""
    bank = first_bank(layout)
    if version == 1:
        return bank
    slots = {(site.index, SLOTS): SlotDelta(counted(3, site.shape("to_k")[0], start=site.index),
                                            counted(3, site.shape("to_v")[0], start=5), site.heads, 0.5)
             for site in layout.sites}
    rex = bank["rex"]
    return bank.replace(replace(rex, deltas={**rex.deltas, **slots}))


def contents(bank: ConceptBank) -> dict:
    found = {("shared", method, name): t for method, state in bank.shared.items()
             for name, t in state.items()}
    for concept in bank:
        found[concept.name] = (concept.info.to_json(), concept.thumbnail, concept.tokens.placeholder_noun)
        found |= {(concept.name, key, i): t for key, delta in concept.deltas.items()
                  for i, t in enumerate(delta.tensors())}
        found |= {(concept.name, key, "scale"): getattr(delta, "scale", None)
                  for key, delta in concept.deltas.items()}
        found |= {(concept.name, encoder): t for encoder, t in concept.tokens.vectors.items()}
    return found


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) and v.dtype == two[k].dtype
                                            if torch.is_tensor(v) else v == two[k]
                                            for k, v in one.items())


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_a_bank_of_every_version_reads_as_it_was_written(layout, version):
    opened = open_bank(FILES / f"format-{version}.safetensors")
    assert same(contents(opened), contents(bank_of(version, layout)))


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_it_goes_on_in_todays_format(layout, version, tmp_path, make_concept):
    shutil.copy(FILES / f"format-{version}.safetensors", tmp_path / "old.safetensors")
    grown = open_bank(tmp_path / "old.safetensors").add(make_concept(layout, "new"))
    save_bank(grown, tmp_path / "old.safetensors")
    again = open_bank(tmp_path / "old.safetensors")
    assert again.names == ["rex", "chalk", "new"]
    assert same(contents(again.remove("new")), contents(bank_of(version, layout)))
