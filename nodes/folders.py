"""The server's folders of banks and checkpoints. All names come from workflows, which are untrusted."""

from __future__ import annotations

import os
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


def bank_file(name: str) -> Path:
    """The file of an existing bank. Only names listed in the folders are accepted."""
    if name not in bank_names():
        raise ConceptError(f"there is no bank {name!r}; there are {', '.join(bank_names()) or 'none yet'}")
    path = folder_paths.get_full_path(BANKS, name)
    if path is None:
        raise ConceptError(f"the bank {name!r} cannot be found any more")
    return Path(path)


def output_folder() -> Path:
    """The folder for saving banks; it may be missing."""
    return Path(folder_paths.get_output_directory()) / BANKS


def check_bank_name(name: str) -> str:
    """The file name of a new bank. Names only have letters, digits, - and _, so that they cannot be paths."""
    stem = check_name(name.strip().removesuffix(SUFFIX), "bank name")
    return check_file_name(stem, "bank name") + SUFFIX


def new_bank_file(name: str) -> Path:
    """The file for saving a bank."""
    return output_folder() / check_bank_name(name)


def checkpoint_folder() -> Path:
    """The folder of checkpoints of unfinished runs."""
    return output_folder() / ".unfinished"


def checkpoint_file(name: str, key: str) -> Path:
    """The checkpoint file of a run for this concept. key: distinguishes runs of the same concept."""
    return checkpoint_folder() / f"{shortened(check_name(name), 180)}-{key}.checkpoint"
