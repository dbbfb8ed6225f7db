"""A share file is a bank with one concept and metadata for model browsers."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.cli.parser import main


@pytest.fixture
def bank_file(tiny_backbone, make_concept, tmp_path):
    bank = ConceptBank(tiny_backbone.layout)
    for name in ("rex", "mimi"):
        bank = bank.add(make_concept(tiny_backbone.layout, name))
    save_bank(bank, tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


def test_one_concept_with_its_licence_is_a_bank(bank_file, tmp_path, capsys):
    out = tmp_path / "rex.safetensors"
    assert main(["--json", "bank", "share", str(bank_file), "rex", "--output", str(out), "--licence",
                 "CC BY 4.0", "--author", "Ann"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(out)
    shared = open_bank(out)
    assert shared.names == ["rex"] and shared["rex"].digest() == open_bank(bank_file)["rex"].digest()
    with safe_open(str(out), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.license"] == "CC BY 4.0" and metadata["modelspec.author"] == "Ann"
    assert metadata["modelspec.trigger_phrase"] == "rex" and "made on" in metadata["modelspec.usage_hint"]


@pytest.mark.parametrize(("given", "sentence"), [
    (["max"], "the bank holds no concept 'max'; it holds rex, mimi"),
    (["rex", "--licence", "x" * 201], "the licence has 201 characters or several lines; allowed: one line"),
    (["rex", "--author", "a\nb"], "the author has 3 characters or several lines; allowed: one line"),
])
def test_what_cannot_be_shared_is_one_sentence(bank_file, tmp_path, capsys, given, sentence):
    out = tmp_path / "out.safetensors"
    assert main(["bank", "share", str(bank_file), *given, "--output", str(out)]) == 1
    assert sentence in capsys.readouterr().err and not out.exists()


def test_a_file_that_exists_stays(bank_file, capsys):
    before = bank_file.read_bytes()
    assert main(["bank", "share", str(bank_file), "rex", "--output", str(bank_file)]) == 1
    assert "exists already; choose another path" in capsys.readouterr().err
    assert bank_file.read_bytes() == before
