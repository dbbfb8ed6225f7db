"""Photos and captions as people bring them to ComfyUI."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from PIL import Image

from continual_concepts.core.data.pictures import captions_for
from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")


@pytest.fixture
def folder(studio):
    """A folder in ComfyUI's input folder with three photos: 0.png, 1.png, 2.png."""
    path = studio.pack.folder / "input" / "practice"
    path.mkdir(exist_ok=True)
    for file in path.iterdir():
        file.unlink()
    for i in range(3):
        blocks = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(blocks).resize((64, 64), Image.NEAREST).save(path / f"{i}.png")
    return path


def load(studio):
    return studio.pack.ConceptPhotosLoad.execute("practice")


def test_a9_one_photo_without_a_caption(studio, folder, monkeypatch):
    """Through both nodes: the captions of the others stay theirs."""
    (folder / "0.txt").write_text("first")
    (folder / "2.txt").write_text("third\nline")
    images, captions, _ = load(studio).args
    seen = []

    def prepare(backbone, pictures, *rest):
        seen.extend(pictures)
        raise KeyError

    package = studio.pack.ConceptLearner.__module__.rpartition(".")[0]
    monkeypatch.setattr(importlib.import_module(f"{package}.learning"), "prepare", prepare)
    with pytest.raises(KeyError):
        studio.learn(images=images, captions=[captions])
    assert [picture.caption for picture in seen] == ["first", "", "third line"]


def test_a9_sibling_no_captions_at_all(studio, folder):
    captions = load(studio).args[1]
    assert captions == "" and captions_for(3, [captions]) == []


def test_a1_a_folder_of_heic_alone_is_offered_and_says_why(studio, folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "x.heic").write_bytes(b"")
    with pytest.raises(ConceptError, match="x.heic.*pillow-heif"):
        load(studio)


def test_a13_the_folder_is_reported(studio, folder):
    (folder / "x.heic").write_bytes(b"")
    shown = load(studio).ui
    assert "3 photos, none with captions; 1 file skipped" in shown["text"][0] and "x.heic" in shown["text"][0]
    assert len(shown["images"]) == 1      # the contact sheet


def test_a13_the_learner_warns_before_it_learns(studio, folder, caplog):
    images = load(studio).args[0]
    shown = studio.learner(images=images[:1] * 2, steps=1).ui["text"][0]
    assert shown.startswith("2 photos, none with captions")
    for text in ("only 2 photos", "picture 1 and picture 2 are the same picture"):
        assert text in shown and text in caplog.text


def test_a11_prior_pictures_of_a_word_bound_concept(studio, folder):
    images = load(studio).args[0]
    shown = studio.learner(images=images, prior_images=images, steps=1, method="bound")
    assert shown.ui["text"][0].count("prior pictures have no effect") == 1


def test_a11_sibling_prior_pictures_that_are_photos_of_the_concept(studio, folder):
    images = load(studio).args[0]
    shown = studio.learner(images=images, prior_images=images[1:2], steps=1, method="lora_m").ui["text"][0]
    assert "prior picture 1 is a photo of the concept, too; prior pictures should show others" in shown


def test_g10_a_caption_that_names_another_concept(studio):
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConceptError) as caught:
        studio.learn(images=images, captions=["a photo of <spot>\nbeside <mimi>"], bank=[None])
    text = str(caught.value)
    assert text.startswith("caption 2 names <mimi>, and the concept to learn is called <spot>; ")
    assert "prompt" not in text


def test_g10_sibling_a_concept_of_the_bank_may_be_named(studio):
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConceptError, match="caption 1 names <mimy>.*did you mean <mimi>"):
        studio.learn(images=images, captions=["<mimy> with <spot>\n<spot>"], bank=[studio.bank])


def test_captions_by_template_have_a_place_for_the_concept(studio, folder):
    (folder / "1.txt").write_text("asleep")
    captions = studio.pack.ConceptPhotosLoad.execute("practice", caption_templates="style").args[1]
    first, second, third = captions.splitlines()
    assert "{}" in first and "{}" in third and first != third and second == "asleep"
    with pytest.raises(ConceptError, match="caption templates are for 'face'"):
        studio.pack.ConceptPhotosLoad.execute("practice", caption_templates="face")


def test_the_learner_warns_of_phrases_that_most_captions_have(studio, folder, caplog):
    images = load(studio).args[0]
    lines = ["<spot> in a red scarf", "<spot> with a red scarf", "a red scarf and <spot>"]
    shown = studio.learner(images=images, captions=["\n".join(lines)], steps=1).ui["text"][0]
    assert "'red scarf' (3 of 3)" in shown and "'red scarf' (3 of 3)" in caplog.text
