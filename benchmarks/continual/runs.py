"""Runs of the continual benchmark: method, settings, order and seed.

Also the progress of an unfinished run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...core.errors import ConceptError
from ...core.files import write_atomically
from ...core.methods import get
from ...core.sampling.settings import SampleSettings
from ...core.settings import read_settings

BASE = "embedded-64"      # of the drawn benchmark; on embedded-128 a run takes nearly four times as long
# overrides that affect sampling but not training
SAMPLING = ("mode", "strength", "artists")
# overrides that are no settings of the method
STEPS = "steps"
STYLE_RATE = "style_rate"      # factor on the rates of styles


@dataclass(frozen=True)
class Run:
    """One method on one sequence with one seed.

    Attributes:
        method: Id of the method.
        tasks: Number of tasks.
        order: Order of the tasks, see `concepts.ordered`.
        seed: Seed of the training.
        alone: Whether each concept is learned alone into an empty bank. This is an upper bound for continual
            methods.
        overrides: Changed settings, as `key=value` joined by `+`. Each combination is a separate row. Keys in
            SAMPLING change SampleSettings, so the same learned bank is sampled differently. `steps` changes
            the number of steps, `style_rate` multiplies the rates of styles.
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
        """The stem of the run's file names."""
        return f"{self.label}{'-alone' if self.alone else ''}-n{self.tasks}-o{self.order}-s{self.seed}"

    @property
    def _parts(self) -> list[str]:
        return self.overrides.split("+") if self.overrides else []

    def settings(self) -> dict:
        """The method's changed settings, and STYLE_RATE if it is changed.

        Raises ConceptError for a part that is not of the form key=value, or a key that comes twice.
        """
        pairs = list(map(_setting, self._parts))
        changed = read_settings(get(self.method).config, [pair for pair in pairs
                                                          if pair[0] not in (*SAMPLING, STEPS, STYLE_RATE)])
        return {**changed, **{name: _factor(text) for name, text in pairs if name == STYLE_RATE}}

    def steps(self, usual: int) -> int:
        """Steps per task. Raises ConceptError for an override that is no number of steps."""
        texts = [value for name, value in map(_setting, self._parts) if name == STEPS]
        if not texts:
            return usual
        if not texts[-1].isdecimal() or not int(texts[-1]):
            raise ConceptError(f"override 'steps={texts[-1]}' is no number of steps; allowed: 1 or more")
        return int(texts[-1])

    def sampling(self) -> dict:
        """The changed sampling settings, with the aggregation mode of the method's paper."""
        asked = read_settings(SampleSettings,
                              [pair for pair in map(_setting, self._parts) if pair[0] in SAMPLING])
        mode = get(self.method).method.published_mode
        return asked if mode == "sharp" else {"mode": mode, **asked}

    def learned_as(self) -> Run:
        """The run with the same bank and default sampling."""
        return replace(self,
                       overrides="+".join(part for part in self._parts if _setting(part)[0] not in SAMPLING))

    def to_json(self) -> dict:
        """The run's entry in a result file. The keys are those of committed files."""
        facts = asdict(self)
        return {**{key: value for key, value in facts.items() if key != "overrides"}, "method": self.label,
                "variant": self.overrides}


def settings_for(settings: Mapping, kind: str) -> dict:
    """The method's settings for a concept of this kind: of a style, `lr` and `token_lr` times STYLE_RATE."""
    own = {name: value for name, value in settings.items() if name != STYLE_RATE}
    if kind != "style" or STYLE_RATE not in settings:
        return own
    return own | {name: own[name] * settings[STYLE_RATE] for name in ("lr", "token_lr") if name in own}


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ConceptError(f"override '{STYLE_RATE}={text}' is no factor on rates; allowed: numbers above 0")
    return factor


def _setting(part: str) -> tuple[str, str]:
    """Splits `rank=8` into name and value."""
    key, separator, value = part.partition("=")
    if not separator:
        raise ConceptError(f"override {part!r} is not of the form key=value")
    return key, value


@dataclass
class Progress:
    """Progress of an unfinished run, saved as JSON.

    Attributes:
        names: Names of the learned concepts, in learning order.
        just: Per concept, judge -> score right after learning.
        features: Per concept, the features of its pictures right after learning.
        seconds: Training time per concept.
        bytes: Size per concept.
        made_with: Steps, settings, base and numbers of pictures.
    """

    names: list[str]
    just: list[dict[str, float]]
    features: list[list[list[float]]]
    seconds: list[float]
    bytes: list[int]
    made_with: dict | None = None

    @staticmethod
    def load(path: Path, made_with: dict) -> Progress:
        """Reads a run's progress; empty if there is no file.

        Raises:
            ConceptError: An earlier version wrote the file, or it has other steps or settings.
        """
        if not path.exists():
            return Progress([], [], [], [], [], made_with)
        progress = Progress(**json.loads(path.read_text()))
        if not all(isinstance(scores, dict) for scores in progress.just):
            raise ConceptError(f"'{path}' was written by an earlier version; delete it to begin again")
        check_same(path, progress.made_with or made_with, made_with)
        progress.made_with = made_with
        return progress

    def save(self, path: Path) -> None:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(asdict(self))))


def check_same(path: Path, stored: dict, requested: dict) -> None:
    """Raises ConceptError if a file was made with other values than requested.

    Missing keys are accepted.
    """
    for key, value in requested.items():
        if stored.get(key, value) != value:
            raise ConceptError(f"'{path}' was made with {key} {stored[key]}, but {value} was requested; "
                               "delete it or choose another folder")
