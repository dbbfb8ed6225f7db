"""The settings that tuning chose, read from its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path

from ...core.errors import ConceptError
from ...core.methods import get
from .runs import STEPS, STYLE_RATE
from .tuning_file import is_settings

FILE = Path(__file__).resolve().parents[1] / "results" / "tuning.json"


@cache
def _read(path: Path) -> Mapping:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        methods = {name: _numbers(entry["chosen"]) for name, entry in content["methods"].items()
                   if "chosen" in entry}      # the others are still being tuned
        return {"base": content["base"], "methods": methods,
                "trials": {name: len(entry["trials"]) for name, entry in content["methods"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConceptError(f"'{path}' is no result of the command tune ({type(error).__name__}); "
                           "delete it or make it again") from error


def _numbers(chosen: object) -> dict:
    if not is_settings(chosen):
        raise TypeError("settings are names and numbers")
    return dict(chosen)


def _chosen(method: str, fingerprint: str) -> Mapping:
    """What was chosen for a method on the base with this fingerprint; empty for another base.

    Raises ConceptError for a setting that the method has not, such as one of an earlier version.
    """
    tuning = _read(FILE)
    chosen = tuning["methods"].get(method, {}) if tuning and tuning["base"] == fingerprint else {}
    known = {STEPS, STYLE_RATE, *(entry.name for entry in fields(get(method).config))} if chosen else set()
    for name in chosen:
        if name not in known:
            raise ConceptError(f"'{FILE}' sets '{name}' of method {method!r}, which has no such setting; "
                               "tune this method again")
    return chosen


def chosen_settings(method: str, fingerprint: str) -> dict:
    """A method's chosen settings without the steps; empty if it was not tuned on this base."""
    return {name: value for name, value in _chosen(method, fingerprint).items() if name != STEPS}


def chosen_steps(method: str, fingerprint: str) -> int | None:
    return _chosen(method, fingerprint).get(STEPS)


def trials(method: str, fingerprint: str) -> int:
    """How many settings were tried for a method on this base."""
    tuning = _read(FILE)
    return tuning["trials"].get(method, 0) if tuning and tuning["base"] == fingerprint else 0
