"""Share Concept: one concept in a file of its own, below ComfyUI's output folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
from safetensors import safe_open

from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.bank.terms import Terms
from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
FOLDER = "shared_concepts"


@pytest.fixture
def share(pack, bank, own_folder):
    """share(concept, licence, author, bank): runs the node and returns its notes."""
    def run(concept="rex", licence="", author="", given=bank) -> str:
        result = pack.ConceptShare.execute(given, concept, licence, author)
        assert result.ui["text"] == (result.args[0],)
        return result.args[0]

    return run


def files(folder) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_one_concept_is_written_and_nothing_is_replaced(share, bank, own_folder):
    text = share("<rex>", " CC BY 4.0 ", "Ann")
    assert text.startswith(f"rex.safetensors holds <rex>, made on {bank.layout.describe()}; others drop it")
    assert "licence: CC BY 4.0\nauthor: Ann" in text
    first = (own_folder / FOLDER / "rex.safetensors").read_bytes()
    assert share("rex", "CC0").startswith("rex_00002.safetensors holds <rex>")
    assert files(own_folder) == [f"{FOLDER}/rex.safetensors", f"{FOLDER}/rex_00002.safetensors"]
    assert (own_folder / FOLDER / "rex.safetensors").read_bytes() == first
    shared = open_bank(own_folder / FOLDER / "rex.safetensors")
    assert shared.names == ["rex"] and shared["rex"].digest() == bank["rex"].digest()
    assert shared.infos["rex"].terms == Terms("CC BY 4.0", "Ann") and not bank.infos["rex"].terms
    with safe_open(str(own_folder / FOLDER / "rex.safetensors"), framework="pt") as file:
        assert file.metadata()["modelspec.license"] == "CC BY 4.0"


def test_the_only_concept_needs_no_name_and_keeps_its_terms(share, bank, own_folder):
    info = replace(bank["mimi"].info, terms=Terms("MIT", "Bo"))
    alone = bank.remove("rex").remove("blueprint").replace(replace(bank["mimi"], info=info))
    assert "licence: MIT\nauthor: Bo" in share("", given=alone)
    assert open_bank(own_folder / FOLDER / "mimi.safetensors").infos["mimi"].terms == Terms("MIT", "Bo")


@pytest.mark.parametrize(("given", "sentence"), [
    ({"concept": ""}, "'concept' is empty; type the name .* the bank holds rex, mimi, blueprint"),
    ({"concept": "../rex"}, "the bank holds no concept '../rex'; it holds rex"),
    ({"licence": "a\nb"}, r"the licence is 'a\\nb', with a sign .* allowed: one line of up to 200"),
    ({"author": "x" * 201}, "the author has 201 characters"),
    ({"given": None}, "the bank is new and holds no concept to share"),
])
def test_what_cannot_be_shared_is_one_sentence(share, own_folder, given, sentence):
    with pytest.raises(ConceptError, match=sentence):
        share(**given)
    assert files(own_folder) == []


def test_names_that_no_file_can_have_get_another_file(share, bank, own_folder):
    longest = "\U00020000" * 64      # 256 bytes
    both = bank.rename("rex", "con").rename("mimi", longest)
    share("con", given=both)
    share(longest, given=both)
    assert sorted(open_bank(file).names[0] for file in (own_folder / FOLDER).iterdir()) == ["con", longest]
    assert f"{FOLDER}/con_concept.safetensors" in files(own_folder)


def test_faults_are_reported_before_the_graph_runs(pack, own_folder):
    node = pack.ConceptShare
    assert node.validate_inputs(None, None) is True and files(own_folder) == []
    assert "allowed: one line" in node.validate_inputs("a\nb", "")
    (own_folder / FOLDER).write_text("")
    assert "is not a folder" in node.validate_inputs("", "")
