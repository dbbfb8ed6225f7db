"""The result of a command, and how it is printed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..errors import ConceptError
from ..training.memory import lacks_memory
from .workers import stopped_as_by_ctrl_c

# A JSON value, and lines of text to print without --json. Notes of the value that are no lines go to stderr.
Result = tuple[dict, list[str]]


# Signs that move the cursor, change colours or turn the direction of writing. Banks of others may hold them.
_HIDDEN = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
_HIDDEN |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """A text for a terminal, with signs that would change more than their place as escapes."""
    return text.translate(_HIDDEN)


def _one_line(text: str) -> str:
    """A line of a result. A break inside it would look like a line of its own."""
    return text.replace("\n", "\\n")


class _Messages:
    """Writes to a stream. If that is closed or cannot be written, what follows goes nowhere: messages and the
    progress bar must not end a command whose work is worth more."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.fails = stream, False

    def __getattr__(self, name: str) -> Any:
        if name == "stream":      # a copy has none yet
            raise AttributeError(name)
        return getattr(self.stream, name)

    def _attempt(self, act: Callable[[], Any]) -> None:
        try:
            if not self.fails:
                act()
        except (OSError, ValueError):      # ValueError: closed
            self.fails = True
            if self.stream is sys.__stderr__:
                _send_nowhere(self.stream)

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda: self.stream.flush())


def _send_nowhere(stream: Any) -> None:
    """Lets what is written to a stream go nowhere. When Python ends, it writes what is left in the buffer,
    and that would fail again."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def messages_may_fail() -> Iterator[None]:
    """Within it, a stderr that is closed or cannot be written is no error."""
    before = sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stderr = messages = _Messages(nowhere if before is None else before)
        try:
            yield
        finally:
            if sys.stderr is messages:      # another thread may have changed it
                sys.stderr = before


def complain(text: str) -> None:
    """Prints to stderr."""
    print(printable(text), file=sys.stderr)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Prints a warning as one sentence, without the line of code that gave it."""
    complain(f"warning: {message}")


def print_readably() -> None:
    """Prints letters that the console's encoding lacks as escapes, such as `\\u732b`, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> bool:
    """Prints to stdout. A full disk or a closed pipe must not end a command whose work is worth more.

    Returns:
        Whether the text was printed; if not, stderr says why.
    """
    try:
        print(printable(text), flush=True)
    except OSError as error:
        _send_nowhere(sys.stdout)
        print(f"warning: the output cannot be printed ({error.strerror})", file=sys.stderr)
        return False
    return True


def failed(program: str, sentence: str, code: int, is_json: bool) -> int:
    """Reports a failed command on stderr, and as `{"error": sentence}` on stdout with --json."""
    complain(f"{program}: {sentence}")
    if is_json:
        say(json.dumps({"error": sentence}))
    return code


@contextmanager
def same_threads() -> Iterator[None]:
    """Restores the number of PyTorch's threads, which a command may change: programs call `main`, too."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns a lack of memory, which PyTorch reports in several ways, into a ConceptError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise ConceptError("there is not enough memory for this; choose a smaller size, resolution or batch "
                           "size") from error


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
    print_readably()
    with messages_may_fail(), stopped_as_by_ctrl_c():
        try:
            try:
                # the first restores how warnings are shown
                with warnings.catch_warnings(), same_threads(), one_sentence():
                    warnings.showwarning = _show_warning
                    result = command(options)
            except ConceptError as error:
                return failed(program, str(error), 1, options.json)
            return 0 if result is None else _printed(program, result, options.json)
        except KeyboardInterrupt:
            return failed(program, stopped, 130, options.json)


def _printed(program: str, result: Result, is_json: bool) -> int:
    """Prints a result. Returns the exit code."""
    facts, lines = result
    if not is_json:
        for note in facts.get("notes", ()):
            if note not in lines:
                complain(f"{program}: note: {note}")
    return 0 if say(json.dumps(facts, indent=1) if is_json else "\n".join(map(_one_line, lines))) else 1
