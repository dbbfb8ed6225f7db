"""`learn --if-known refine`: photos are added to a concept of the bank; bad input is one clear sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.cli.parser import main
from continual_concepts.core.demo import scenes
from continual_concepts.tests.quick import quick

QUICK = ["--steps", "2", "--batch-size", "2", "--replay", "2", "--base", "embedded-64"]


def drawn(folder: Path, seed: int) -> Path:
    """A folder with two photos of one individual without captions."""
    folder.mkdir()
    for i, (picture, _) in enumerate(scenes.CONCEPTS["rex"].pictures(2, seed=seed)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    file = folder / "bank.safetensors"
    for name, seed in (("rex", 1), ("mimi", 2)):
        photos, rank = drawn(folder / name, seed), ["--set", "rank=2"] if name == "rex" else []
        with quick():
            assert main(["learn", str(photos), "--bank", str(file), "--name", name, "--noun", "dog",
                         "--method", "bound", *rank, *QUICK]) == 0
    return file


@pytest.fixture
def bank_file(learned, tmp_path, capsys):
    capsys.readouterr()
    return Path(shutil.copy(learned, tmp_path))


@pytest.fixture
def new(tmp_path):
    return drawn(tmp_path / "new", 5)


def refine(photos, file, capsys, *arguments: str) -> tuple[int, dict]:
    code = main(["--json", "learn", str(photos), "--bank", str(file), "--if-known", "refine", *arguments,
                 *QUICK])
    return code, json.loads(capsys.readouterr().out)


def test_new_photos_are_added_and_the_earlier_version_stays(bank_file, new, capsys):
    """Noun, method, rank and words are the concept's own where they are not given."""
    before = open_bank(bank_file)
    rank, old = before["rex"].deltas[0, "to_q"].up.shape[1], before["rex"]
    code, facts = refine(new, bank_file, capsys, "--name", "rex")
    assert code == 0 and facts["learned"] and facts["concepts"] == ["rex", "mimi"]
    assert [(run["steps"], run["photos"]) for run in facts["refined"]] == [(2, 2)]
    after = open_bank(bank_file)["rex"]
    assert after.deltas[0, "to_q"].up.shape[1] == rank == 2
    assert (after.info.class_noun, after.info.words) == ("dog", old.info.words)
    assert len(after.info.provenance.images) == 4 and after.thumbnail
    assert not torch.equal(after.deltas[0, "to_q"].up, old.deltas[0, "to_q"].up)
    code, facts = refine(new, bank_file, capsys, "--name", "rex")
    assert code == 0 and not facts["learned"]      # these photos are known now
    (new / "1.png").unlink()
    Image.new("RGB", (64, 64), (0, 0, 200)).save(new / "2.png")
    code, facts = refine(new, bank_file, capsys, "--name", "rex")
    assert any("1 of these 2 photos already" in warning for warning in facts["warnings"])
    assert [run["photos"] for run in facts["refined"]] == [2, 4]
    assert main(["bank", "restore", str(bank_file), "--version", "2"]) == 0
    assert torch.equal(open_bank(bank_file)["rex"].deltas[0, "to_q"].up, old.deltas[0, "to_q"].up)


@pytest.mark.parametrize("arguments, message", [
    (["--name", "fido"], "no concept 'fido' that could be refined; it holds rex, mimi"),
    (["--name", "rex", "--noun", "cat"], "class noun of concept 'rex' is 'dog', now 'cat' is given"),
    (["--name", "rex", "--kind", "style"], "kind of concept 'rex' is 'object', now 'style'"),
    (["--name", "rex", "--method", "lora"], "method of concept 'rex' is 'bound', now 'lora'"),
    (["--name", "rex", "--words", "a,b"], "words of concept 'rex' is 'rex-1,rex-2'"),
    (["--name", "rex", "--set", "rank=3"], "the rank, slots, layers and projections that it was learned")])
def test_bad_input_is_one_sentence_and_the_bank_stays(bank_file, new, capsys, arguments, message):
    content = bank_file.read_bytes()
    code, facts = refine(new, bank_file, capsys, *arguments)
    assert code == 1 and message in facts["error"] and bank_file.read_bytes() == content


def test_nothing_can_be_refined_without_a_bank(new, tmp_path, capsys):
    code, facts = refine(new, tmp_path / "none.safetensors", capsys, "--name", "rex")
    assert code == 1 and "it holds none; learn it first" in facts["error"]
    assert not (tmp_path / "none.safetensors").exists()
