"""Configurations that describe their fields: what the description says holds for the configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS
from continual_concepts.core.settings import Setting, setting, settings_of
from continual_concepts.core.training.config import TrainingConfig

CONFIGS = {"training": TrainingConfig, **{name: entry.config for name, entry in METHODS.items()}}
DESCRIBED = [(name, entry) for name, config in CONFIGS.items() for entry in settings_of(config).values()]


def test_a_description_belongs_to_its_field():
    @dataclass(frozen=True)
    class Config:
        rank: int = setting(4, "Rank.", 1, 128)
        plain: str = "x"
        mode: str = setting("a", "Mode.", choices=["a", "b"])

    assert Config() == Config(4, "x", "a")
    rank = Setting("rank", 4, "Rank.", 1, 128, None, ())
    mode = Setting("mode", "a", "Mode.", None, None, None, ("a", "b"))
    assert list(settings_of(Config).values()) == [rank, mode]


def test_training_describes_all_its_fields():
    assert list(settings_of(TrainingConfig)) == [field.name for field in fields(TrainingConfig)]


@pytest.mark.parametrize(("owner", "entry"), DESCRIBED, ids=lambda value: getattr(value, "name", value))
def test_what_is_offered_is_accepted(owner, entry):
    """Default, both ends of the range and every choice.

    The default is within the range, and the help is a sentence.
    """
    config = CONFIGS[owner]
    offered = [value for value in (entry.default, entry.low, entry.high, *entry.choices) if value is not None]
    needed = {"look_every": 1} if entry.name == "patience" else {}
    for value in offered:
        assert getattr(config(**needed | {entry.name: value}), entry.name) == value
    assert entry.help.endswith(".") and (entry.low is None or entry.low <= entry.default <= entry.high)
    assert not entry.choices or entry.default in entry.choices


@pytest.mark.parametrize(("owner", "entry"), [(owner, entry) for owner, entry in DESCRIBED if entry.choices
                                              and entry.name != "framing"],
                         ids=lambda value: getattr(value, "name", value))
def test_other_words_than_the_choices_are_refused(owner, entry):
    with pytest.raises(ConceptError, match=entry.name):
        CONFIGS[owner](**{entry.name: "no such word"})


NOT_OF_THE_TYPE = {"bool": ("yes", None, [1], 0.5), "int": ("4", None, [1], 4.5), "float": ("4", None, [1]),
                   "str": (1, None, [1])}


@pytest.mark.parametrize("owner", CONFIGS)
def test_values_of_another_type_are_refused_with_one_sentence(owner):
    """A command line gives whatever JSON holds (`--set rank=4.5`)."""
    for entry in fields(CONFIGS[owner]):
        for value in NOT_OF_THE_TYPE[str(entry.type)]:
            with pytest.raises(ConceptError, match=f"setting '{entry.name}' is "):
                CONFIGS[owner](**{entry.name: value})


def test_a_batch_has_a_largest_size():
    """Lists of a thousand million captions would fill the memory before PyTorch could refuse."""
    with pytest.raises(ConceptError, match="'batch_size' is 1000000000; allowed: 1 to 4096"):
        TrainingConfig(batch_size=10**9)
