"""The server's folders of banks and checkpoints. All names come from workflows, which are untrusted."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Sequence
from pathlib import Path

import folder_paths

from ..core.bank.format import SUFFIX
from ..core.bank.tokens import check_name
from ..core.errors import ConceptError
from ..core.files import check_file_name, shortened

BANKS = "concept_banks"
NEW_BANK = "(new bank)"


def register_folders() -> None:
    """Adds `concept_banks` in the models and output folders to those of extra_model_paths.yaml. Called at
    import of the nodes."""
    for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(BANKS, os.path.join(parent, BANKS))
    folder_paths.folder_names_and_paths[BANKS] = (folder_paths.folder_names_and_paths[BANKS][0], {SUFFIX})


def bank_names() -> list[str]:
    """Names of all banks. Skips hidden files and folders, which hold earlier versions and unfinished runs."""
    names = folder_paths.get_filename_list(BANKS)
    return [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]


def _choice(names: Sequence[str]) -> str:
    """The end of a message on something that is missing: what there is instead."""
    return f", or choose another one: {', '.join(names)}" if names else ""


def bank_file(name: str) -> Path:
    """The file of an existing bank. Only names listed in the folders are accepted.

    Raises:
        ConceptError: There is none, or two folders hold different banks of this name: a dropped or saved bank
            must not hide behind another one.
    """
    if name not in bank_names():
        raise ConceptError(f"there is no bank {name!r}; learn a concept and save its bank under this "
                           f"name{_choice(bank_names())}")
    path = folder_paths.get_full_path(BANKS, name)
    if path is None:
        raise ConceptError(f"the bank {name!r} cannot be found any more")
    for other in _others(Path(path), name):
        if not filecmp.cmp(path, other, shallow=False):
            raise ConceptError(f"'{path}' and '{other}' are two different banks of one name; rename or move "
                               "one of them")
    return Path(path)


def _others(path: Path, name: str) -> list[Path]:
    """Other files that are banks of this name. path: The bank's own file, which may be missing."""
    found = [Path(folder) / name for folder in folder_paths.get_folder_paths(BANKS)]
    return [other for other in found if other.is_file() and not (path.exists() and other.samefile(path))]


def missing_folder(name: str, content: str, advice: str, empty: str, others: Sequence[str]) -> str:
    """Says that a folder inside ComfyUI's input folder is missing or has no content, and what to do.

    Args:
        name: The folder, or `empty`, which the page shows where there is no folder.
        content: What the folder should hold.
        advice: How to make it.
        others: The folders that there are.
    """
    root = folder_paths.get_input_directory()
    what = f"folder with {content}" if name in ("", empty) else f"folder {name!r} with {content}"
    return f"there is no {what} in {root!r}; {advice} and press R on the page{_choice(others)}"


def output_folder() -> Path:
    """The folder for saving banks; it may be missing."""
    return Path(folder_paths.get_output_directory()) / BANKS


def check_bank_name(name: str) -> str:
    """The file name of a new bank. Names only have letters, digits, - and _, so that they cannot be paths."""
    stem = check_name(name.strip().removesuffix(SUFFIX), "bank name")
    return check_file_name(stem, "bank name") + SUFFIX


def new_bank_file(name: str) -> Path:
    """The file for saving a bank. Raises ConceptError if another folder holds a bank of this name, which
    would be loaded instead."""
    path = output_folder() / check_bank_name(name)
    is_listed = any(Path(folder) == path.parent for folder in folder_paths.get_folder_paths(BANKS))
    others = _others(path, path.name) if is_listed else []      # banks are loaded from listed folders alone
    if others:
        raise ConceptError(f"'{others[0]}' is a bank of this name already; choose another bank_name, or move "
                           "that file away")
    return path


def checkpoint_folder() -> Path:
    """The folder of checkpoints of unfinished runs."""
    return output_folder() / ".unfinished"


def checkpoint_file(name: str, key: str) -> Path:
    """The checkpoint file of a run for this concept. key: distinguishes runs of the same concept."""
    return checkpoint_folder() / f"{shortened(check_name(name), 180)}-{key}.checkpoint"
