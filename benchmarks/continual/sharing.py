"""Several processes share the runs of a benchmark: each takes runs that nobody else performs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .runs import Run

PAUSE = 10.0      # seconds until a process asks again whether a run has become free


@contextmanager
def claimed(folder: Path, run: Run) -> Iterator[bool]:
    """Claims a run by a lock on a file beside it. Gives whether the claim succeeded.

    The operating system releases the lock when the process ends, however it ends, so that a killed process
    leaves nothing that must be cleaned up. Its run continues from its progress in whichever process claims it
    next.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / f".{run.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        if is_finished(folder, run):      # whoever still waits for this file finds the run finished
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def is_finished(folder: Path, run: Run) -> bool:
    return (folder / f"{run.name}.json").exists()


def _ready(folder: Path, runs: Sequence[Run]) -> list[Run]:
    """The unfinished runs that can be performed now: one that samples another run's bank waits for it."""
    missing = [run for run in runs if not is_finished(folder, run)]
    return [run for run in missing if run.learned_as() == run or run.learned_as() not in missing]


def share(folder: Path, wanted: Callable[[], Sequence[Run]], perform: Callable[[Run], object],
          pause: float = PAUSE) -> None:
    """Performs runs together with other processes of the same command, until all are finished.

    Args:
        folder: Folder of the runs.
        wanted: The runs, finished ones included. Asked again after each round, because finished runs may
            decide which further ones are wanted.
        perform: Performs a run and writes its file. Finished runs are passed too, to be checked.
        pause: Seconds to wait while other processes perform all that is left.
    """
    checked: set[Run] = set()
    while True:
        runs = list(wanted())
        for run in runs:
            if is_finished(folder, run) and run not in checked:
                perform(run)
                checked.add(run)
        ready = _ready(folder, runs)
        if not ready:
            return
        performed = [run for run in ready if _performed(folder, run, perform)]
        checked.update(performed)
        if not performed:
            time.sleep(pause)


def _performed(folder: Path, run: Run, perform: Callable[[Run], object]) -> bool:
    """Performs a run unless another process performs it or has finished it."""
    with claimed(folder, run) as is_mine:
        if is_mine and not is_finished(folder, run):
            perform(run)
            return True
    return False
