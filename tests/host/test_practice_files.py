"""C: in ComfyUI, folders are checked before a graph runs, and what cannot be saved is kept elsewhere."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from continual_concepts.core import files
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.errors import ConceptError


@pytest.fixture
def blocked(own_folder):
    """An output folder in which every folder of ours is a file."""
    for name in ("concept_banks", "loras"):
        (own_folder / name).write_text("")
    return own_folder


def test_c1_folders_are_checked_before_the_graph_runs(studio, blocked):
    pack = studio.pack
    for answer in (pack.ConceptBankSave.validate_inputs("pets"), pack.ConceptExport.validate_inputs([1.0]),
                   pack.ConceptLearner.validate_inputs(["rex"], ["dog"])):
        assert "is not a folder" in answer and answer.count("\n") == 0


def test_c1_nothing_is_left_behind_by_the_check(studio, own_folder):
    pack = studio.pack
    assert pack.ConceptBankSave.validate_inputs("pets") is True
    assert pack.ConceptLearner.validate_inputs(["rex"], ["dog"]) is True
    assert pack.ConceptExport.validate_inputs([1.0]) is True
    assert not list(own_folder.iterdir())


def test_missing_files_are_named_before_the_graph_runs(pack, own_inputs):
    """One sentence says what is missing, where, and what to do."""
    empty = pack.ConceptPhotosLoad.define_schema().inputs[0].options[0]      # in the place of a list
    answers = {
        "rex": (pack.ConceptPhotosLoad, {"folder": "rex"}, "'rex'", "3 to 10 photos", "press R"),
        "none": (pack.ConceptPhotosLoad, {"folder": empty}, "no folder with photos", str(own_inputs),
                 "press R"),
        "cast": (pack.ConceptFolderLearner, {"folder": "cast"}, "'cast'", "'rex dog'", "press R"),
        "bank": (pack.ConceptBankLoad, {"bank_name": "pets.safetensors"}, "'pets.safetensors'",
                 "learn a concept"),
        "lora": (pack.ConceptImport, {"lora": "teddy.safetensors", "embedding": "(none)"},
                 "'teddy.safetensors'", "models/loras", "press R"),
    }
    for node, given, *texts in answers.values():
        told = node.validate_inputs(**given)
        assert all(text in told for text in texts), told
        assert "\n" not in told and "; " in told
        assert node.validate_inputs(**dict.fromkeys(given)) is True      # another node gives the text later
    (own_inputs / "rex").mkdir()
    Image.new("RGB", (32, 32)).save(own_inputs / "rex" / "1.png")
    assert pack.ConceptPhotosLoad.validate_inputs("rex") is True
    assert pack.ConceptPhotosLoad.validate_inputs("mimi").endswith("choose another one: rex")
    assert pack.ConceptBankLoad.validate_inputs("(new bank)") is True
    assert pack.ConceptImport.validate_inputs("(none)", "(none)") is True


def test_c1_a_learner_that_cannot_keep_its_run_makes_no_step(studio, blocked):
    with pytest.raises(ConceptError, match="the checkpoint .* cannot be written"):
        studio.learn(steps=10_000)


@pytest.mark.usefixtures("own_folder")
def test_c1_a_bank_that_cannot_be_saved_is_kept_elsewhere(studio, bank, tmp_path_factory, monkeypatch):
    spare, replace = tmp_path_factory.mktemp("spare"), files.os.replace

    def full(old, new):
        if new.parent != spare:
            raise OSError(28, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(files.os, "replace", full)
    monkeypatch.chdir(spare)
    with pytest.raises(ConceptError, match="No space left on device; .* kept in the bank '.*pets_kept.safe"):
        studio.pack.ConceptBankSave.execute(bank, "pets", False)
    assert open_bank(spare / "pets_kept.safetensors").names == bank.names


def test_two_banks_of_one_name_do_not_hide_one_another(studio, own_folder, tmp_path_factory, monkeypatch):
    """In the folder of models and in that of outputs, as after a bank was dropped onto the page."""
    import folder_paths

    from continual_concepts.nodes import folders

    models, outputs = tmp_path_factory.mktemp("models"), folders.output_folder()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.BANKS,
                        ([str(models), str(outputs)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    studio.pack.ConceptBankSave.execute(studio.bank, "pets", False)
    shutil.copy(outputs / "pets.safetensors", models)
    load = studio.pack.ConceptBankLoad.execute
    assert load("pets.safetensors")[0].names == studio.bank.names      # copies are one bank
    save_bank(studio.bank.remove("rex"), models / "pets.safetensors")
    with pytest.raises(ConceptError, match="are two different banks of one name; rename or move one"):
        load("pets.safetensors")
    assert "is a bank of this name already" in studio.pack.ConceptBankSave.validate_inputs("pets")


def test_c3_long_names_in_four_byte_letters(studio, own_folder):
    """64 letters of four bytes are more than a file name can hold: refused for a bank, not for a concept."""
    name = "𠮷" * 64
    assert "too long" in studio.pack.ConceptBankSave.validate_inputs(name)
    assert studio.learn(name=name, steps=1).names == [name]
    assert list((own_folder / "concept_banks" / ".unfinished").glob("𠮷*.checkpoint"))
