"""The demo end to end at two steps per task: the report has what it promises.

Its quality is the full command's business.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from PIL import Image

from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.cli import demo
from continual_concepts.core.demo import bases
from continual_concepts.core.demo.judges import SceneEncoder, assignment, to_tensor
from continual_concepts.core.demo.render import render
from continual_concepts.core.demo.scenes import CONCEPTS, random_scene
from continual_concepts.core.evaluation import metrics
from continual_concepts.core.regional.regions import Region


def test_the_report_holds_both_methods_and_the_composition(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAINING", replace(demo.TRAINING, steps=2, batch_size=1, warmup=0))
    monkeypatch.setattr(demo, "SETTINGS", replace(demo.SETTINGS, steps=2))
    monkeypatch.setattr(demo, "SEEDS", (1, 2, 3, 4, 5))
    demo.run(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["methods"]) == {"cidm", "finetune"}
    for result in report["methods"].values():
        assert [len(row) for row in result["image_alignment"]] == [1, 2, 3]
        assert len(result["text_alignment"]) == 3
        assert result["retention"] > 0 and len(result["gap_closed"]) == 3
    assert 0 <= report["composition"]["region_hits"] <= 1 and report["seconds"] > 0
    assert report["methods"]["cidm"]["retention_per_concept"] == pytest.approx([1, 1, 1])
    assert Image.open(tmp_path / "report.png").width > 1000
    assert open_bank(tmp_path / "bank.safetensors").names == list(demo.TASKS)


@pytest.mark.slow
def test_it_runs_on_a_transformer(tmp_path, monkeypatch, transformer_base):
    """Also at that base's size of pictures."""
    monkeypatch.setitem(bases.TRANSFORMERS, "embedded-dit", transformer_base)
    monkeypatch.setattr(demo, "TRAINING", replace(demo.TRAINING, steps=1, batch_size=1, warmup=0))
    monkeypatch.setattr(demo, "SETTINGS", replace(demo.SETTINGS, steps=1))
    monkeypatch.setattr(demo, "SEEDS", (1, 2, 3, 4, 5))
    report = demo.run(tmp_path, "embedded-dit")
    assert report["base"] == "embedded-dit" and report["methods"]["cidm"]["retention"] == pytest.approx(1)
    site = open_bank(tmp_path / "bank.safetensors").layout.sites[0]
    assert site.name == "blocks.0.cross_attn"


def test_region_hits_tell_right_from_wrong_places():
    """Real pictures of the two individuals side by side: both regions hit; swapped: none does."""
    tasks, encoder, rng = [assignment("rex"), assignment("mimi")], SceneEncoder(), random.Random(6)
    things = [CONCEPTS[name].thing for name in ("rex", "mimi")]
    drawn = [[random_scene(rng, tuple(order), "photo") for _ in range(12)]
             for order in (things, things[::-1])]
    right_way, wrong_way = (to_tensor([render(scene) for scene in row]) for row in drawn)
    regions = (Region("<rex>", box=(0.0, 0.0, 1.0, 0.5)), Region("<mimi>", box=(0.0, 0.5, 1.0, 1.0)))
    levels = [0.4, 0.4]
    assert demo.region_hits(right_way, regions, tasks, encoder, levels) >= 0.85
    assert demo.region_hits(wrong_way, regions, tasks, encoder, levels) <= 0.1


def test_retention_and_gap_follow_their_definitions():
    alignment = [[0.8], [0.6, 0.9], [0.4, 0.9, 0.5]]
    assert metrics.retention(alignment) == pytest.approx([0.5, 1.0, 1.0])
    assert metrics.forgetting(alignment) == pytest.approx([0.4, 0.0, 0.0])
    assert metrics.gap_closed(0.7, 0.2, 0.9) == pytest.approx(5 / 7)


def test_held_out_pictures_are_not_training_pictures():
    task = assignment("mimi")
    same = (task.held_out.unsqueeze(1) - task.references.unsqueeze(0)).abs().amax((2, 3, 4)) == 0
    assert not same.any() and len(task.pictures) == 5
