"""`bank list` and `bank show`: what is said of likeness and collisions, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import save_bank
from continual_concepts.core.cli.parser import main


@pytest.fixture
def file(tmp_path, layout, make_concept):
    """Two dogs that are summed, from the same photos, and a bound one."""
    bank = ConceptBank(layout)
    for i, (name, method, photos) in enumerate([("rex", "lora_m", ("a", "b")), ("fido", "lora_m", ("a", "b")),
                                                ("spot", "bound", ("c",))]):
        made = make_concept(layout, name, i, method=method)
        info = replace(made.info, provenance=replace(made.info.provenance, images=photos))
        bank = bank.add(replace(made, info=info))
    save_bank(bank, tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


def said(capsys, *arguments) -> str:
    assert main([str(one) for one in arguments]) == 0
    return capsys.readouterr().out


def test_list_warns_from_the_headers_alone(file, capsys):
    lines = said(capsys, "bank", "list", file).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["<rex>", "<fido>", "<spot>"]
    assert lines[3].startswith("warning: <rex> and <fido> collide: they were learned from the same photos")
    assert "share the class noun 'dog'" in lines[4] and len(lines) == 5
    told = json.loads(said(capsys, "--json", "bank", "list", file))
    assert [one["name"] for one in told["concepts"]] == ["rex", "fido", "spot"] and len(told["warnings"]) == 2
    assert told["collisions"][0]["kind"] == "photos"


def test_show_says_what_a_concept_is_most_like(file, capsys):
    told = json.loads(said(capsys, "--json", "bank", "show", file, "rex"))
    assert told["composes"] == "summed" and told["collides_with"] == ["fido"]
    assert "same photos" in told["warnings"][0]
    assert set(told["most_like"]) == {"deltas", "words"}
    assert told["most_like"]["deltas"]["name"] in ("fido", "spot")
    assert "most_like: {" in said(capsys, "bank", "show", file, "spot")
    assert json.loads(said(capsys, "--json", "bank", "show", file, "spot"))["warnings"] == []


def test_show_survives_another_damaged_concept(file, capsys):
    data = bytearray(file.read_bytes())
    data[-40:] = b"\xff" * 40      # NaN in any floating type
    file.write_bytes(bytes(data))
    shown = [main(["bank", "show", str(file), name]) for name in ("rex", "fido", "spot")]
    assert shown.count(1) == 1 and shown.count(0) == 2
    assert "cannot be read" in capsys.readouterr().err
