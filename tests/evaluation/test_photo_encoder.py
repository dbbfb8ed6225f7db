"""The encoder for photos: features, and what is done without its packages or with a damaged one."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.demo.base import load_base
from continual_concepts.core.demo.bases import FILES
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation import photo_encoder
from continual_concepts.core.evaluation.photo_encoder import PhotoEncoder, photo_encode

needs_packages = pytest.mark.skipif(not photo_encoder.is_installed(),
                                    reason="the encoder for photos is not installed: pip install '.[photos]'")


@pytest.fixture
def picture():
    return torch.rand(3, 90, 70, generator=torch.Generator().manual_seed(3)) * 2 - 1


@needs_packages
def test_features_have_unit_length_and_take_pictures_of_any_size(picture):
    encoder = PhotoEncoder()
    wide = torch.nn.functional.interpolate(picture[None], (50, 300))[0]
    rows = encoder.encode([picture, wide])
    assert rows.shape == (2, 1280) and torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.equal(rows[:1], encoder.features(picture[None], "style"))
    assert encoder.encode([picture.flip(0)]) @ rows[0] < 0.999      # colours matter


@needs_packages
def test_loading_leaves_the_random_numbers_alone():
    photo_encoder._network.cache_clear()
    torch.manual_seed(5)
    PhotoEncoder()
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


@needs_packages
def test_it_is_loaded_outside_of_inference_mode():
    photo_encoder._network.cache_clear()
    with torch.inference_mode():
        encoder = PhotoEncoder()
    assert not any(weight.is_inference() for weight in encoder._network.parameters())


@needs_packages
def test_the_concepts_of_the_benchmark_are_told_apart(benchmark_photos):
    from continual_concepts.benchmarks.continual.photo_encoder import told_apart
    from continual_concepts.benchmarks.continual.photos import read_tasks

    tasks = [task for task in read_tasks(benchmark_photos) if task.class_noun in ("dog", "cat")]
    found = told_apart(PhotoEncoder(), tasks)
    assert found["photos"] == 20 and found["identified"] == 20 and found["auc_of_one_noun"] > 0.9


@needs_packages
def test_texts_are_refused():
    with pytest.raises(ConceptError, match="need a CLIP model"):
        PhotoEncoder().caption_features(["a dog"])


def test_without_the_packages_nothing_compares_photos(layout, monkeypatch):
    monkeypatch.setattr(photo_encoder, "find_spec", lambda package: None)
    assert photo_encode(layout) is None


def test_a_damaged_package_is_one_sentence(layout, monkeypatch):
    monkeypatch.setattr(photo_encoder, "is_installed", lambda: True)
    monkeypatch.setattr(photo_encoder, "NAME", "efficientnet-none")      # fails with and without the packages
    photo_encoder._network.cache_clear()
    with pytest.raises(ConceptError, match="pip install") as caught:
        photo_encode(layout)
    assert "\n" not in str(caught.value)


def test_embedded_bases_keep_their_own(monkeypatch):
    monkeypatch.setattr(photo_encoder, "is_installed", lambda: True)
    assert photo_encode(load_base(FILES["embedded-64"]).layout) is None
