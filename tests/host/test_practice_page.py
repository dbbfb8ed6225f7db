"""What people see in ComfyUI's page: the sentence of an error, and names that are refused before a run."""

from __future__ import annotations

import pytest
from PIL import Image

from continual_concepts.core.bank.tokens import check_class_noun
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.files import check_file_name

WRONG_NOUNS = ("<rex>", "(dog:1.2)", "embedding:foo", "[dog]", "{dog|cat}", "dog\\", "＜rex＞",
               "（dog：1.2）", "dog " * 40)
GOOD_NOUNS = ("", "dog", "teddy bear", "  teddy   bear ", "T-shirt", "painter's style", "собака", "犬",
              "a, b")
DEVICES = ("CON", "nul", "Com1", "LPT9", "aux.safetensors")


def sentence(call) -> str:
    with pytest.raises(ConceptError) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text and len(text) < 400
    return text


def test_g9_an_error_is_its_sentence(pack):
    """The page shows ComfyUI's name of the class and the message."""
    from execution import full_type_name

    shown = f"{full_type_name(ConceptError)}: there is no bank"
    assert shown == "Continual Concepts: there is no bank"


def test_g9_sibling_the_class_stays_usable(pack):
    assert ConceptError.__name__ == "ConceptError" and issubclass(ConceptError, ValueError)
    with pytest.raises(ConceptError, match="no bank"):
        raise ConceptError("there is no bank")


@pytest.mark.parametrize("noun", WRONG_NOUNS)
def test_g12_class_nouns_with_the_signs_of_prompts_are_refused(studio, noun, own_folder):
    text = sentence(lambda: check_class_noun(noun))
    assert text.startswith("class noun '") and "such as dog" in text
    learner = studio.pack.ConceptLearner
    # the page stops before the run, with the sentence that the run would end in
    assert learner.validate_inputs(name=["rex"], class_noun=[noun]) == text
    assert sentence(lambda: studio.learn(noun=noun)) == text
    importer = studio.pack.ConceptImport
    assert sentence(lambda: importer.execute(studio.model, studio.clip, "(none)", "(none)", "rex", noun,
                                             "object", "")) == text


@pytest.mark.parametrize("noun", GOOD_NOUNS)
def test_g12_sibling_ordinary_class_nouns_are_allowed(noun):
    assert check_class_noun(noun) == " ".join(noun.split())


def test_g12_sibling_names_from_other_nodes_wait_for_the_run(pack):
    waiting = (None,)      # what ComfyUI gives for an input that is linked
    assert pack.ConceptLearner.validate_inputs(name=waiting, class_noun=waiting) is True
    assert pack.ConceptBankSave.validate_inputs(bank_name=None) is True
    assert "concept name '../x'" in pack.ConceptLearner.validate_inputs(name=["../x"], class_noun=["dog"])


@pytest.mark.parametrize("name", DEVICES)
def test_g12_bank_names_that_windows_reserves_are_refused(studio, own_folder, name):
    """By one check in the node and on the command line."""
    stem = name.removesuffix(".safetensors")
    expected = sentence(lambda: check_file_name(stem, "bank name"))
    assert studio.pack.ConceptBankSave.validate_inputs(bank_name=name) == expected
    assert sentence(lambda: studio.pack.ConceptBankSave.execute(studio.bank, name, False)) == expected
    assert not list(own_folder.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["bank.", "bank ", "x.safetensors."])
def test_g12_sibling_a_dot_or_a_space_at_the_end(name):
    assert "Windows drops" in sentence(lambda: check_file_name(name))


def test_g12_sibling_exports_of_reserved_names_get_another_name(studio, own_folder):
    bank = studio.bank.rename("rex", "CON")
    studio.pack.ConceptExport.execute(bank, "CON", "embedding", 1.0)
    assert [file.name for file in own_folder.rglob("*.safetensors")] == ["CON_concept.safetensors"]


@pytest.fixture
def inputs(pack, tmp_path):
    """An input folder of this test: photos and masks of rex, photos called masks, and painted masks."""
    import folder_paths

    before = folder_paths.get_input_directory()
    for folder in ("rex", "rex/masks", "masks", "pets/mimi", "pets/mimi/masks", "clipspace", "venice/masks"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.png")
    (tmp_path / "rex" / "empty").mkdir()
    folder_paths.set_input_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_input_directory(before)


def test_g12_folders_of_masks_are_not_offered_as_photos(pack, inputs):
    schema = pack.ConceptPhotosLoad.define_schema()
    assert schema.inputs[0].options == ["masks", "pets/mimi", "rex", "venice/masks"]
    text = sentence(lambda: pack.ConceptPhotosLoad.execute("rex/masks"))
    assert text == "the folder 'rex/masks' holds the masks of the photos in 'rex'; choose 'rex'"


def test_g12_sibling_the_folder_of_painted_masks_is_not_offered(pack, inputs):
    assert "folder is 'clipspace'; allowed: a folder with photos in" in sentence(
        lambda: pack.ConceptPhotosLoad.execute("clipspace"))
