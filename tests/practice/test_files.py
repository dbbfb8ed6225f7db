"""C: links, long names, folders in the place of files, and work that must not be lost."""

from __future__ import annotations

import pytest

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.bank.store import change_bank, restore, versions
from continual_concepts.core.errors import ConceptError
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
    with pytest.raises(ConceptError, match="cannot be written: .* in '/proc'"):
        check_output("/proc/none/bank.safetensors", "bank")
    with pytest.raises(ConceptError, match="output folder .* is not a folder"):
        check_output_folder(file)
    check_output(tmp_path / "new" / "newer" / "bank.safetensors")
    check_output_folder(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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


@pytest.mark.parametrize("name", ["CON", "aux.safetensors", "Lpt1.tar.gz", "nul ", "COM¹"])
def test_c3_sibling_names_that_windows_reserves(name):
    with pytest.raises(ConceptError, match="Windows reserves"):
        check_file_name(name)
    assert check_file_name(f"my-{name.strip()}") == f"my-{name.strip()}"


def test_c3_sibling_control_characters_in_names():
    with pytest.raises(ConceptError, match="cannot hold"):
        check_file_name("two\nlines")


def test_c5_a_folder_is_no_bank(grow, tmp_path, run, photos):
    for act in (lambda: grow(tmp_path, "rex"), lambda: open_bank(tmp_path)):
        with pytest.raises(ConceptError, match="is a folder; give the path of a file"):
            act()
