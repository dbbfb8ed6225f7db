"""Folders of the server: banks, what runs leave behind. Every name comes from a workflow, which anybody may
have written."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..core.bank.format import SUFFIX
from ..core.bank.tokens import check_name
from ..core.errors import ConceptError

BANKS = "concept_banks"
NEW_BANK = "(new bank)"


def register_folders() -> None:
    """Adds `concept_banks` in the models and output folders to those of extra_model_paths.yaml. Called at
    import of the nodes."""
    for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(BANKS, os.path.join(parent, BANKS))
    folder_paths.folder_names_and_paths[BANKS] = (folder_paths.folder_names_and_paths[BANKS][0], {SUFFIX})


def bank_names() -> list[str]:
    """Names of all banks. Hidden files and folders are left out: they hold earlier versions and unfinished
    runs."""
    names = folder_paths.get_filename_list(BANKS)
    return [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]


def bank_file(name: str) -> Path:
    """An existing bank's file; only names that the folders list are accepted."""
    if name not in bank_names():
        raise ConceptError(f"there is no bank {name!r}; there are {', '.join(bank_names()) or 'none yet'}")
    path = folder_paths.get_full_path(BANKS, name)
    if path is None:
        raise ConceptError(f"the bank {name!r} cannot be found any more")
    return Path(path)


def output_folder() -> Path:
    """Where banks are saved; made when it is missing."""
    folder = Path(folder_paths.get_output_directory()) / BANKS
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_bank_file(name: str) -> Path:
    """Where a bank of this name is saved. Names are letters, digits, - and _, so that no path can be made of
    them."""
    return output_folder() / f"{check_name(name.removesuffix(SUFFIX), 'bank name')}{SUFFIX}"


def checkpoint_folder() -> Path:
    """Where unfinished runs are saved."""
    return output_folder() / ".unfinished"


def checkpoint_file(name: str, key: str) -> Path:
    """The file of a run that learns this concept; key: tells apart runs of one concept."""
    checkpoint_folder().mkdir(exist_ok=True)
    return checkpoint_folder() / f"{check_name(name)}-{key}.checkpoint"
