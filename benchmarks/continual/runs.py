"""Runs of the continual benchmark: which method, settings, order and seed.

And the progress of an unfinished one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...core.errors import ConceptError
from ...core.files import write_atomically

# overrides that change how a bank is sampled, not how it is learned
SAMPLING = ("mode", "strength", "artists")


@dataclass(frozen=True)
class Run:
    """One method on one sequence with one seed.

    Attributes:
        method: id of the method.
        tasks: number of tasks.
        order: of the tasks, see `concepts.ordered`.
        seed: of the training.
        alone: every concept on an empty bank of its own: the upper bound that no continual method is expected
            to beat.
        overrides: settings beside the method's usual ones, as `key=value` joined by `+`. Each combination is
            a row of its own. Keys of SAMPLING go to SampleSettings: the same learned bank is only sampled
            differently.
    """

    method: str
    tasks: int
    order: int
    seed: int
    alone: bool = False
    overrides: str = ""

    @property
    def label(self) -> str:
        return f"{self.method}+{self.overrides}" if self.overrides else self.method

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"{self.label}{'-alone' if self.alone else ''}-n{self.tasks}-o{self.order}-s{self.seed}"

    @property
    def _parts(self) -> list[str]:
        return self.overrides.split("+") if self.overrides else []

    def settings(self) -> dict:
        """The overridden settings of the method.

        ConceptError for a part that is not of the form key=value.
        """
        return {key: value for key, value in map(_setting, self._parts) if key not in SAMPLING}

    def sampling(self) -> dict:
        return {key: value for key, value in map(_setting, self._parts) if key in SAMPLING}

    def learned_as(self) -> Run:
        """The run that learns the same bank and samples it in the usual way."""
        return replace(self,
                       overrides="+".join(part for part in self._parts if _setting(part)[0] not in SAMPLING))

    def to_json(self) -> dict:
        """What a result file says of its run; the keys are those of committed files."""
        facts = asdict(self)
        return {**{key: value for key, value in facts.items() if key != "overrides"}, "method": self.label,
                "variant": self.overrides}


def _setting(part: str) -> tuple[str, object]:
    """`rank=8` as a name and a value."""
    key, separator, value = part.partition("=")
    if not separator:
        raise ConceptError(f"override {part!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


@dataclass
class Progress:
    """An unfinished run on disk, as JSON.

    Attributes:
        names: of the learned concepts, in learning order.
        just: per concept, image and text alignment just after learning.
        features: per concept, the features of its pictures just after learning.
        seconds: per concept.
        bytes: per concept.
        made_with: steps and settings; None in files that older versions wrote.
    """

    names: list[str]
    just: list[tuple[float, float]]
    features: list[list[list[float]]]
    seconds: list[float]
    bytes: list[int]
    made_with: dict | None = None

    @staticmethod
    def load(path: Path, made_with: dict) -> Progress:
        """Reads a run's progress, which is empty without a file; ConceptError for other steps or settings."""
        progress = Progress(**json.loads(path.read_text())) if path.exists() else Progress([], [], [], [], [])
        check_same(path, progress.made_with or made_with, made_with)
        progress.made_with = made_with
        return progress

    def save(self, path: Path) -> None:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(asdict(self))))


def check_same(path: Path, stored: dict, requested: dict) -> None:
    """Raises ConceptError where a file was made with other values than requested.

    Missing keys are accepted.
    """
    for key, value in requested.items():
        if stored.get(key, value) != value:
            raise ConceptError(f"'{path}' was made with {key} {stored[key]}, but {value} was requested; "
                               "delete it or choose another folder")
