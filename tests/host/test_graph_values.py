"""Values of a graph that the page does not offer: one sentence before the graph runs, and no traceback."""

from __future__ import annotations

import inspect
import math

import pytest
from PIL import Image

from continual_concepts.core.bank.format import save_bank
from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")
NO_TEXT = [5, True, 1.5, {"a": 1}, ["a", "b", "c"], []]
FOLDERS = ("ConceptPhotosLoad", "ConceptFolderLearner")


def put_photo(folder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(folder / "1.png")


@pytest.fixture
def inputs(own_inputs):
    """An input folder with photos in `cast/rex dog` and in `föö 犬`; `cast` is a folder of photo folders."""
    for name in ("cast/rex dog", "föö 犬", "a/b/c"):
        put_photo(own_inputs / name)
    put_photo(own_inputs / "cast" / "rex dog" / "masks")
    (own_inputs / "empty").mkdir()
    (own_inputs / "photo.png").write_bytes((own_inputs / "föö 犬" / "1.png").read_bytes())
    return own_inputs


def is_one_sentence(text) -> bool:
    return isinstance(text, str) and "\n" not in text and "Error" not in text and len(text) < 500


@pytest.mark.parametrize("value", NO_TEXT, ids=str)
def test_values_that_are_no_text(pack, inputs, value):
    for node in FOLDERS:
        told = getattr(pack, node).validate_inputs(folder=value)
        assert is_one_sentence(told) and told.startswith(f"folder is {value!r}; allowed: a folder"), told
    told = pack.ConceptBankLoad.validate_inputs(bank_name=value)
    assert told == f"bank_name is {value!r}; allowed: (new bank)"
    assert is_one_sentence(pack.ConceptImport.validate_inputs(lora=value, embedding="(none)"))


@pytest.mark.parametrize("node", FOLDERS)
def test_null_is_told_when_the_graph_runs(pack, inputs, node):
    """ComfyUI gives None for a text that another node has yet to give, so null passes before."""
    with pytest.raises(ConceptError, match="folder is None; allowed: a folder with .*photos in '.*', such"):
        getattr(pack, node).execute(folder=None)
    with pytest.raises(ConceptError, match=r"bank_name is None; allowed: \(new bank\)"):
        pack.ConceptBankLoad.execute(bank_name=None)


@pytest.mark.parametrize(("name", "reason"), [
    ("photo.png", "'photo.png' in '{root}' is a file and not a folder with"),
    ("empty", "the folder 'empty' in '{root}' holds no"),
    ("a/b/c", "the folder 'a/b/c' in '{root}' is not searched for"),
    ("rex", "there is no folder 'rex' with"),
    ("../out", "'../out' is not the name of a folder inside '{root}'"),
    ("..\\out", "'..\\\\out' is not the name of a folder inside '{root}'"),
    ("/etc", "'/etc' is not the name of a folder inside '{root}'"),
    ("x\0y", "there is no folder 'x\\x00y' with"),
])
def test_a_folder_that_is_not_offered_is_told_why(pack, inputs, name, reason):
    for node in FOLDERS:
        told = getattr(pack, node).validate_inputs(folder=name)
        assert told.startswith(reason.format(root=inputs)) and is_one_sentence(told), told
        assert ", and press R on the page, or choose another one: " in told


def test_a_folder_of_photos_is_no_folder_of_folders(pack, inputs):
    told = pack.ConceptFolderLearner.validate_inputs(folder="föö 犬")
    assert told.startswith(f"the folder 'föö 犬' in '{inputs}' holds no folders of photos; make a folder of")


@pytest.mark.parametrize("name", ["", " "])
def test_no_folder_is_chosen_although_there_are_some(pack, inputs, name):
    """The message once said that there was no folder, and listed those that there were."""
    told = pack.ConceptPhotosLoad.validate_inputs(folder=name)
    assert told == (f"folder is {name!r}; allowed: a folder with photos in '{inputs}', such as cast/rex dog, "
                    "föö 犬")


@pytest.mark.parametrize("name", ["cast/rex dog/", "cast\\rex dog", "./cast/rex dog", "cast//rex dog",
                                  "cast\\rex dog\\"])
def test_separators_of_other_systems_and_a_last_slash(pack, inputs, name):
    assert pack.ConceptPhotosLoad.validate_inputs(folder=name) is True
    assert pack.ConceptPhotosLoad.execute(folder=name)[0]
    masks = pack.ConceptPhotosLoad.validate_inputs(folder="cast\\rex dog\\masks\\")
    assert "holds the masks of the photos in 'cast/rex dog'" in masks


def test_a_graph_from_windows_finds_its_bank(pack, bank, own_folder, monkeypatch):
    import folder_paths

    from continual_concepts.nodes import folders

    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.BANKS,
                        ([str(own_folder)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (own_folder / "pets").mkdir()
    save_bank(bank, own_folder / "pets" / "rex.safetensors")
    for name in ("pets/rex.safetensors", "pets\\rex.safetensors"):
        assert pack.ConceptBankLoad.validate_inputs(bank_name=name) is True
        assert pack.ConceptBankLoad.execute(bank_name=name)[0].names == bank.names
    told = pack.ConceptBankLoad.validate_inputs(bank_name="../rex.safetensors")
    assert "put its file into models/concept_banks and press R" in told and "under this name" not in told


def test_messages_stay_short(pack, own_inputs):
    for number in range(30):
        put_photo(own_inputs / f"folder{number:02}")
    told = pack.ConceptPhotosLoad.validate_inputs(folder="x" * 10_000)
    assert told.endswith("folder11 and 18 more") and len(told) < 700
    assert len(pack.ConceptBankLoad.validate_inputs(bank_name="x" * 10_000)) < 300


def test_several_wrong_inputs_are_told_at_once(pack, own_folder):
    told = pack.ConceptImport.validate_inputs(lora="a.safetensors", embedding="b.safetensors")
    assert "'a.safetensors' in loras" in told
    assert "; and there is no file 'b.safetensors' in embeddings" in told
    told = pack.ConceptLearner.validate_inputs(name=[""], class_noun=[""])
    assert told.startswith("concept name is empty;") and "; and class noun is empty;" in told
    told = pack.ConceptShare.validate_inputs(licence="x" * 300, author="y" * 300)
    assert "the licence has 300" in told and "the author has 300" in told


def test_inputs_that_we_check_are_checked_as_comfyui_would(pack):
    """ComfyUI checks no range and no choice of an input that a node's `validate_inputs` takes."""
    for name, node in vars(pack).items():
        if not inspect.isclass(node) or "validate_inputs" not in vars(node):
            continue
        taken = inspect.getfullargspec(node.validate_inputs).args
        for each in (each for each in node.define_schema().inputs if each.id in taken):
            assert getattr(each, "min", None) is None and getattr(each, "max", None) is None, (name, each.id)
            if getattr(each, "options", None):
                others = {"name": ["rex"], "class_noun": ["dog"], "lora": "(none)", "embedding": "(none)"}
                given = {key: value for key, value in others.items() if key in taken}
                value = ["no such value"] if getattr(node.define_schema(), "is_input_list", False) \
                    else "no such value"
                assert node.validate_inputs(**given | {each.id: value}) is not True, (name, each.id)


def test_nothing_to_compare_runs_again_and_logs_nothing(pack, inputs, bank):
    """What is linked or deleted is no warning in the server's log; NaN is never equal to an earlier run's."""
    for compared in (pack.ConceptPhotosLoad.fingerprint_inputs(folder=None),
                     pack.ConceptPhotosLoad.fingerprint_inputs(folder="gone"),
                     pack.ConceptFolderLearner.fingerprint_inputs(folder="gone"),
                     pack.ConceptBankLoad.fingerprint_inputs(bank_name="gone.safetensors")):
        assert isinstance(compared, float) and math.isnan(compared)
    first = pack.ConceptPhotosLoad.fingerprint_inputs(folder="cast/rex dog")
    assert first == pack.ConceptPhotosLoad.fingerprint_inputs(folder="cast/rex dog")
    put_photo(inputs / "cast" / "rex dog" / "more")
    assert first != pack.ConceptPhotosLoad.fingerprint_inputs(folder="cast/rex dog")
