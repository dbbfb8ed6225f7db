"""The result of a command, and how it is printed."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable

from ..errors import ConceptError

# A JSON value, and lines of text to print without --json. Notes of the value that are no lines go to stderr.
Result = tuple[dict, list[str]]


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Prints a warning as one sentence, without the line of code that gave it."""
    print(f"warning: {message}", file=sys.stderr)


def run(program: str, command: Callable, options: argparse.Namespace, stopped: str) -> int:
    """Calls a command and prints its result.

    Args:
        program: Name in front of messages.
        command: Takes the options and returns a Result. With several processes, only the first one returns a
            Result, the others None.
        options: Parsed arguments.
        stopped: Message of an interrupted command.

    Returns:
        Exit code 0; 1 with one sentence on stderr for bad input; 130 when interrupted.
    """
    try:
        with warnings.catch_warnings():      # which restores how warnings are shown
            warnings.showwarning = _show_warning
            result = command(options)
    except ConceptError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: {stopped}", file=sys.stderr)
        return 130
    if result is not None:
        facts, lines = result
        if not options.json:
            for note in facts.get("notes", ()):
                if note not in lines:
                    print(f"{program}: note: {note}", file=sys.stderr)
        print(json.dumps(facts, indent=1) if options.json else "\n".join(lines))
    return 0
