"""The benchmark `continual`: one sentence for bad input before anything is loaded, and short runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import embedded as continual
from continual_concepts.benchmarks.continual.concepts import TEN
from continual_concepts.core.demo.base import load_base


@pytest.fixture
def command(tmp_path):
    """command(...): runs the benchmark with these arguments; the result goes to `tmp_path`."""
    return lambda *arguments: main(["continual", "--json", str(tmp_path / "c.json"), *arguments])


@pytest.fixture(scope="module")
def loaded():
    return load_base()


@pytest.fixture
def quick(monkeypatch, loaded):
    """One sampling step, few pictures, and a base that is loaded once."""
    monkeypatch.setattr(continual, "load_base", lambda: loaded)
    monkeypatch.setattr(continual, "SETTINGS", replace(continual.SETTINGS, steps=1))
    monkeypatch.setattr(continual, "SEEDS", (1, 2))
    monkeypatch.setattr(continual, "GROUP_SEEDS", (3,))


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


def test_runs_their_files_and_the_summary_of_finished_ones(command, quick, tmp_path, capsys):
    short = ["--tasks", "2", "--seeds", "1", "--steps", "1"]
    assert command(*short, "--methods", "bound, ewc") == 0
    shown = capsys.readouterr()
    assert "| ewc |" in shown.out and "| **bound** |" in shown.out
    assert "ewc-n2-o0-s0: learned <quack>" in shown.err
    result = json.loads((tmp_path / "c.json").read_text())
    assert set(result["methods"]) == {"bound", "ewc"}
    assert (result["tasks"], result["steps"], result["default"]) == (2, 1, "bound")
    assert result["methods"]["bound"]["base_drift"] == 0 < result["methods"]["ewc"]["base_drift"]
    assert set(result["untrained"]) >= {"image_alignment", "text_alignment", "real_pictures"}
    folder = tmp_path / "c.cells"
    assert json.loads((folder / "bound-n2-o0-s0.json").read_text())["concepts"] == list(TEN[:2])
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"

    (tmp_path / "c.json").unlink()
    assert command("--tasks", "2", "--merge") == 0
    assert json.loads((tmp_path / "c.json").read_text()) == result
    assert "learned" not in capsys.readouterr().err

    # other steps than the finished run
    assert command("--tasks", "2", "--seeds", "1", "--steps", "3", "--methods", "ewc") == 1
    assert "steps 1" in sentence(capsys)
    (folder / "ewc-n2-o0-s0.json").write_text("{")
    assert command("--tasks", "2",
                   "--merge") == 1 and "ewc-n2-o0-s0.json' is not a readable run" in sentence(capsys)
    (folder / "ewc-n2-o0-s0.json").write_text("[]")
    assert command("--tasks", "2", "--merge") == 1 and "not a finished run" in sentence(capsys)


def test_nothing_to_summarise(command, quick, capsys, tmp_path):
    assert command("--tasks", "1", "--merge") == 1
    assert "c.cells' holds no finished run of 1 tasks" in sentence(capsys)
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("flag", ["--runs", "--cells"])
def test_the_folder_of_runs_can_be_named(command, quick, tmp_path, capsys, flag):
    (tmp_path / "elsewhere").mkdir()
    assert command("--tasks", "1", "--merge", flag, str(tmp_path / "elsewhere")) == 1
    assert "elsewhere' holds no finished run of 1 tasks" in sentence(capsys)


def test_an_override_is_a_row_of_its_own(command, quick, tmp_path):
    assert command("--tasks", "1", "--seeds", "1", "--steps", "1", "--methods",
                   "bound,bound+apart=false+rank=2") == 0
    runs = {path.name: json.loads(path.read_text()) for path in (tmp_path / "c.cells").glob("*.json")}
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
