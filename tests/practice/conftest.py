"""What people bring: odd photos, settings, files and prompts. Every test is named by its row."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from continual_concepts.core.cli.parser import main
from continual_concepts.core.demo import scenes
from continual_concepts.tests.quick import quick


@dataclass(frozen=True)
class Outcome:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one sentence of a refused command."""
        sentences = [line for line in self.err.splitlines() if line.startswith("continual-concepts")]
        assert self.code != 0 and len(sentences) == 1, (self.code, self.err)
        return sentences[0]


@pytest.fixture(autouse=True)
def quick_commands(quick_commands):
    """For all commands here."""


@pytest.fixture
def run(capsys):
    """run(*arguments): one command. Every exception but the end of a usage error fails the test."""
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:      # argparse ends this way
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Outcome(code, out, err)

    return call


@pytest.fixture
def learn(run, tmp_path):
    """learn(folder, *more): two steps of learning <rex> into `bank.safetensors`."""
    def call(folder: object, *more: object) -> Outcome:
        return run("learn", folder, "--bank", tmp_path / "bank.safetensors", "--name", "rex", "--noun", "dog",
                   "--steps", 2, "--batch-size", 2, "--base", "embedded-64", *more)

    return call


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with three photos of one individual and without captions: 0.png, 1.png, 2.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (picture, _) in enumerate(scenes.CONCEPTS["rex"].pictures(3, seed=1)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def _learned_bank(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    (folder / "photos").mkdir()
    for i, (picture, _) in enumerate(scenes.CONCEPTS["rex"].pictures(3, seed=1)):
        Image.fromarray(picture).save(folder / "photos" / f"{i}.png")
    file = folder / "bank.safetensors"
    with quick():
        assert main(["learn", str(folder / "photos"), "--bank", str(file), "--name", "rex", "--noun", "dog",
                     "--steps", "2", "--batch-size", "2", "--base", "embedded-64"]) == 0
    return file


@pytest.fixture
def learned(_learned_bank, tmp_path) -> Path:
    """A bank of its own with <rex> in it."""
    return Path(shutil.copy(_learned_bank, tmp_path / "learned.safetensors"))
