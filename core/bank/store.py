"""Changes to a bank file that several programs may write, with a lock and earlier versions.

`save_bank` only writes a file. These functions take a lock, read the present file, change it and write it, so
that concepts added by another program are not lost. The replaced version goes to
`.<name>.earlier/1.safetensors`, the one before it to 2, and so on.
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

from ..errors import ConceptError, WriteError
from ..files import (
    LONGEST_NAME,
    beside,
    check_output,
    partial_file,
    real_file,
    shortened,
    write_elsewhere,
)
from .bank import ConceptBank
from .concepts import Concept
from .format import SUFFIX, open_bank, save_bank

VERSIONS = 5
PATIENCE = 30.0      # seconds to wait while another program writes; a write takes far less
ABANDONED = 3600.0      # seconds after which a half-written file is considered abandoned

Change = Callable[[ConceptBank | None], ConceptBank]


@dataclass(frozen=True)
class Version:
    """An earlier state of a bank's file. number: 1 = the newest; changed: seconds since 1970."""

    number: int
    path: Path
    changed: float


def _folder(path: Path) -> Path:
    return path.with_name(f".{shortened(path.name.removesuffix(SUFFIX), LONGEST_NAME - 9)}.earlier")


def versions(path: Path | str) -> list[Version]:
    """The earlier versions of a bank, newest first."""
    path = real_file(path)
    files = {number: _folder(path) / f"{number}{SUFFIX}" for number in range(1, VERSIONS + 1)}
    return [Version(number, file, file.stat().st_mtime) for number, file in files.items()
            if file.is_file() and not (path.exists() and os.path.samefile(file, path))]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(str(beside(path, ".lock")), timeout=PATIENCE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise WriteError(f"another program has been writing the bank '{path}' for {PATIENCE:.0f} seconds; "
                         "try again, nothing is lost") from error
    except OSError as error:
        raise WriteError(f"cannot write '{path}': {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def change_bank(path: Path | str, change: Change) -> ConceptBank:
    """Replaces a bank file by `change(present bank)` and returns the new bank.

    Args:
        change: Gets None if there is no file yet. If it raises, the file stays unchanged.

    Raises:
        ConceptError: The file cannot be read or written. The old file stays intact.
    """
    path = check_output(path, "bank")
    return _replaced(path, lambda: change(_present(path)))


def _present(path: Path) -> ConceptBank | None:
    return open_bank(path) if path.exists() else None


def _replaced(path: Path, make: Callable[[], ConceptBank], is_version: bool = True) -> ConceptBank:
    """Writes what `make` returns, under the lock. is_version: Whether to keep the present file as an earlier
    version.
    """
    with _locked(path):
        _sweep(path)
        bank = make()
        save_bank(bank, path, before=(lambda: _keep(path)) if is_version else (lambda: None))
    return bank


def _sweep(path: Path) -> None:
    """Deletes half-written files that killed programs left behind."""
    start = partial_file(path, "0" * 8).name.removesuffix("0" * 8 + ".partial")
    half = re.compile(re.escape(start) + r"[0-9a-f]{8}\.partial")
    for file in path.parent.glob(".*.partial"):
        try:
            if half.fullmatch(file.name) and time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()
        except OSError:      # already deleted, or owned by another user: the change can go on
            continue


def _keep(path: Path) -> None:
    """Makes the present file version 1 and deletes the oldest. It links files if the disk supports it, else
    copies.

    Called when the new file is complete, so that an earlier failure leaves the versions unchanged.
    """
    if not path.exists():
        return
    folder, first = _folder(path), _folder(path) / f"1{SUFFIX}"
    try:
        folder.mkdir(exist_ok=True)
        # The samefile case: a program was killed right after this step.
        if first.exists() and os.path.samefile(first, path):
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
        raise WriteError(f"cannot keep the present version of '{path}': {error.strerror or error}; nothing "
                         "was changed") from error


def add_concept(path: Path | str, concept: Concept, shared: Mapping[str, Mapping[str, Tensor]],
                start: ConceptBank, replaces: bool = False, in_place: bool = False) -> ConceptBank:
    """Adds a concept to the present file.

    Args:
        shared: State that the method passes from task to task. If another program added concepts meanwhile,
            the file's own state is kept, because it includes those concepts.
        start: The bank that the concept was learned on.
        replaces: Whether a concept of this name is removed first.
        in_place: Whether a concept of this name is replaced in its position, as when it was refined.
    """
    def change(now: ConceptBank | None) -> ConceptBank:
        bank = start if now is None else now
        others = bank.remove(concept.name) if (replaces or in_place) and concept.name in bank else bank
        is_as_learned = others.names == start.names
        fresh = {method: state for method, state in shared.items() if is_as_learned
                 or method not in bank.shared}
        is_there = in_place and concept.name in bank
        return bank.replace(concept, fresh) if is_there else others.add(concept, fresh)

    return change_bank(path, change)


def saved_elsewhere(error: ConceptError, path: Path | str, bank: ConceptBank) -> ConceptError:
    """Writes what a bank's file could not take to another file, see `files.write_elsewhere`.

    Args:
        error: Why the file could not be written.
        path: The bank's file.
        bank: What must not be lost.

    Returns:
        The error to raise: its sentence names the file.
    """
    other = write_elsewhere(real_file(path), lambda temporary: save_bank(bank, temporary))
    if other is None:
        return error
    names = f"{', '.join(f'<{name}>' for name in bank.names)} {'is' if len(bank) == 1 else 'are'}"
    return ConceptError(f"{error}; {names} kept in the bank '{other}', which can be merged later")


def replace_concept(path: Path | str, concept: Concept) -> ConceptBank:
    """Replaces a concept by a more complete record of the same training run, without keeping an earlier
    version.
    """
    path = check_output(path, "bank")

    def make() -> ConceptBank:
        now = _present(path)
        if now is None or concept.name not in now:
            raise ConceptError(f"the bank '{path}' holds no concept '{concept.name}' any more")
        return now.replace(concept)

    return _replaced(path, make, is_version=False)


def restore(path: Path | str, number: int = 1) -> ConceptBank:
    """Restores an earlier version. The present file, damaged or not, becomes version 1."""
    path = check_output(path, "bank")

    def make() -> ConceptBank:
        paths = {version.number: version.path for version in versions(path)}
        if number not in paths:
            raise ConceptError(f"the bank '{path}' has no version {number!r}; there are "
                               f"{', '.join(map(str, paths)) or 'none'}")
        return open_bank(paths[number])      # saving reads the whole file before the versions are renumbered

    return _replaced(path, make)
