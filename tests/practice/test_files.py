"""C: links, long names, folders in the place of files, and work that must not be lost."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from continual_concepts.core import files
from continual_concepts.core.bank import store
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.bank.store import change_bank, restore, versions
from continual_concepts.core.bank.tokens import default_words
from continual_concepts.core.cli import backbones, learning
from continual_concepts.core.errors import ConceptError, WriteError
from continual_concepts.core.files import LONGEST_NAME, check_file_name, check_output, check_output_folder


@pytest.fixture
def grow(layout, make_concept):
    """grow(path, name): adds a concept to a bank's file."""
    def add(path, name):
        concept = make_concept(layout, name, len(name))
        return change_bank(path, lambda now: (now or ConceptBank(layout)).add(concept))

    return add


def test_c1_a_place_that_cannot_be_written_is_told_before(tmp_path):
    """A folder below a file; a folder in which nothing can be made; nothing is left behind by the check."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConceptError, match="'.*file' is not a folder"):
        check_output(file / "deep" / "bank.safetensors", "bank")
    if sys.platform == "linux":      # nothing can be made there, not even by the superuser
        with pytest.raises(ConceptError, match="cannot be written: .* in '/proc'"):
            check_output("/proc/none/bank.safetensors", "bank")
    with pytest.raises(ConceptError, match="output folder .* is not a folder"):
        check_output_folder(file)
    check_output(tmp_path / "new" / "newer" / "bank.safetensors")
    check_output_folder(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def without_base(monkeypatch):
    """Loading the base fails the test."""
    def load(options):
        raise AssertionError("the base is loaded before the output is checked")

    monkeypatch.setattr(backbones, "load_backbone", load)


def test_c1_every_command_checks_its_output_first(run, learned, photos, tmp_path, without_base):
    file = tmp_path / "file"
    file.write_text("")
    below = file / "bank.safetensors"
    lora = tmp_path / "x.safetensors"
    learning_rex = ("--name", "rex", "--noun", "dog")
    for arguments in (("learn", photos, "--bank", below, *learning_rex),
                      ("learn", photos, "--bank", tmp_path, *learning_rex),
                      ("sample", "a dog", "--output", file), ("sample", "a dog", "--output", below),
                      ("demo", "--output", file), ("bank", "import", below, "rex", "--lora", lora),
                      ("bank", "merge", learned, learned, "--output", below),
                      ("bank", "export", learned, "rex", "--refit", "--output", file)):
        sentence = run(*arguments).sentence
        assert "is not a folder" in sentence or "is a folder; give the path" in sentence, arguments


def test_c1_a_protected_file_is_told(monkeypatch, tmp_path):
    file = tmp_path / "bank.safetensors"
    file.write_text("")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)      # the superuser may write anything
    with pytest.raises(ConceptError, match="write-protected"):
        check_output(file, "bank")


def full(file, *rest):
    raise OSError(28, "No space left on device")


def test_c1_what_was_learned_is_kept_elsewhere(learn, photos, tmp_path, monkeypatch):
    """The disk is full from the last step on; the folder for temporary files has room."""
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.chdir(photos)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(spare))
    replace = files.os.replace
    monkeypatch.setattr(files.os, "replace",
                        lambda old, new: replace(old, new) if spare in new.parents else full(new))
    told = learn(photos)
    assert "warning: the checkpoint of the run was not written: cannot write" in told.err
    other = spare / "bank_kept.safetensors"
    assert f"No space left on device; <rex> is kept in the bank '{other}'" in told.sentence
    assert open_bank(other).names == ["rex"] and not (tmp_path / "bank.safetensors").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_c1_sibling_a_name_that_was_taken_meanwhile(learn, photos, learned, tmp_path, monkeypatch):
    """Two programs learn <rex> into one bank; the second one's is kept beside it."""
    add = learning.add_concept

    def other_was_faster(file, *rest, **how):
        learned.rename(file)
        return add(file, *rest, **how)

    monkeypatch.setattr(learning, "add_concept", other_was_faster)
    sentence = learn(photos, "--seed", 4).sentence
    assert "already holds a concept 'rex'" in sentence and "bank_kept.safetensors" in sentence
    kept = open_bank(tmp_path / "bank_kept.safetensors")
    assert kept.infos["rex"].provenance.settings["training"]["seed"] == 4


