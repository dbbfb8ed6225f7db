"""The demo end to end at two steps per task and one per picture: the report has what it promises.

Its quality is the full command's business.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.cli import commands, demo, demo_ways
from continual_concepts.core.cli.parser import build_parser
from continual_concepts.core.demo import bases
from continual_concepts.core.demo.judges import SceneEncoder, assignment, to_tensor
from continual_concepts.core.demo.render import render
from continual_concepts.core.demo.scenes import CONCEPTS, random_scene
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation import metrics

ROOT = Path(__file__).resolve().parents[2]
QUICK = demo_ways.Plan("embedded-64", steps=2, sampler_steps=1, alone=1, together=2)


@pytest.fixture
def single_pictures(monkeypatch):
    """Learning takes one picture a step, for tests whose jobs run in this process."""
    usual = demo_ways.Plan.training.fget
    monkeypatch.setattr(demo_ways.Plan, "training",
                        property(lambda plan: replace(usual(plan), batch_size=1, flip=False)))


def test_the_report_holds_three_ways_that_learned_the_same(tmp_path, single_pictures):
    demo.run(tmp_path, QUICK, workers=1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["ways"]) == set(demo_ways.WAYS) and report["seconds"] > 0
    for figures in report["ways"].values():
        assert len(figures["gap_closed"]) == len(figures["first_concept"]) == 3 and figures["seconds"] > 0
        assert 0 <= figures["confused"] <= 1 and 0 <= figures["boxes_right"] <= 1
    assert report["ways"]["ours"]["retained"] == 1 != report["ways"]["sequence"]["retained"]
    assert Image.open(tmp_path / "report.png").width > 1000
    for task in QUICK.tasks:      # for the command learn
        written = to_tensor([np.asarray(Image.open(tmp_path / demo.PHOTOS / task.name / f"{number}.png"))
                             for number in range(1, len(task.references) + 1)])
        assert (written - task.references).abs().max() < 0.01
    assert open_bank(tmp_path / "bank.safetensors").names == list(demo_ways.TASKS)


def test_photos_that_are_there_are_kept_and_told(tmp_path):
    """Those of another base were kept without a word, and `learn` took them for this one's."""
    tasks = QUICK.tasks[:2]
    assert demo._save_photos(tmp_path, tasks) == [] == demo._save_photos(tmp_path, tasks)
    photo, loop = tmp_path / tasks[0].name / "1.png", tmp_path / tasks[1].name / "2.png"
    photo.write_bytes(b"mine")
    loop.unlink()
    loop.symlink_to(loop)
    (note,) = demo._save_photos(tmp_path, tasks)
    assert note.startswith("kept 2 files in ") and photo.read_bytes() == b"mine"
    Image.open(tmp_path / tasks[0].name / "2.png").resize((64, 63)).save(photo)
    assert demo._save_photos(tmp_path, tasks[:1])


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, NotImplementedError, MemoryError])
def test_a_file_that_pillow_cannot_read_is_no_photo_of_the_demo(tmp_path, monkeypatch, error):
    """Damaged files of its many forms raise errors of many kinds."""
    def fails(_):
        raise error

    monkeypatch.setattr(demo.Image, "open", fails)
    assert not demo._shows(tmp_path / "1.png", Image.new("RGB", (8, 8)))


def test_a_bank_with_other_concepts_is_not_replaced(tmp_path, make_concept, layout):
    """What a person had learned into the demo's bank was gone without a word."""
    tasks = [task.name for task in QUICK.tasks]
    bank = ConceptBank(layout).add(make_concept(layout, tasks[0])).add(make_concept(layout, "luna"))
    save_bank(bank, tmp_path / demo.BANK)
    with pytest.raises(ConceptError, match="holds <luna>, which the demo would remove; choose another"):
        demo._check(tmp_path, QUICK)
    save_bank(bank.remove("luna"), tmp_path / demo.BANK)
    demo._check(tmp_path, QUICK)


@pytest.mark.slow
def test_it_runs_on_a_transformer(tmp_path, monkeypatch, transformer_base):
    """Also at that base's size of pictures."""
    monkeypatch.setitem(bases.TRANSFORMERS, "embedded-dit", transformer_base)
    plan = replace(QUICK, base="embedded-dit", steps=1, sampler_steps=1)
    report = demo.run(tmp_path, plan, workers=1)
    assert report["base"] == "embedded-dit" and report["ways"]["ours"]["retained"] == pytest.approx(1)
    site = open_bank(tmp_path / "bank.safetensors").layout.sites[0]
    assert site.name == "blocks.0.cross_attn"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("base", ["dit", "embedded-dit"])
def test_make_takes_the_short_and_the_whole_name_of_a_base(base):
    asked = ["make", "--dry-run", "demo", f"BASE={base}", f"PYTHON={sys.executable}"]
    # `make test` hands its own flags on, with which an inner make prints more
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    ran = subprocess.run(asked, cwd=ROOT, env=outer, capture_output=True, text=True, check=True)
    assert ran.stdout.strip().endswith("continual-concepts demo --output demo --base embedded-dit")


@pytest.mark.parametrize(("program", "shown"), [
    (".venv/bin/continual-concepts", ".venv/bin/continual-concepts"), ("pytest", "continual-concepts"),
    ("/my tools/continual-concepts.exe", "'/my tools/continual-concepts.exe'"),
    ("core/__main__.py", f"{shlex.quote(sys.executable)} -m continual_concepts.core")])
