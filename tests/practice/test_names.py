"""Row G12 on the command line: names that are refused before the base is loaded."""

from __future__ import annotations

import pytest

from continual_concepts.core.cli import backbones


@pytest.fixture(autouse=True)
def no_base(monkeypatch):
    def load(options):
        raise AssertionError("the base was loaded before the names were checked")

    monkeypatch.setattr(backbones, "load_backbone", load)


@pytest.mark.parametrize("noun", ["<rex>", "(dog:1.2)", "embedding:foo"])
def test_g12_class_nouns_with_the_signs_of_prompts_are_refused(learn, photos, noun):
    assert f"class noun '{noun}' is not allowed" in learn(photos, "--noun", noun).sentence


def test_g12_sibling_class_nouns_of_imports_are_refused(run, tmp_path):
    ended = run("bank", "import", tmp_path / "bank.safetensors", "rex", "--noun", "[dog]",
                "--lora", tmp_path / "x.safetensors")
    assert "class noun '[dog]' is not allowed" in ended.sentence
