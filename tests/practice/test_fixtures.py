"""The fixtures of this folder work."""

from __future__ import annotations

from continual_concepts.core.bank.format import open_bank


def test_the_fixtures(learned, photos, learn):
    assert open_bank(learned).names == ["rex"]
    assert len(list(photos.iterdir())) == 3
    assert learn(photos / "missing").sentence.endswith("does not exist")
