"""A person's bank on disk over the months: changed by one program at a time, with its last versions kept beside it.

`save_bank` writes a file; here a file is *changed*: under a lock, from what it holds at that moment, so that nothing that somebody else has
added meanwhile is lost. The version that is replaced goes to `.<name>.earlier/1.safetensors`, the one before it to 2, and so on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from .bank import ConceptBank
from .bankfile import SUFFIX, open_bank, save_bank
from .concepts import Concept
from .errors import ConceptError

VERSIONS = 5
PATIENCE = 30.0      # seconds to wait for another program that is writing; it takes far less

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
    path = Path(path)
    with _locked(path):
        bank = change(open_bank(path) if path.exists() else None)
        save_bank(bank, path, before=lambda: _keep(path))
    return bank


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
    """Puts a concept in the place of the one of its name: the same learning, told of more fully (a cover). No version of its own."""
    def change(now: ConceptBank | None) -> ConceptBank:
        if now is None or concept.name not in now:
            raise ConceptError(f"the bank '{path}' holds no concept '{concept.name}' any more")
        return now.replace(concept)

    with _locked(Path(path)):
        bank = change(open_bank(path) if Path(path).exists() else None)
        save_bank(bank, path)
    return bank


def restore(path: Path | str, number: int = 1) -> ConceptBank:
    """Brings an earlier version back. The present one becomes version 1, so that this can be undone as well."""
    path = Path(path)
    found = {version.number: version for version in versions(path)}
    if number not in found:
        raise ConceptError(f"the bank '{path}' has no version {number!r}; there are {', '.join(map(str, found)) or 'none'}")

    def change(_now: ConceptBank | None) -> ConceptBank:
        return in_memory(open_bank(found[number].path))      # the versions move up before the new file is written

    return change_bank(path, _even_if_damaged(path, change))


def _even_if_damaged(path: Path, change: Change) -> Change:
    """A damaged bank is what people restore from: `change_bank` opens the present file, which must not stop it."""
    try:
        if path.exists():
            open_bank(path)
    except ConceptError:
        os.replace(path, path.with_name(f".{path.name}.damaged"))
    return change


def in_memory(bank: ConceptBank) -> ConceptBank:
    """The same bank with everything read, so that its file may go."""
    held = ConceptBank(bank.layout, (), {method: dict(state) for method, state in bank.shared.items()})
    for concept in bank:
        held = held.add(concept)
    return held
