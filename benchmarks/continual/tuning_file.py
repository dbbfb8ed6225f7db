"""The file with a result of tuning. Several processes may write it, each for methods of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...core.errors import ConceptError
from ..report import read_result

_LONGEST = 40      # of a value in a message


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Context manager in which no other process reads the file in order to write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(file.with_name(f".{file.name}.lock"))):
        yield


def stored_methods(file: Path, result: Mapping) -> dict[str, dict]:
    """The methods that a file holds; empty without a file.

    Args:
        file: Written by `Tuning.to_json`.
        result: Of the tuning that goes on with this file; its methods do not matter.

    Raises:
        ConceptError: The file is damaged, or it was made on another base or by another plan, whose trials
            would be lost.
    """
    content = read_result(file)
    if not content:
        return {}
    methods = content.get("methods")
    if not isinstance(methods, dict) or not all(map(_is_method, methods.values())):
        raise ConceptError(f"'{file}' is no result of the command tune; name another file with --json, or "
                           "delete this one")
    for name, value in result.items():
        if name != "methods" and content.get(name) != value:
            raise ConceptError(f"'{file}' was made with {_said(name, content.get(name))}, and this tuning "
                               f"has {_said(name, value)}; name another file with --json, or delete this one")
    return methods


def _said(name: str, value: Any) -> str:
    return f"{name} {value!r}" if len(repr(value)) <= _LONGEST else f"another {name}"


def _is_method(entry: Any) -> bool:
    return (isinstance(entry, dict) and isinstance(entry.get("trials"), list)
            and all(map(_is_trial, entry["trials"])) and is_settings(entry.get("chosen", {})))


def _is_trial(entry: Any) -> bool:
    """Whether an entry has a stage, a seed and settings, and either figures or the reason of a failure."""
    if not isinstance(entry, dict) or not is_settings(entry.get("settings")):
        return False
    figures = {name: value for name, value in entry.items() if name not in ("settings", "failed")}
    return {"stage", "seed"} <= set(figures) and is_settings(figures)


def is_settings(value: Any) -> bool:
    """Whether a value maps names to finite numbers."""
    return isinstance(value, dict) and all(
        type(number) in (int, float) and math.isfinite(number) for number in value.values())
