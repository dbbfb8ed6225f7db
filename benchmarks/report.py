"""Helpers shared by the benchmark commands: JSON files, flags, checks of numbers, progress reports."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from ..core.demo.bases import EMBEDDED, NAMES
from ..core.errors import ConceptError
from ..core.files import write_atomically

Result = tuple[dict, list[str]]


def write_result(path: Path | None, result: dict) -> None:
    """Writes a result as JSON. Does nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(result, indent=1) + "\n"))


def read_result(path: Path) -> dict:
    """An earlier result; empty if there is none. Raises ConceptError if the file holds something else."""
    if not path.exists():
        return {}
    try:
        result = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConceptError(f"'{path}' is no JSON file; name another one for the result") from error
    if not isinstance(result, dict):
        raise ConceptError(f"'{path}' holds no result of a benchmark; name another file for the result")
    return result


def require_at_least(options: Namespace, **least: int) -> None:
    """Raises ConceptError for the first option below its minimum."""
    for name, value in least.items():
        if getattr(options, name) < value:
            raise ConceptError(f"{name} is {getattr(options, name)}; allowed: {value} or more")


def numbers(text: str, name: str) -> list[int]:
    """`21,22` as numbers, each once. Raises ConceptError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConceptError(f"{name} is {text!r}; allowed: numbers of 0 or more, separated by commas")
    return list(dict.fromkeys(map(int, parts)))


def add_embedded_base(parser: ArgumentParser, default: str = EMBEDDED) -> None:
    """Adds the flag that chooses an embedded base, for commands that need one."""
    parser.add_argument("--base", choices=NAMES, default=default,
                        help="the embedded base; 'embedded' is the newest one (default %(default)s)")


def load_or_make(path: Path, make: Callable[[], dict]) -> dict:
    """Loads one run of a benchmark from its file, or makes and writes it, so that an interrupted benchmark
    can resume.
    """
    if not path.exists():
        write_result(path, make())
    return json.loads(path.read_text())


def say(line: str) -> None:
    """Reports progress on stderr."""
    print(line, file=sys.stderr, flush=True)
