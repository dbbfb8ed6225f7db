"""Concepts that were learned on other weights of an embedded base: nodes tell so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
NOTE = "were learned on other weights of embedded-64 than this version has"


@pytest.fixture(scope="module")
def earlier(studio):
    """A bank with two concepts of an earlier version's base."""
    with torch.inference_mode():
        bank = studio.learn(name="rex", method="slots")
    info = bank["rex"].info
    moved = replace(info, provenance=replace(info.provenance, base="0" * 16))
    bank = ConceptBank(bank.layout).add(replace(bank["rex"], info=moved))
    return bank.add(bank.rename("rex", "tom")["tom"])


def test_applying_tells(studio, earlier, caplog):
    studio.aggregate("a photo of <rex>", earlier)
    assert caplog.text.count(f"<rex>, <tom> {NOTE}") == 1


def test_the_regional_sampler_tells(studio, earlier, caplog):
    studio.regional("a photo of <rex>", bank=earlier, steps=1)
    assert caplog.text.count(f"<rex>, <tom> {NOTE}") == 1


def test_learning_tells_and_what_is_learned_now_fits(studio, earlier, caplog):
    grown = studio.learn(name="spot", method="slots", bank=earlier)
    assert caplog.text.count(f"<rex>, <tom> {NOTE}") == 1
    caplog.clear()
    studio.aggregate("", ConceptBank(grown.layout).add(grown["spot"]))
    assert "other weights" not in caplog.text


def test_evaluating_tells(studio, earlier):
    *base, vision = studio.pack.ConceptDemoBase.execute("embedded-64").args
    photos = studio.pack.ConceptReferencePhotos.execute([studio.photos(2, 64)], ["tom"], None)[0]
    shown = studio.pack.ConceptEvaluate.execute(*base, earlier, "a photo of {}", "", 1, 5, 1, 3.0, 64,
                                                clip_vision=vision, concepts="tom", photos=photos).ui
    assert shown["text"][0].startswith("<tom> was learned on other weights of embedded-64 than")
