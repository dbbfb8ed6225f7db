"""Evaluate Concepts in a real ComfyUI: what it measures, on which pictures, and what it refuses."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation import metrics

pytestmark = pytest.mark.usefixtures("as_in_comfyui")


class Colours:
    """A CLIP_VISION that sees nothing but a coarse picture; it counts what it was shown."""

    def __init__(self, width: int = 12) -> None:
        self.width, self.seen = width, 0

    def encode_image(self, image, crop=True):
        assert image.ndim == 4 and image.shape[-1] == 3 and image.min() >= 0 and image.max() <= 1
        self.seen += len(image)
        coarse = torch.nn.functional.adaptive_avg_pool2d(image.movedim(-1, 1) - 0.5, 2).flatten(1)
        return {"image_embeds": coarse[:, : self.width]}


def jpeg(seed: int) -> bytes:
    colour = tuple(torch.randint(0, 256, (3,), generator=torch.Generator().manual_seed(seed)).tolist())
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), colour).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bound(bank):
    """Two bound concepts; only the first has a thumbnail."""
    made = ConceptBank(bank.layout)
    for name in ("rex", "mimi"):
        concept = bank[name]
        made = made.add(replace(concept, info=replace(concept.info, method="bound"),
                                thumbnail=jpeg(1) if name == "rex" else b""))
    return made


@pytest.fixture
def evaluate(studio, bound):
    def run(**other):
        inputs = {"model": studio.model, "clip": studio.clip, "vae": studio.vae, "clip_vision": Colours(),
                  "bank": bound, "seed": 5,
                  "prompts": "a photo of {}\n\n{} in a meadow\n", "base_prompts": "a red dog", "seeds": 2,
                  "steps": 1, "cfg": 3.0,
                  "size": 32}
        return studio.pack.ConceptEvaluate.execute(**(inputs | other))

    return run


def photos(studio, concept="mimi", before=None, images=None):
    images = studio.photos(3, 40) if images is None else images
    return studio.pack.ConceptReferencePhotos.execute([images], [concept],
                                                      None if before is None else [before])[0]


def test_figures_and_sheet(studio, evaluate, bound):
    vision, given = Colours(), photos(studio)
    sheet, text = evaluate(clip_vision=vision, photos=given).args
    found = json.loads(text)
    assert list(found["concepts"]) == ["rex", "mimi"] and found["base_drift"] == 0
    assert found["base_unchanged"] is True
    assert found["concepts"]["rex"]["compared_with"] == "cover"
    assert found["concepts"]["mimi"]["compared_with"] == "photos"
    assert found["concepts"]["mimi"]["references"] == 3 and found["concepts"]["mimi"]["pictures"] == 4
    assert vision.seen == 1 + 3 + 2 * 4      # thumbnail, photos, two prompts of two seeds each
    matrix = torch.tensor(found["bleed"]["matrix"])
    assert matrix.shape == (2, 2) and matrix.abs().max() <= 1
    assert matrix[0, 0] == found["concepts"]["rex"]["image_alignment"]
    nearest = [found["bleed"]["names"][i] for i in matrix.argmax(1).tolist()]
    assert nearest == [concept["most_like"] for concept in found["concepts"].values()]
    assert sheet.ndim == 4 and sheet.shape[-1] == 3 and sheet.std() > 0.05 and sheet.min() >= 0
    assert sheet.max() <= 1


def test_the_figures_are_those_of_the_pictures(studio, evaluate, bound, reference):
    """The same pictures from the diffusers host give the same matrix."""
    from continual_concepts.core.sampling.sampling import sample
    from continual_concepts.core.sampling.settings import SampleSettings

    found = json.loads(evaluate(photos=photos(studio), prompts="a photo of {}").args[1])
    settings = SampleSettings(1, 3.0, (32, 32))

    def features(images):
        return metrics.unit(Colours().encode_image(((images + 1) / 2).movedim(1, -1))["image_embeds"])

    theirs = features(sample(reference, bound, ["a photo of <mimi>"] * 2, [5, 6], settings))
    real = features(studio.photos(3, 40).movedim(-1, 1) * 2 - 1)
    alignment = found["concepts"]["mimi"]["image_alignment"]
    assert alignment == pytest.approx(float((theirs @ real.T).mean()), abs=1e-3)
    assert alignment != pytest.approx(found["bleed"]["matrix"][0][1], abs=1e-3)


def test_what_changes_the_base_is_seen(evaluate, bank):
    made = ConceptBank(bank.layout)
    concept = bank["rex"]
    made = made.add(replace(concept, info=replace(concept.info, method="ewc"), thumbnail=jpeg(2)))
    found = json.loads(evaluate(bank=made).args[1])
    assert found["base_drift"] > 1e-3 and found["base_unchanged"] is False


def test_the_model_is_left_as_it_was_and_the_same_again(studio, evaluate):
    before = studio.ksampler(studio.model, "a red dog", "")
    one, two = (evaluate(concepts="rex").args[1] for _ in range(2))
    assert one == two and torch.equal(before, studio.ksampler(studio.model, "a red dog", ""))


def test_some_concepts_and_no_base_prompts(studio, evaluate):
    out = evaluate(concepts=" <rex> , rex", base_prompts="")
    found = json.loads(out.args[1])
    assert list(found["concepts"]) == ["rex"] and found["base_drift"] is None
    assert found["base_unchanged"] is None
    assert "not evaluated" in out.ui["text"][0]


def test_photos_are_chained(studio):
    first = photos(studio, "rex")
    second = photos(studio, "<mimi>", first, [torch.rand(1, 30, 50, 3), torch.rand(2, 20, 20, 3)][0])
    third = photos(studio, "rex", second)
    assert {name: len(pictures) for name, pictures in third.items()} == {"rex": 6, "mimi": 1}
    assert set(first) == {"rex"}
    assert third["mimi"][0].shape == (3, 30, 50) and third["rex"][0].min() < 0


def test_progress_and_cancelling(evaluate, monkeypatch):
    import comfy.model_management
    import comfy.utils

    seen = []
    def hook(value, total, preview, **_):
        seen.append((value, total, preview is not None))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    evaluate(concepts="rex")
    assert seen == [(i, 4, True) for i in range(1, 5)]      # two prompts, and one without concepts twice
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        evaluate(concepts="rex")


@pytest.mark.parametrize("other, sentence", [
    ({"bank": None}, "no concept to evaluate"), ({}, "'mimi' has neither photos nor a thumbnail"),
    ({"concepts": "tom"}, "concepts names 'tom'"),
    ({"concepts": "rex", "prompts": "a dog"}, "write {} in"),
    ({"concepts": "rex", "prompts": " \n"}, "0 prompts"),
    ({"concepts": "rex", "base_prompts": "a <rex>"}, "names <rex>"),
    ({"concepts": "rex", "base_prompts": "a <rxe>"}, "<rxe>"),
    ({"concepts": "rex", "size": 33}, "multiples of "), ({"photos": {"tom": [torch.zeros(3, 8, 8)]}},
                                                          "photos of 'tom'"),
    ({"concepts": "rex", "clip_vision": SimpleNamespace(encode_image=lambda image: {"image_embeds": None})},
     "no vector per picture"),
    ({"concepts": "rex",
      "clip_vision": SimpleNamespace(encode_image=lambda image: {"image_embeds": torch.full((1, 3),
                                                                                            float("nan"))})},
     "features are NaN"),
])
def test_what_goes_wrong_is_one_sentence(evaluate, other, sentence):
    with pytest.raises(ConceptError) as caught:
        evaluate(**other)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_photos_that_are_none(studio):
    for images, concept, sentence in ((None, "rex", "no photos of 'rex'"),
                                      (torch.full((1, 8, 8, 3), float("nan")), "rex", "NaN or infinite"),
                                      (torch.zeros(1, 8, 8, 1), "rex", "shape"),
                                      (studio.photos(), "a/b", "concept name")):
        with pytest.raises(ConceptError, match=sentence):
            studio.pack.ConceptReferencePhotos.execute([images], [concept])


def test_the_encoder_for_photos_takes_the_place_of_clip_vision(studio, evaluate, monkeypatch):
    from continual_concepts.nodes import images

    vision, seen = Colours(), []

    def photo_encode(layout):
        seen.append(layout)
        return images.vision(vision)

    monkeypatch.setattr(images, "photo_encode", photo_encode)
    photos_of_mimi = photos(studio)
    with_clip = evaluate(photos=photos_of_mimi)
    assert not seen      # a model that is given is used instead
    without = evaluate(photos=photos_of_mimi, clip_vision=None)
    assert without[1] == with_clip[1] and seen and vision.seen


def test_without_either_it_says_what_to_do(evaluate, monkeypatch):
    from continual_concepts.nodes import images

    monkeypatch.setattr(images, "photo_encode", lambda layout: None)
    with pytest.raises(ConceptError, match="clip_vision is not connected.*pip install"):
        evaluate(clip_vision=None)
