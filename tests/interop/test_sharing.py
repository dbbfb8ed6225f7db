"""A share file is a bank with one concept and metadata for model browsers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.bank.terms import LONGEST, Terms, joined
from continual_concepts.core.cli.parser import main
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.interop.importing import read_sources

STATED = ["--licence", "CC BY 4.0", "--author", "Ann"]


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
    (["rex", "--licence", "x" * 201], "the licence has 201 characters; allowed: one line"),
    (["rex", "--author", "a\nb"], r"the author is 'a\nb', with a sign that cannot be printed; allowed"),
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


def metadata_of(file) -> dict:
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata()


@pytest.fixture
def merged_file(bank_file, tmp_path, tiny_backbone, make_concept, capsys):
    """A bank of another person with <ada>, into which the shared <rex> was merged, saved and renamed."""
    shared, own, merged = (tmp_path / f"{name}.safetensors" for name in ("shared", "own", "merged"))
    save_bank(ConceptBank(tiny_backbone.layout).add(make_concept(tiny_backbone.layout, "ada")), own)
    assert main(["bank", "share", str(bank_file), "rex", "--output", str(shared), *STATED]) == 0
    assert main(["bank", "merge", str(own), str(shared), "--output", str(merged)]) == 0
    assert main(["bank", "rename", str(merged), "rex", "max"]) == 0
    capsys.readouterr()
    return merged


def test_licence_and_author_stay_with_the_concept(merged_file, tmp_path, capsys):
    infos = open_bank(merged_file).infos
    assert infos["max"].terms == Terms("CC BY 4.0", "Ann") and not infos["ada"].terms
    assert main(["bank", "list", str(merged_file)]) == 0
    ada, rex, *_ = capsys.readouterr().out.splitlines()
    assert "licence" not in ada and rex.endswith(", licence CC BY 4.0, by Ann")
    assert main(["--json", "bank", "show", str(merged_file), "max"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["licence"] == "CC BY 4.0" and shown["author"] == "Ann"
    assert shown["made_on"] == open_bank(merged_file).layout.describe()

    again = tmp_path / "again.safetensors"
    assert main(["bank", "share", str(merged_file), "max", "--output", str(again)]) == 0
    assert "licence: CC BY 4.0" in capsys.readouterr().out
    assert open_bank(again).infos["max"].terms == Terms("CC BY 4.0", "Ann")
    assert metadata_of(again)["modelspec.author"] == "Ann"


def test_another_licence_is_not_written_without_a_word(merged_file, tmp_path, capsys):
    out = tmp_path / "other.safetensors"
    assert main(["bank", "share", str(merged_file), "max", "--output", str(out), "--licence", "CC0"]) == 0
    assert "the bank states something else: licence CC BY 4.0, by Ann" in capsys.readouterr().out
    assert open_bank(out).infos["max"].terms == Terms("CC0", "Ann")


def test_exports_repeat_licence_and_author(merged_file, tmp_path, capsys):
    assert main(["bank", "export", str(merged_file), "max", "--output", str(tmp_path / "one")]) == 0
    assert "<max>: licence CC BY 4.0, by Ann" in capsys.readouterr().out
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    assert len(files) == 2
    assert {metadata_of(file)["modelspec.license"] for file in files} == {"CC BY 4.0"}
    assert main(["bank", "export", str(merged_file), "--prompt", "<max> and <ada>", "--output",
                 str(tmp_path / "two")]) == 0
    lora = metadata_of(tmp_path / "two" / "prompt_max_ada_lora.safetensors")
    assert lora["modelspec.license"] == "max: CC BY 4.0" and lora["modelspec.author"] == "max: Ann"


def test_a_share_file_of_an_earlier_version_states_it_in_its_metadata(bank_file, tmp_path):
    """0.2.0 did not store licence and author with the concept."""
    old = tmp_path / "old.safetensors"
    alone = open_bank(bank_file).remove("mimi")
    save_bank(alone, old, further={"modelspec.license": "CC\nBY", "modelspec.author": "A" * 300})
    terms = open_bank(old).infos["rex"].terms
    assert terms.licence == "CC BY" and len(terms.author) == LONGEST and terms.author.endswith("...")
    assert open_bank(old)["rex"].info.terms == terms
    save_bank(open_bank(bank_file), old, further={"modelspec.license": "CC0"})
    assert not any(info.terms for info in open_bank(old).infos.values())      # of which concept is unknown


def test_a_file_without_them_is_written_as_before(bank_file):
    header = json.loads(metadata_of(bank_file)["continual_concepts"])
    assert {"licence", "author", "terms"}.isdisjoint(header["concepts"][0]["info"])


def test_an_imported_lora_keeps_what_its_file_states(tmp_path):
    files = {}
    for name, licence in (("lora", "MIT"), ("words", "CC0")):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file({"emb_params": torch.zeros(1, 4)}, files[name], {"modelspec.license": licence})
    assert read_sources(files["lora"], None).terms == Terms("MIT")
    assert read_sources(files["lora"], files["words"]).terms == Terms("LoRA: MIT; embedding: CC0")


@pytest.mark.parametrize("value", [3, ["a"], "a\nb", "x" * 201])
def test_a_damaged_line_is_refused(bank_file, tmp_path, value):
    header = json.loads(metadata_of(bank_file)["continual_concepts"])
    header["concepts"][0]["info"]["licence"] = value
    damaged = tmp_path / "damaged.safetensors"
    with safe_open(str(bank_file), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}      # noqa: SIM118 - no mapping
    save_file(tensors, damaged, {"continual_concepts": json.dumps(header)})
    with pytest.raises(ConceptError, match="the licence (has|is) .*; allowed: one line of up to 200"):
        open_bank(damaged)


def test_terms_of_several_files():
    assert joined({"a": Terms("MIT"), "b": Terms("MIT", "Bo")}) == Terms("MIT", "b: Bo")
    assert not joined({}) and str(Terms("MIT", "Bo")) == "licence MIT, by Bo"
