"""Configuration fields with descriptions, from which the nodes build their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .errors import ConceptError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Setting:
    """Description of a field for a form.

    help: one sentence for a tooltip, with the unit and the neutral value. low, high, step: range in the form;
    a configuration may accept more. choices: common values of a text field.
    """

    name: str
    default: Any
    help: str
    low: float | None
    high: float | None
    step: float | None
    choices: tuple[str, ...]


def setting(default: Any, help: str, low: float | None = None,  # noqa: A002 - as in argparse
            high: float | None = None, step: float | None = None, choices: Sequence[str] = ()) -> Any:
    """A dataclass field with its description; see `Setting`."""
    described = {"help": help, "low": low, "high": high, "step": step, "choices": tuple(choices)}
    return field(default=default, metadata=described)


def settings_of(config: type) -> dict[str, Setting]:
    """The described fields of a configuration, by name and in order."""
    return {entry.name: Setting(entry.name, entry.default, **entry.metadata) for entry in fields(config)
            if "help" in entry.metadata}


Limit = tuple[Callable[[Any], bool], str]      # check of a value, and the allowed values in words


def at_least(low: float) -> Limit:
    return lambda value: value >= low, f"{low} or more"


def between(low: float, high: float) -> Limit:
    return lambda value: low <= value <= high, f"{low} to {high}"


def above(low: float, high: float = float("inf")) -> Limit:
    """Greater than `low`, at most `high`."""
    return lambda value: low < value <= high, f"above {low}" + (f" to {high}" if high < float("inf") else "")


def one_of(choices: tuple[str, ...]) -> Limit:
    return lambda value: value in choices, ", ".join(choices)


def require(condition: bool, setting: str, value: object, allowed: str) -> None:
    """Raises ConceptError for a setting that is not allowed."""
    if not condition:
        raise ConceptError(f"setting '{setting}' is {value!r}; allowed: {allowed}")


KINDS: Mapping[str, Limit] = {
    "bool": (lambda value: isinstance(value, (int, float)) and value in (False, True), "true or false"),
    "int": (lambda value: isinstance(value, int), "a whole number"),
    "float": (lambda value: isinstance(value, (int, float)), "a number"),
    "str": (lambda value: isinstance(value, str), "a text"),
}


def check(config: DataclassInstance, limits: Mapping[str, Limit]) -> None:
    """Raises ConceptError for the first field that is not of its type, or outside its limit.

    Limits of missing fields are skipped.
    """
    kinds = {entry.name: KINDS[str(entry.type)] for entry in fields(config) if str(entry.type) in KINDS}
    for name, (allows, allowed) in [*kinds.items(), *limits.items()]:
        if hasattr(config, name):
            require(allows(getattr(config, name)), name, getattr(config, name), allowed)
