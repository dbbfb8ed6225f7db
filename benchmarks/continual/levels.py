"""The floor and ceiling of a benchmark, measured once and kept beside its runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from ...core.errors import ConceptError
from ...core.files import write_atomically


def file_of(folder: Path, tasks: int) -> Path:
    return folder / f"levels-n{tasks}.json"


def read(file: Path) -> dict | None:
    """What `measured` wrote; None if there is no file."""
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        return {name: content[name] for name in ("origin", "concepts", "kinds", "floor", "ceiling")}
    except (ValueError, KeyError, TypeError) as error:
        raise ConceptError(f"'{file}' cannot be read ({type(error).__name__}); "
                           "delete it and it is made again") from error


def measured(file: Path, origin: Mapping, measure: Callable[[], Mapping]) -> dict:
    """Reads floor and ceiling if they are of this base, data and number of pictures; else measures them.

    Measuring takes as long as evaluating a run. Of several processes one measures and the others wait.

    Args:
        file: Where they are kept.
        origin: All that they depend on, as JSON values.
        measure: See `judged.floor_and_ceiling`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f".{file.name}.lock")
    with FileLock(str(lock)):
        levels = read(file)
        if levels is None or levels["origin"] != dict(origin):
            content = json.dumps({"origin": dict(origin), **measure()}, indent=1) + "\n"
            write_atomically(file, lambda temporary: temporary.write_text(content))
            levels = read(file)
        lock.unlink(missing_ok=True)      # whoever still waits for it finds the levels measured
    assert levels is not None
    return levels