def test_what_to_try_next_is_a_command_that_runs(monkeypatch, program, shown):
    figures = {"retained": 1.0, "pair_closed": 0.5, "boxes_right": 1.0}
    report = {"concepts": ["rex"], "seconds": 1.0, "ways": dict.fromkeys(demo_ways.WAYS, figures)}
    monkeypatch.setattr(demo, "run", lambda *_, **__: report)
    monkeypatch.setattr(sys, "argv", [program])
    *_, line = commands.demo(Namespace(base="embedded", output=Path("my demo")))[1]
    assert line == (f'draw with the bank: {shown} sample "a photo of <rex> on a beach" --bank '
                    "'my demo/bank.safetensors' --output pictures")


@pytest.mark.parametrize(("text", "shown"), [
    ("demo\\bank.safetensors", "demo\\bank.safetensors"), ("a&b\\bank", '"a&b\\bank"'),
    ("my demo\\bank", '"my demo\\bank"')])
def test_a_command_is_quoted_as_windows_reads_it(monkeypatch, text, shown):
    monkeypatch.setattr(commands, "os", SimpleNamespace(name="nt"))
    assert commands._quoted(text) == shown


def test_it_is_not_offered_on_a_base_whose_words_are_class_nouns(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["demo", "--base", "embedded-joint"])
    assert "embedded-dit" in capsys.readouterr().err


IN_TWO = """
import sys
from pathlib import Path
from continual_concepts.core.cli import demo, demo_ways

if __name__ == "__main__":
    plan = demo_ways.Plan("embedded-64", steps=2, sampler_steps=1, alone=1, together=2)
    demo.run(Path(sys.argv[1]), plan, 2)
"""


@pytest.mark.slow
def test_processes_give_the_same_report(tmp_path, installed):
    """Two processes belong to a fresh one: PyTorch's threads of earlier tests forbid forks that learn."""
    one, script, two = demo.run(tmp_path / "one", QUICK, 1), tmp_path / "two.py", tmp_path / "two"
    script.write_text(IN_TWO)
    done = subprocess.run([sys.executable, "-I", script, two], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    two = json.loads((two / "report.json").read_text())
    for way in demo_ways.WAYS:
        for figure in ("gap_closed", "first_concept", "retained", "pair_closed", "boxes_right"):
            assert one["ways"][way][figure] == pytest.approx(two["ways"][way][figure], abs=1e-4)


def test_separate_concepts_are_learned_as_one_after_another(tmp_path, single_pictures):
    """A concept that is stored by itself does not depend on the bank, so its jobs can run side by side."""
    apart, together = tmp_path / "apart", tmp_path / "together"
    for folder, parts in ((apart, (["rex"], ["fido"])), (together, (["rex", "fido"],))):
        folder.mkdir()
        for names in parts:
            demo_ways.learn_job(QUICK, "ours", names, folder)
    one, other = (open_bank(folder / "ours-fido.safetensors")["fido"] for folder in (apart, together))
    assert all(torch.equal(one.deltas[key].value, other.deltas[key].value) for key in one.deltas)


def test_what_two_ways_learn_alike_is_learned_once(tmp_path, single_pictures):
    for (way, name), owner in demo_ways.ALIKE.items():
        for each in (way, owner):
            demo_ways.learn_job(QUICK, each, [name], tmp_path)
        one, other = (open_bank(tmp_path / f"{each}-{name}.safetensors")[name] for each in (way, owner))
        other = demo_ways.as_of(demo_ways.WAYS[way].method, other)
        assert one.info.composes == other.info.composes and one.info.method == other.info.method
        assert one.deltas.keys() == other.deltas.keys()
        for key, delta in one.deltas.items():
            assert torch.equal(delta.up, other.deltas[key].up)
            assert torch.equal(delta.down, other.deltas[key].down)
        assert one.tokens.words == other.tokens.words
        for encoder, vectors in one.tokens.vectors.items():
            assert torch.equal(vectors, other.tokens.vectors[encoder])
        assert [name] not in demo_ways.parts_of(way) and demo_ways.users_of(owner, [name])[way] == [name]


def drawn_side_by_side(*order):
    rng = random.Random(6)
    things = [CONCEPTS[name].thing for name in order]
    return to_tensor([render(random_scene(rng, tuple(things), "photo")) for _ in range(12)])


def test_places_tell_right_from_wrong():
    """Real pictures of two individuals side by side; swapped; the same individual twice."""
    tasks, encoder = [assignment("rex"), assignment("mimi")], SceneEncoder()
    right, swapped, same = (demo.place_scores(drawn_side_by_side(*order), tasks, encoder)
                            for order in (("rex", "mimi"), ("mimi", "rex"), ("rex", "rex")))
    levels = [0.4, 0.4]
    assert demo.boxes_right(right, levels) >= 0.85 and demo.boxes_right(swapped, levels) <= 0.2
    whole = demo.Levels([0.1, 0.1], [0.9, 0.9])
    assert demo.pair_closed(right, whole) == pytest.approx(demo.pair_closed(swapped, whole), abs=0.1)
    assert demo.pair_closed(right, whole) > demo.pair_closed(same, whole) + 0.1


def test_retention_and_gap_follow_their_definitions():
    alignment = [[0.8], [0.6, 0.9], [0.4, 0.9, 0.5]]
    assert metrics.retention(alignment) == pytest.approx([0.5, 1.0, 1.0])
    assert metrics.forgetting(alignment) == pytest.approx([0.4, 0.0, 0.0])
    assert metrics.gap_closed(0.7, 0.2, 0.9) == pytest.approx(5 / 7)


def test_held_out_pictures_are_not_training_pictures():
    task = assignment("mimi")
    same = (task.held_out.unsqueeze(1) - task.references.unsqueeze(0)).abs().amax((2, 3, 4)) == 0
    assert not same.any() and len(task.pictures) == 5
