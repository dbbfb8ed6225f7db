"""Cells of the continual benchmark: which method, settings, order and seed; what is known of one that is under way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...core.errors import ConceptError
from ...core.files import write_atomically

SAMPLING = ("mode", "strength", "artists")      # variant settings that say how a bank is looked at, not how it is learned


@dataclass(frozen=True)
class Cell:
    """alone: every concept on an empty bank of its own, the upper bound that no continual method is expected to beat; variant: settings
    beside the method's usual ones, as `key=value` with `+` between them: a row of its own, for ablations. Those of SAMPLING go to
    SampleSettings: another reading of the same learning, such as `cidm+mode=paper`."""

    method: str
    tasks: int
    order: int
    seed: int
    alone: bool = False
    variant: str = ""

    @property
    def label(self) -> str:
        return f"{self.method}+{self.variant}" if self.variant else self.method

    @property
    def name(self) -> str:
        return f"{self.label}{'-alone' if self.alone else ''}-n{self.tasks}-o{self.order}-s{self.seed}"

    @property
    def _parts(self) -> list[str]:
        return self.variant.split("+") if self.variant else []

    def settings(self) -> dict:
        """The method's settings that the variant names; ConceptError for a part that is no setting."""
        return {key: value for key, value in map(_setting, self._parts) if key not in SAMPLING}

    def sampling(self) -> dict:
        return {key: value for key, value in map(_setting, self._parts) if key in SAMPLING}

    def learned_as(self) -> Cell:
        """The cell that learns the same and looks at it in the usual way."""
        return replace(self, variant="+".join(part for part in self._parts if _setting(part)[0] not in SAMPLING))


def _setting(part: str) -> tuple[str, object]:
    """`rank=8` as a name and a value."""
    key, separator, value = part.partition("=")
    if not separator:
        raise ConceptError(f"variant {part!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


@dataclass
class Progress:
    """What is known so far, as JSON: per concept in learning order its IA and TA just after learning, and its pictures' features;
    made_with: steps and settings, None in files of before they were kept."""

    names: list[str]
    just: list[tuple[float, float]]
    features: list[list[list[float]]]
    seconds: list[float]
    bytes: list[int]
    made_with: dict | None = None

    @staticmethod
    def load(path: Path, made_with: dict) -> Progress:
        """Raises ConceptError for the progress of a run with other steps or settings."""
        found = Progress(**json.loads(path.read_text())) if path.exists() else Progress([], [], [], [], [])
        check_same(path, found.made_with or made_with, made_with)
        found.made_with = made_with
        return found

    def save(self, path: Path) -> None:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(asdict(self))))


def check_same(path: Path, found: dict, wanted: dict) -> None:
    for key, value in wanted.items():
        if found.get(key, value) != value:
            raise ConceptError(f"'{path}' was made with {key} {found[key]}, asked for are {value}; delete it or choose another folder")
