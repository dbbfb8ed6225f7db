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
PAINTED = "clipspace"      # ComfyUI's folder of painted masks, in its input folder
_SEVERAL, _LONGEST = 12, 120      # names that a message lists, and characters of a value, at most
_DEEPEST = 2      # levels below the input folder in which the page offers folders


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


def shown(value: object) -> str:
    """A value of a graph for a message, shortened. Graphs are untrusted: it may be of any type and length."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SEVERAL} more" if len(names) > _SEVERAL else ""
    return f"{', '.join(names[:_SEVERAL])}{more}"


def _choice(names: Sequence[str]) -> str:
    """The end of a message on something that is missing: what there is instead."""
    return f", or choose another one: {_listed(names)}" if names else ""


def _with_slashes(name: str) -> str:
    """A path with slashes between its parts alone: graphs made on Windows have backslashes, people type a
    slash at the end. What begins with a slash still does."""
    start = "/" if name.startswith(("/", "\\")) else ""
    return start + "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def offered(name: object, names: Sequence[str]) -> str | None:
    """The one of `names` that a graph's value means, whatever its separators; None if there is none."""
    if not isinstance(name, str) or name in names:
        return name if isinstance(name, str) else None
    return next((other for other in names if _with_slashes(other) == _with_slashes(name)), None)


def bank_file(name: object) -> Path:
    """The file of an existing bank. Only names listed in the folders are accepted.

    Raises:
        ConceptError: There is none, or two folders hold different banks of this name: a dropped or saved bank
            must not hide behind another one.
    """
    names = bank_names()
    found = offered(name, names)
    if found is None:
        raise ConceptError(_missing_bank(name, names))
    path = folder_paths.get_full_path(BANKS, found)
    if path is None:
        raise ConceptError(f"the bank {found!r} cannot be found any more")
    for other in _others(Path(path), found):
        if not filecmp.cmp(path, other, shallow=False):
            raise ConceptError(f"'{path}' and '{other}' are two different banks of one name; rename or move "
                               "one of them")
    return Path(path)


def _others(path: Path, name: str) -> list[Path]:
    """Other files that are banks of this name. path: The bank's own file, which may be missing."""
    found = [Path(folder) / name for folder in folder_paths.get_folder_paths(BANKS)]
    return [other for other in found if other.is_file() and not (path.exists() and other.samefile(path))]


def _missing_bank(name: object, names: Sequence[str]) -> str:
    """Says that there is no bank of this name, and what to do."""
    if not isinstance(name, str) or not name.strip():
        return f"bank_name is {shown(name)}; allowed: {_listed([NEW_BANK, *names])}"
    try:
        check_bank_name(name)
        advice = "learn a concept and save its bank under this name"
    except ConceptError:
        advice = f"put its file into models/{BANKS} and press R on the page"
    return f"there is no bank {shown(name)}; {advice}{_choice(names)}"


def input_folder(name: object, names: Sequence[str], content: str, advice: str, empty: str) -> Path:
    """A folder inside ComfyUI's input folder. Only folders that the page offers are accepted.

    Args:
        name: The folder, or `empty`, which the page shows where there is no folder.
        names: The folders that there are.
        content: What the folder should hold.
        advice: How to make it.

    Raises:
        ConceptError: It is none of them. The sentence says why, and what to do.
    """
    root, found = folder_paths.get_input_directory(), offered(name, names)
    if found is not None:
        return Path(root) / found
    is_unusable = not isinstance(name, str) or _with_slashes(name) == PAINTED
    if is_unusable or (names and str(name).strip() in ("", empty)):
        raise ConceptError(f"folder is {shown(name)}; allowed: a folder with {content} in {root!r}"
                           + (f", such as {_listed(names)}" if names else ""))
    name = str(name)
    if name.strip() in ("", empty):
        raise ConceptError(f"there is no folder with {content} in {root!r}; make one, {advice}, and press R "
                           "on the page")
    raise ConceptError(f"{_why_not(name, root, content)}; {advice}, and press R on the page{_choice(names)}")


def _why_not(name: str, root: str, content: str) -> str:
    """Why a folder is not among those with content."""
    plain, what = _with_slashes(name.strip()), shown(name)
    parts = plain.split("/")
    if os.path.isabs(plain) or os.path.isabs(name) or ".." in parts:
        return f"{what} is not the name of a folder inside {root!r}"
    path = os.path.join(root, plain)
    if os.path.isfile(path):
        return f"{what} in {root!r} is a file and not a folder with {content}"
    if not os.path.isdir(path):
        return f"there is no folder {what} with {content} in {root!r}"
    if len(parts) > _DEEPEST or any(part.startswith(".") for part in parts):
        return (f"the folder {what} in {root!r} is not searched for {content}, but those up to {_DEEPEST} "
                "levels deep whose names begin with no dot")
    return f"the folder {what} in {root!r} holds no {content}"


def stamps_in(folder: Path) -> list[tuple[str, int, int]]:
    """Name, time and size of every file in a folder, so that a graph runs again after a change."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]


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
