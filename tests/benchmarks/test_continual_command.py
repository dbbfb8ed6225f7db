"""`python -m continual_concepts.benchmarks continual`: one sentence for bad input before anything is loaded, and a short run end to end."""

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
from continual_concepts.core.demo import base


@pytest.fixture
def bench(tmp_path):
    """bench(...): runs the command with these arguments, the result in `tmp_path`."""
    return lambda *arguments: main(["continual", "--json", str(tmp_path / "c.json"), *arguments])


@pytest.fixture
def quick(monkeypatch):
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
def test_bad_input_is_named_before_the_base_is_read(bench, capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.setattr(base, "load_base", None)
    assert bench(*arguments) == 1 and expected in sentence(capsys)
    assert not list(tmp_path.iterdir())


def test_the_result_has_a_place(capsys):
    with pytest.raises(SystemExit):
        main(["continual", "--tasks", "1"])
    assert "--json" in capsys.readouterr().err


def test_a_run_its_files_and_putting_them_together_again(bench, quick, tmp_path, capsys):
    short = ["--tasks", "2", "--seeds", "1", "--steps", "1"]
    assert bench(*short, "--methods", "bound, ewc") == 0
    shown = capsys.readouterr()
    assert "| ewc |" in shown.out and "| **bound** |" in shown.out and "ewc-n2-o0-s0: learned <quack>" in shown.err
    result = json.loads((tmp_path / "c.json").read_text())
    assert set(result["methods"]) == {"bound", "ewc"} and (result["tasks"], result["steps"], result["default"]) == (2, 1, "bound")
    assert result["methods"]["bound"]["base_drift"] == 0 < result["methods"]["ewc"]["base_drift"]
    assert set(result["untrained"]) >= {"image_alignment", "text_alignment", "real_pictures"}
    cells = tmp_path / "c.cells"
    assert json.loads((cells / "bound-n2-o0-s0.json").read_text())["concepts"] == list(TEN[:2])
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"

    (tmp_path / "c.json").unlink()
    assert bench("--tasks", "2", "--merge") == 0
    assert json.loads((tmp_path / "c.json").read_text()) == result and "learned" not in capsys.readouterr().err

    assert bench("--tasks", "2", "--seeds", "1", "--steps", "3", "--methods", "ewc") == 1      # other steps than the finished cell
    assert "steps 1" in sentence(capsys)
    (cells / "ewc-n2-o0-s0.json").write_text("{")
    assert bench("--tasks", "2", "--merge") == 1 and "ewc-n2-o0-s0.json' is not a readable cell" in sentence(capsys)
    (cells / "ewc-n2-o0-s0.json").write_text("[]")
    assert bench("--tasks", "2", "--merge") == 1 and "not a finished cell" in sentence(capsys)


def test_nothing_to_put_together(bench, quick, capsys, tmp_path):
    assert bench("--tasks", "1", "--merge") == 1
    assert "c.cells' holds no finished cell of 1 tasks" in sentence(capsys) and not (tmp_path / "c.json").exists()


def test_a_variant_is_a_row_of_its_own(bench, quick, tmp_path):
    assert bench("--tasks", "1", "--seeds", "1", "--steps", "1", "--methods", "bound,bound+apart=false+rank=2") == 0
    cells = {path.name: json.loads(path.read_text()) for path in (tmp_path / "c.cells").glob("*.json")}
    assert set(cells) == {"bound-n1-o0-s0.json", "bound+apart=false+rank=2-n1-o0-s0.json"}
    changed = cells["bound+apart=false+rank=2-n1-o0-s0.json"]["settings"]
    assert changed["apart"] is False and changed["rank"] == 2
    assert set(json.loads((tmp_path / "c.json").read_text())["methods"]) == {"bound", "bound+apart=false+rank=2"}


def test_a_variant_without_a_value_is_refused(bench, quick, capsys):
    assert bench("--tasks", "1", "--seeds", "1", "--steps", "1", "--methods", "bound+apart") == 1
    assert "variant 'apart' is not of the form key=value" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_cells(tmp_path, installed):
    """Every cell is somebody's, once, and what is put together is what one process finds."""
    found = {}
    for processes in (1, 2):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
        wish = ["--json", tmp_path / f"{processes}.json", "--tasks", 1, "--seeds", 1, "--steps", 1, "--methods", "bound,textual_inversion"]
        done = subprocess.run([sys.executable, "-I", *start, "-m", "continual_concepts.benchmarks", "continual", *map(str, wish)],
                              capture_output=True, text=True, timeout=900, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        assert all(done.stderr.count(f"{method}-n1-o0-s0: learned <rex>") == 1 for method in ("bound", "textual_inversion"))
        found[processes] = json.loads((tmp_path / f"{processes}.json").read_text())
    for result in found.values():
        for row in result["methods"].values():      # how long it took is all that may differ
            for name in [name for name in row if "seconds" in name]:
                del row[name]
    assert found[1] == found[2]
