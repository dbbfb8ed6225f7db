"""The benchmark `gpu`, rehearsed on the processor with narrow models."""

from __future__ import annotations

import json

import pytest

from continual_concepts.benchmarks.__main__ import main


@pytest.fixture
def parts(comfyui):
    pytest.importorskip("comfy.ldm.anima.model", reason="this ComfyUI has no Anima")
    from continual_concepts.benchmarks.gpu import parts

    return parts


def test_a_base_of_eight_bits_is_learned_on(parts):
    setup = parts.setups(small=True)["anima, float8"]
    row = parts.learning(setup, 1)
    assert row["slots"]["steps_per_second"] > 0 and row["slots"]["planned_gb"] > 0
    assert row["peft"] is None or row["peft"]["steps_per_second"] > 0
    assert setup.base == "float8_e4m3fn" and row["pixels"] == 64


def test_heads_of_every_width_are_measured(parts):
    rows = parts.heads(rounds=1, small=True)
    assert set(rows) == set(parts.HEADS)
    for widths in rows.values():
        assert list(widths) == [str(more) for more in parts.WIDER] and widths["0"]["over_plain"] == 1.0


@pytest.mark.slow
def test_the_whole_command(parts, comfyui, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    short = ["--small", "--steps", "1", "--rounds", "1", "--minutes", "60"]
    assert main(["gpu", "--json", str(file), "--comfyui", str(comfyui), *short]) == 0, capsys.readouterr().err
    result = json.loads(file.read_text())
    assert list(result["parts"]) == ["sd15", "regions", "heads", "sdxl", "anima, bfloat16", "anima, float8"]
    assert result["left"] == [] and result["failed"] == {}