def test_c1_sibling_an_interrupted_run_is_kept_elsewhere(tiny_backbone, teach, tmp_path, monkeypatch):
    """The state of an interrupted run, where its own folder is full; a copy resumes it."""
    file, spare = tmp_path / "run.checkpoint", tmp_path / "spare"
    spare.mkdir()
    empty, losses = ConceptBank(tiny_backbone.layout), []

    def stop(info):
        if info.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.chdir(spare)
        replace = files.os.replace
        patched.setattr(files.os, "replace",
                        lambda old, new: replace(old, new) if new.parent == spare else full(new))
        with pytest.raises(WriteError, match="the interrupted run is kept in .*run_kept.checkpoint"):
            teach(tiny_backbone, empty, "rex", "bound", callback=stop, checkpoint_file=file)
    (spare / "run_kept.checkpoint").rename(file)
    teach(tiny_backbone, empty, "rex", "bound", callback=lambda info: losses.append(info.step),
          checkpoint_file=file)
    assert losses == [3]


def test_c1_sibling_a_checkpoint_that_cannot_be_written_is_told_before(tiny_backbone, teach, tmp_path):
    (tmp_path / "file").write_text("")
    steps = []
    with pytest.raises(ConceptError, match="the checkpoint .* cannot be written"):
        teach(tiny_backbone, ConceptBank(tiny_backbone.layout), "rex", "bound",
              callback=lambda info: steps.append(info), checkpoint_file=tmp_path / "file" / "run.checkpoint")
    assert steps == []


