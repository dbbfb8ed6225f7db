"""The benchmark `continual`: one sentence for bad input before anything is loaded, and short runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import chart
from continual_concepts.benchmarks.continual import embedded as continual
from continual_concepts.benchmarks.continual.concepts import TEN
from continual_concepts.benchmarks.continual.runs import BASE
from continual_concepts.core import methods
from continual_concepts.core.demo import judges as drawn
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.demo.bases import file_of

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture
def command(tmp_path):
    """command(...): runs the benchmark with these arguments; the result goes to `tmp_path`."""
    return lambda *arguments: main(["continual", "--json", str(tmp_path / "c.json"), *arguments])


@pytest.fixture(scope="module")
def loaded():
    return load_base(file_of(BASE))


def empty_chart(path, result):
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def quick(monkeypatch, loaded):
    """One sampling step, few pictures, empty charts, and a base that is loaded once."""
    monkeypatch.setattr(chart, "draw", empty_chart)
    monkeypatch.setattr(continual, "load_base", lambda _: loaded)
    monkeypatch.setattr(continual, "SETTINGS", replace(continual.SETTINGS, steps=1))
    monkeypatch.setattr(drawn, "HELD_OUT_PICTURES", 4)
    monkeypatch.setattr(continual, "SEEDS", (1, 2))
    monkeypatch.setattr(continual, "GROUP_SEEDS", (3,))
    monkeypatch.setattr(continual, "PAIR_SEEDS", (3,))


def sentence(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("continual_concepts.benchmarks: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--methods", "bound,nonsense"], "unknown method 'nonsense'; known: bound, ccdm"),
    (["--tasks", "0"], "tasks is 0; allowed: 1 or more"),
    (["--seeds", "-1"], "seeds is -1; allowed: 1 or more"),
    (["--orders", "0"], "orders is 0; allowed: 1 or more"),
    (["--steps", "0"], "steps is 0; allowed: 1 or more"),
    (["--seed", "1,x"], "seed is '1,x'; allowed: numbers of 0 or more, separated by commas"),
    (["--order", "-1"], "order is '-1'; allowed: numbers of 0 or more"),
    (["--seed", "1", "--seeds", "2"], "--seed and --order name runs, --seeds and --orders count them"),
])
def test_bad_input_is_named_before_the_base_is_read(command, capsys, tmp_path, monkeypatch, arguments,
                                                    expected):
    monkeypatch.setattr(continual, "load_base", None)
    assert command(*arguments) == 1 and expected in sentence(capsys)
    assert not list(tmp_path.iterdir())


def test_the_result_has_a_place(capsys):
    with pytest.raises(SystemExit):
        main(["continual", "--tasks", "1"])
    assert "--json" in capsys.readouterr().err


def test_runs_their_files_and_the_summary_of_finished_ones(command, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "DEFAULT", "bound")      # after one step, slots have hardly learned anything
    short = ["--tasks", "2", "--seed", "4,6", "--order", "1", "--steps", "1"]
    assert command(*short, "--methods", "bound, ewc") == 0
    shown = capsys.readouterr()
    starts = [line.split(" |")[0] for line in shown.out.splitlines()]
    assert {"| ewc", "| **bound**", "| *class nouns*"} <= set(starts)
    assert "ewc-n2-o1-s4: learned <rex>" in shown.err
    result = json.loads((tmp_path / "c.json").read_text())
    assert set(result["methods"]) == {"bound", "ewc"}
    facts = {"tasks": 2, "seeds": [4, 6], "orders": [1], "default": "bound"}
    assert {name: result[name] for name in facts} == facts
    assert result["methods"]["bound"]["base_change"] == 0 < result["methods"]["ewc"]["base_change"]
    assert result["methods"]["bound"]["runs"] == [[1, 4], [1, 6]]
    assert result["methods"]["bound"]["retained"] == pytest.approx(1)
    assert set(result["methods"]["bound"]["judges"]) == {"template"}
    assert result["floor"]["alone"]["cosine"] < result["ceiling"]["alone"]["cosine"]
    folder = tmp_path / "c.cells"
    run = json.loads((folder / "bound-n2-o1-s4.json").read_text())
    assert run["concepts"] == [TEN[1], TEN[0]] and run["steps"] == 1 and run["pictures"] == 2
    assert not list(folder.glob(".*"))      # no locks are left
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"

    (tmp_path / "c.json").unlink()
    page = tmp_path / "page.md"
    page.write_text("<!-- continual:readme -->\n<!-- /continual:readme -->\n")
    assert command("--tasks", "2", "--merge", "--write", str(page)) == 0
    assert json.loads((tmp_path / "c.json").read_text()) == result and "| **bound** |" in page.read_text()
    assert "learned" not in capsys.readouterr().err

    # other steps than the finished run
    assert command(*short[:-1], "3", "--methods", "ewc") == 1
    assert "steps 1" in sentence(capsys)
    (folder / "ewc-n2-o1-s4.json").write_text("{")
    assert command("--tasks", "2",
                   "--merge") == 1 and "ewc-n2-o1-s4.json' is not a readable run" in sentence(capsys)
    (folder / "ewc-n2-o1-s4.json").write_text("[]")
    assert command("--tasks", "2", "--merge") == 1 and "not a finished run" in sentence(capsys)
    (folder / "ewc-n2-o1-s4.json").unlink()
    (folder / "levels-n2.json").unlink()
    assert command("--tasks", "2", "--merge") == 1 and "levels-n2.json' is missing" in sentence(capsys)


def test_runs_of_an_earlier_version_are_refused_in_one_sentence(command, tmp_path, capsys):
    earlier = {"method": "bound", "tasks": 10, "order": 0, "seed": 0, "alone": False,
               "image_alignment": [0.7]}
    (tmp_path / "c.cells").mkdir()
    (tmp_path / "c.cells" / "bound-n10-o0-s0.json").write_text(json.dumps(earlier))
    assert command("--merge") == 1
    assert "holds only runs of an earlier version" in sentence(capsys)
    assert not (tmp_path / "c.json").exists()


def test_nothing_to_summarise(command, quick, capsys, tmp_path):
    assert command("--tasks", "1", "--merge") == 1
    assert "c.cells' holds no finished run of 1 task\n" in sentence(capsys)
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("flag", ["--runs", "--cells"])
def test_the_folder_of_runs_can_be_named(command, quick, tmp_path, capsys, flag):
    (tmp_path / "elsewhere").mkdir()
    assert command("--tasks", "1", "--merge", flag, str(tmp_path / "elsewhere")) == 1
    assert "elsewhere' holds no finished run of 1 task\n" in sentence(capsys)


def test_an_override_is_a_row_of_its_own(command, quick, tmp_path):
    assert command("--tasks", "1", "--seeds", "1", "--steps", "1", "--methods",
                   "bound,bound+apart=false+rank=2") == 0
    runs = {path.name: json.loads(path.read_text()) for path in (tmp_path / "c.cells").glob("*-s0.json")}
    assert set(runs) == {"bound-n1-o0-s0.json", "bound+apart=false+rank=2-n1-o0-s0.json"}
    changed = runs["bound+apart=false+rank=2-n1-o0-s0.json"]["settings"]
    assert changed["apart"] is False and changed["rank"] == 2
    methods = json.loads((tmp_path / "c.json").read_text())["methods"]
    assert set(methods) == {"bound", "bound+apart=false+rank=2"}


def test_an_override_without_a_value_is_refused(command, quick, capsys):
    assert command("--tasks", "1", "--seeds", "1", "--steps", "1", "--methods", "bound+apart") == 1
    assert "override 'apart' is not of the form key=value" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_runs(tmp_path, installed):
    """Each run is performed once, and the summary is that of one process."""
    results = {}
    for processes in (1, 2):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                 str(processes)] if processes > 1 else []
        arguments = ["--json", tmp_path / f"{processes}.json", "--tasks", 1, "--seeds", 1, "--steps", 1,
                     "--methods", "bound,textual_inversion"]
        done = subprocess.run([sys.executable, "-I", *start, "-m", "continual_concepts.benchmarks",
                               "continual", *map(str, arguments)],
                              capture_output=True, text=True, timeout=900, check=False, env=os.environ
                              | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        assert all(done.stderr.count(f"{method}-n1-o0-s0: learned <rex>") == 1
                   for method in ("bound", "textual_inversion"))
        results[processes] = json.loads((tmp_path / f"{processes}.json").read_text())
    for result in results.values():
        for row in result["methods"].values():      # how long it took is all that may differ
            for name in [name for name in row if "seconds" in name]:
                del row[name]
    assert results[1] == results[2]
