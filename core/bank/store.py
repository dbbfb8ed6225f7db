"""A person's bank on disk over the months: changed by one program at a time, with its last versions kept beside it.

`save_bank` writes a file; here a file is *changed*: under a lock, from what it holds at that moment, so that nothing that somebody else has
added meanwhile is lost. The version that is replaced goes to `.<name>.earlier/1.safetensors`, the one before it to 2, and so on.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import ConceptError
from .bank import ConceptBank
from .concepts import Concept
from .format import SUFFIX, open_bank, save_bank

VERSIONS = 5
PATIENCE = 30.0      # seconds to wait for another program that is writing; it takes far less
ABANDONED = 3600.0      # seconds after which a half-written file is nobody's any more: its writer was killed

Change = Callable[[ConceptBank | None], ConceptBank]


@dataclass(frozen=True)
class Version:
    """number: 1 is the last one before the present; changed: when it was written, seconds since 1970."""

    number: int
    path: Path
    changed: float


def _folder(path: Path) -> Path:
    return path.with_name(f".{path.name.removesuffix(SUFFIX)}.earlier")


def versions(path: Path | str) -> list[Version]:
    """Earlier versions of a bank that are there, newest first."""
    path = Path(path)
    files = {number: _folder(path) / f"{number}{SUFFIX}" for number in range(1, VERSIONS + 1)}
    return [Version(number, file, file.stat().st_mtime) for number, file in files.items()
            if file.is_file() and not (path.exists() and os.path.samefile(file, path))]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(str(path.with_name(f".{path.name}.lock")), timeout=PATIENCE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ConceptError(f"another program has been writing the bank '{path}' for {PATIENCE:.0f} seconds; try again, nothing is "
                           "lost") from error
    except OSError as error:
        raise ConceptError(f"cannot write '{path}': {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def change_bank(path: Path | str, change: Change) -> ConceptBank:
    """Replaces a bank's file by `change(what it holds now)`, None where there is no file yet; returns the new bank.

    Whatever `change` raises leaves everything as it was. ConceptError also when the file cannot be written; the old one stays whole then.
    """
    return _replaced(Path(path), lambda: change(_present(Path(path))))


def _present(path: Path) -> ConceptBank | None:
    return open_bank(path) if path.exists() else None


def _replaced(path: Path, make: Callable[[], ConceptBank], is_version: bool = True) -> ConceptBank:
    """Writes what `make` gives under the lock. is_version: whether the present file is kept as one."""
    with _locked(path):
        _sweep(path)
        bank = make()
        save_bank(bank, path, before=(lambda: _keep(path)) if is_version else (lambda: None))
    return bank


def _sweep(path: Path) -> None:
    """Deletes what writers of this bank that were killed have left half-written."""
    half = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.partial")
    for file in path.parent.glob(".*.partial"):
        try:
            if half.fullmatch(file.name) and time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()
        except OSError:      # gone meanwhile, or not ours to delete: no reason to refuse a change
            continue


def _keep(path: Path) -> None:
    """The file as it is becomes version 1; the oldest goes. By names alone: nothing is copied where the disk knows links. Called when the
    new file is complete, so that what fails earlier leaves the versions as they are."""
    if not path.exists():
        return
    folder, first = _folder(path), _folder(path) / f"1{SUFFIX}"
    try:
        folder.mkdir(exist_ok=True)
        if first.exists() and os.path.samefile(first, path):      # a program was killed right behind this step
            return
        for number in range(VERSIONS - 1, 0, -1):
            older = folder / f"{number}{SUFFIX}"
            if older.exists():
                os.replace(older, folder / f"{number + 1}{SUFFIX}")
        try:
            os.link(path, first)
        except OSError:
            temporary = folder / f"{first.name}.partial"
            shutil.copy2(path, temporary)
            os.replace(temporary, first)
    except OSError as error:
        raise ConceptError(f"cannot keep the present version of '{path}': {error.strerror or error}; nothing was changed") from error


def add_concept(path: Path | str, concept: Concept, shared: Mapping[str, Mapping[str, Tensor]], start: ConceptBank) -> ConceptBank:
    """Adds a concept that was learned on top of `start` to what the file holds now. shared: what its method carries on; where others have
    learned by the same method meanwhile, the file's state stays, since it knows their concepts."""
    def change(now: ConceptBank | None) -> ConceptBank:
        bank = start if now is None else now
        fresh = {method: state for method, state in shared.items() if bank.names == start.names or method not in bank.shared}
        return bank.add(concept, fresh)

    return change_bank(path, change)


def replace_concept(path: Path | str, concept: Concept) -> ConceptBank:
    """Puts a concept in the place of the one of its name: the same learning, told of more fully (a thumbnail). No version of its own."""
    def make() -> ConceptBank:
        now = _present(Path(path))
        if now is None or concept.name not in now:
            raise ConceptError(f"the bank '{path}' holds no concept '{concept.name}' any more")
        return now.replace(concept)

    return _replaced(Path(path), make, is_version=False)


def restore(path: Path | str, number: int = 1) -> ConceptBank:
    """Brings an earlier version back. The present file, damaged as it may be, becomes version 1, so that this can be undone as well."""
    path = Path(path)

    def make() -> ConceptBank:
        found = {version.number: version.path for version in versions(path)}
        if number not in found:
            raise ConceptError(f"the bank '{path}' has no version {number!r}; there are {', '.join(map(str, found)) or 'none'}")
        return open_bank(found[number])      # saving reads it whole before the versions move up

    return _replaced(path, make)
