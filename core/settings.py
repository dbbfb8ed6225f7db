"""Fields of configurations that describe themselves: the nodes make their inputs from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What a form needs to know of a field.

    help: one sentence for a tooltip, with the unit and the neutral value. low, high, step: what a form
    offers; a configuration may accept more. choices: the usual values of a text.
    """

    name: str
    default: Any
    help: str
    low: float | None
    high: float | None
    step: float | None
    choices: tuple[str, ...]


def setting(default: Any, help: str, low: float | None = None,  # noqa: A002 - argparse's word
            high: float | None = None, step: float | None = None, choices: Sequence[str] = ()) -> Any:
    """A dataclass field with its description; see `Setting`."""
    described = {"help": help, "low": low, "high": high, "step": step, "choices": tuple(choices)}
    return field(default=default, metadata=described)


def settings_of(config: type) -> dict[str, Setting]:
    """The described fields of a configuration, by name and in order."""
    return {entry.name: Setting(entry.name, entry.default, **entry.metadata) for entry in fields(config)
            if "help" in entry.metadata}
