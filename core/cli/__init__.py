"""The command line `continual-concepts`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from ..errors import ConceptError
from ..versions import check_versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line if the installed packages are new enough. Returns the exit code."""
    try:
        check_versions()
    except ConceptError as error:
        print(f"continual-concepts: {error}", file=sys.stderr)
        return 1
    try:
        from .parser import main as run  # lazy: old packages may fail when they are imported
    except ConceptError as error:      # a file that ships is damaged
        print(f"continual-concepts: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:      # importing takes seconds
        print("continual-concepts: stopped before anything was done", file=sys.stderr)
        return 130
    return run(arguments)


def program() -> int:
    """`main` as a program of its own. Returns the exit code."""
    try:
        return main()
    except KeyboardInterrupt:      # between a command's end and here, or while help is printed
        print("continual-concepts: stopped", file=sys.stderr)
        return 130
    finally:
        # Python takes seconds to end. A signal in this time would print a traceback or change the exit code,
        # also with a function of ours, because Python drops those when it ends.
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):      # Windows has no SIGHUP
                signal.signal(getattr(signal, name), signal.SIG_IGN)