def test_c1_sibling_with_no_room_anywhere_the_reason_is_told(layout, make_concept, tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", full)
    bank = ConceptBank(layout).add(make_concept(layout, "rex", 1))
    error = store.saved_elsewhere(WriteError("the disk is full"), tmp_path / "bank.safetensors", bank)
    assert str(error) == "the disk is full" and not list(tmp_path.iterdir())


def test_c2_the_target_of_a_link_is_written(grow, tmp_path):
    real, link = tmp_path / "real" / "bank.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(real)
    grow(link, "rex")      # the target is made, too
    grow(link, "mimi")
    grow(real, "tom")
    assert link.is_symlink() and open_bank(real).names == open_bank(link).names == ["rex", "mimi", "tom"]
    assert [open_bank(version.path).names for version in versions(link)] == [["rex", "mimi"], ["rex"]]
    restore(link)
    assert link.is_symlink() and open_bank(real).names == ["rex", "mimi"]
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link.safetensors"}


def test_c2_sibling_a_link_to_itself_is_told(grow, tmp_path):
    link = tmp_path / "bank.safetensors"
    link.symlink_to(link)
    with pytest.raises(ConceptError, match="symbolic link that leads back to itself"):
        grow(link, "rex")


@pytest.mark.parametrize("stem", ["r" * 230, "犬" * 60, "r" * (LONGEST_NAME - len(".safetensors"))])
def test_c3_long_bank_names_work(grow, tmp_path, stem):
    file = tmp_path / f"{stem}.safetensors"
    grow(file, "rex")
    grow(file, "犬" * 60)
    assert open_bank(versions(file)[0].path).names == ["rex"]
    restore(file)
    assert open_bank(file).names == ["rex"]


@pytest.mark.parametrize("name", ["r" * 244 + ".safetensors", "犬" * 82 + ".safetensors"])
def test_c3_names_that_no_disk_can_hold_are_told(grow, tmp_path, name):
    with pytest.raises(ConceptError, match="bank name .* is too long"):
        grow(tmp_path / name, "rex")
    with pytest.raises(ConceptError, match="folder name .* is too long"):
        grow(tmp_path / name / "bank.safetensors", "rex")
    assert not list(tmp_path.iterdir())


def test_c3_sibling_concept_names_of_64_letters(layout, make_concept):
    """Their words are named after them and must fit as well."""
    name = "r" * 64
    assert default_words(name, 2) == ("r" * 62 + "-1", "r" * 62 + "-2")
    bank = ConceptBank(layout).add(make_concept(layout, "rex", 1)).rename("rex", name)
    assert bank.infos[name].words == default_words(name, 2)


@pytest.mark.parametrize("name", ["CON", "aux.safetensors", "Lpt1.tar.gz", "nul ", "COM¹"])
def test_c3_sibling_names_that_windows_reserves(name):
    with pytest.raises(ConceptError, match="Windows reserves"):
        check_file_name(name)
    assert check_file_name(f"my-{name.strip()}") == f"my-{name.strip()}"


def test_c3_sibling_control_characters_in_names():
    with pytest.raises(ConceptError, match="cannot hold"):
        check_file_name("two\nlines")


def test_c4_pictures_are_counted_on(run, tmp_path):
    arguments = ("sample", "a dog", "--output", tmp_path / "out", "--count", 1, "--steps", 1)
    first, second = run(*arguments), run(*arguments)
    assert first.code == second.code == 0
    assert [file.name for file in sorted((tmp_path / "out").iterdir())] == ["sample_00000.png",
                                                                          "sample_00000_00002.png"]
    assert "sample_00000_00002.png" in second.out


def test_c4_sibling_a_picture_that_cannot_be_written_leaves_no_empty_file(tmp_path):
    with pytest.raises(ConceptError, match="No space left"):
        files.write_new(tmp_path / "a.png", full)
    assert not list(tmp_path.iterdir())


def test_c4_sibling_names_that_differ_only_by_case_are_one(tmp_path):
    """On Windows and macOS the second file would be the first one, and programs load one for the other."""
    written = [files.write_new(tmp_path / name, lambda file: file.write_text("a"))
               for name in ("Rex.txt", "rex.txt", "REX.TXT", "rex_00002.txt")]
    assert len({file.name.casefold() for file in written}) == 4
    assert [file.name for file in written[:2]] == ["Rex.txt", "rex_00002.txt"]


def test_c4_sibling_two_programs_write_different_files(tmp_path):
    def write(i):
        return files.write_new(tmp_path / "a.txt", lambda file: file.write_text(f"{i}"))

    with ThreadPoolExecutor(8) as pool:
        assert {file.read_text() for file in pool.map(write, range(40))} == {f"{i}" for i in range(40)}


def test_c4_sibling_a_merge_drops_no_concept_of_its_output(run, grow, tmp_path):
    one, other, output = (tmp_path / f"{name}.safetensors" for name in ("one", "other", "output"))
    for file, name in ((one, "rex"), (other, "mimi"), (output, "buddy")):
        grow(file, name)
    change_bank(output, lambda bank: bank.rename("buddy", "tom"))
    assert "holds <tom>, which the merged bank lacks" in run("bank", "merge", one, other, "--output",
                                                             output).sentence
    assert open_bank(output).names == ["tom"]
    assert run("bank", "merge", one, other, "--output", one).code == 0
    assert open_bank(one).names == ["rex", "mimi"]


def test_c5_the_home_folder_is_expanded(run, learned, photos, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert "<rex>" in run("bank", "list", "~/learned.safetensors").out
    kept = run("learn", "~/photos", "--bank=~/learned.safetensors", "--name", "rex", "--noun", "dog",
               "--batch-size", 2, "--steps", 2)
    assert kept.code == 0 and not (tmp_path / "~").exists()


def test_c5_sibling_paths_that_mean_nothing(run):
    assert "the path is empty" in run("bank", "list", "").sentence
    assert "home folder of '~nobody-of-this-name/x' is not known" in run("bank", "list",
                                                                         "~nobody-of-this-name/x").sentence


def test_c5_a_folder_is_no_bank(grow, tmp_path):
    for act in (lambda: grow(tmp_path, "rex"), lambda: open_bank(tmp_path)):
        with pytest.raises(ConceptError, match="is a folder; give the path of a file"):
            act()
