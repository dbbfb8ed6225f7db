"""Configuration fields with descriptions, from which the nodes build their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from .errors import ConceptError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Setting:
    """Description of a field for a form.

    help: one sentence for a tooltip, with the unit and the neutral value. low, high, step: usual range, which
    is the range in the form; a configuration may accept more. choices: common values of a text field.
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
    """The described fields of a configuration, by name and in order.

    A field without a description of its own, such as a replaced default, keeps that of the base class.
    """
    described = {entry.name: entry.metadata for base in reversed(config.__mro__) if is_dataclass(base)
                 for entry in fields(base) if "help" in entry.metadata}
    return {entry.name: Setting(entry.name, entry.default, **described[entry.name])
            for entry in fields(config) if entry.name in described}


Limit = tuple[Callable[[Any], bool], str]      # check of a value, and the allowed values in words


def at_least(low: float) -> Limit:
    return lambda value: low <= value < math.inf, f"{low} or more"


def between(low: float, high: float) -> Limit:
    return lambda value: low <= value <= high, f"{low} to {high}"


def above(low: float, high: float = math.inf) -> Limit:
    """Greater than `low`, at most `high`."""
    def allows(value: float) -> bool:
        return low < value <= high and value < math.inf

    return allows, f"above {low}" + (f" to {high}" if high < math.inf else "")


def one_of(choices: tuple[str, ...]) -> Limit:
    return lambda value: value in choices, ", ".join(choices)


SEED = between(0, 2**64 - 1)      # what PyTorch takes
FINITE: Limit = (math.isfinite, "finite")


def require(condition: bool, setting: str, value: object, allowed: str) -> None:
    """Raises ConceptError for a setting that is not allowed."""
    if not condition:
        raise ConceptError(f"setting '{setting}' is {value!r}; allowed: {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


KINDS: Mapping[str, Limit] = {
    "bool": (lambda value: isinstance(value, (int, float)) and value in (False, True), "true or false"),
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "float": (_is_number, "a number"),
    "str": (lambda value: isinstance(value, str), "a text"),
}
SPELLINGS = {"true": True, "yes": True, "on": True, "1": True,
             "false": False, "no": False, "off": False, "0": False}


def check(config: DataclassInstance, limits: Mapping[str, Limit]) -> None:
    """Raises ConceptError for the first field that is not of its type, or outside its limit.

    Limits of missing fields are skipped.
    """
    for entry in fields(config):
        value, kind = getattr(config, entry.name), KINDS.get(str(entry.type))
        allows, allowed = limits.get(entry.name, (lambda value: True, ""))
        if kind is not None:
            kinds = "" if kind[1] == "a text" and allowed else kind[1]
            require(kind[0](value), entry.name, value, ", ".join(filter(None, (kinds, allowed))))
        require(allows(value), entry.name, value, allowed)


def read_bool(text: str) -> bool | None:
    """A truth value in any usual spelling; None for other texts."""
    return SPELLINGS.get(text.strip().lower())


def _number(read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text)
    except ValueError:
        return text


def read_setting(config: type, name: str, text: str) -> Any:
    """The value of a field from the text that a command line gives.

    A text that is none of the field's type is returned as it is, so that `check` names it together with the
    allowed values. An unknown field gives the text, too.
    """
    kind = next((str(entry.type) for entry in fields(config) if entry.name == name), "str")
    text = text.strip()
    if kind == "bool":
        value = read_bool(text)
        return text if value is None else value
    if kind in ("int", "float"):
        return _number(int if kind == "int" else float, text)
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def read_settings(config: type, texts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The values of `name=text` pairs, see `read_setting`. Raises ConceptError for a repeated name."""
    values: dict[str, Any] = {}
    for name, text in texts:
        if name in values:
            raise ConceptError(f"setting '{name}' is given twice; give it once")
        values[name] = read_setting(config, name, text)
    return values


def unusual(config: DataclassInstance) -> list[str]:
    """One sentence for each number that is allowed but outside the usual range of its field."""
    sentences = []
    for entry in settings_of(type(config)).values():
        value = getattr(config, entry.name)
        low, high = entry.low, entry.high
        if low is not None and high is not None and not low <= value <= high:
            sentences.append(f"setting '{entry.name}' is {value:g}; usual: {low:g} to {high:g}")
    return sentences
