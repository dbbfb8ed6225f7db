"""Photos of one individual, and a bank that learned it, for the tests of the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from continual_concepts.core.cli.parser import main
from continual_concepts.core.demo import scenes
from continual_concepts.tests.quick import quick

QUICK = ["--steps", "2", "--batch-size", "2", "--base", "embedded-64"]      # the smaller base is quicker


@pytest.fixture(autouse=True)
def quick_commands(quick_commands):
    """For all commands here."""


def draw_photos_into(folder: Path) -> Path:
    folder.mkdir()
    for i, (picture, caption) in enumerate(scenes.CONCEPTS["rex"].pictures(3, seed=1)):
        Image.fromarray(picture).save(folder / f"{i}.png")
        if i:
            (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Three pictures of one individual, two of them with captions."""
    return draw_photos_into(tmp_path / "photos")


@pytest.fixture(scope="session")
def learned_bank(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    file = folder / "bank.safetensors"
    asked = ["learn", str(draw_photos_into(folder / "photos")), "--bank", str(file), "--name", "rex"]
    with quick():
        assert main([*asked, "--noun", "dog", *QUICK]) == 0
    return file


@pytest.fixture
def bank_file(tmp_path, learned_bank, capsys):
    """A bank with <rex>, learned from pictures like those of `photos`."""
    capsys.readouterr()
    return Path(shutil.copy(learned_bank, tmp_path / "bank.safetensors"))
