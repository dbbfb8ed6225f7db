"""CLIP and DINO as metric encoders: the papers' preprocessing and features, from folders on disk, told from
folders that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation.clip import (
    CLIP_MEAN,
    CLIP_STD,
    DINO_MARGIN,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClipEncoder,
    preprocess,
)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tiny_clip):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory, tiny_dino):
    return tiny_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def encoder(clip_folder, dino_folder):
    return ClipEncoder.load(clip_folder, dino_folder)


def photo(height: int = 90, width: int = 70) -> Image.Image:
    """A smooth picture in colours, so that a pixel's place and its channel matter."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [120 + 100 * np.sin(x / 9 + i) * np.cos(y / (7 + 3 * i)) for i in range(3)]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().unsqueeze(0) / 127.5 - 1


def with_pillow(image: Image.Image, resize: int, crop: int, mean, std) -> torch.Tensor:
    """What the papers' code does: Pillow's bicubic on 8 bits, centre crop, normalisation."""
    width, height = image.size
    size = (resize, int(resize * height / width))
    if width > height:
        size = (int(resize * width / height), resize)
    left, top = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    small = image.resize(size, Image.BICUBIC).crop((left, top, left + crop, top + crop))
    return ((torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255 - torch.tensor(mean).view(3, 1, 1))
            / torch.tensor(std).view(3, 1, 1)).unsqueeze(0)


@pytest.mark.parametrize("size", [(90, 70), (64, 100), (20, 24)])
@pytest.mark.parametrize("resize, crop, mean, std", [(32, 32, CLIP_MEAN, CLIP_STD),
                                                     (37, 32, IMAGENET_MEAN, IMAGENET_STD)])
def test_pictures_are_prepared_as_the_papers_code_does(size, resize, crop, mean, std):
    ours = preprocess(tensor(photo(*size)), resize, crop, mean, std)
    assert ours.shape == (1, 3, crop, crop)
    assert (ours - with_pillow(photo(*size), resize, crop, mean, std)).abs().max() < 1.5 / 255 / min(std)


def test_features_are_the_models_own(encoder):
    image = photo()
    pixels = with_pillow(image, 32, 32, CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        output = encoder.model.get_image_features(pixel_values=pixels)
    theirs = torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)
    ours = encoder.image_text_features(tensor(image))
    assert torch.allclose(ours, theirs, atol=0.02)
    assert not torch.allclose(ours, encoder.image_text_features(-tensor(image)), atol=0.02)
    assert torch.equal(encoder.features(tensor(image), "style"), ours)


def test_objects_are_compared_by_dino_when_there_is_one(encoder, clip_folder):
    image = tensor(photo())
    pixels = with_pillow(photo(), round(32 * DINO_MARGIN), 32, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        theirs = torch.nn.functional.normalize(encoder.dino(pixel_values=pixels).last_hidden_state[:, 0],
                                               dim=-1)
    assert torch.allclose(encoder.features(image, "object"), theirs, atol=0.02)
    alone = ClipEncoder.load(clip_folder)
    assert torch.equal(alone.features(image, "object"), encoder.image_text_features(image))


def test_captions(encoder):
    captions = ["a photo of a dog", "a cat", "a photo of a dog " * 30, "a photo of a dog " * 40]
    features = encoder.caption_features(captions)
    ids = encoder.tokenizer([captions[0]], return_tensors="pt").input_ids
    with torch.no_grad():
        output = encoder.model.get_text_features(input_ids=ids)
    theirs = torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)
    assert torch.allclose(features[:1], theirs, atol=1e-5)      # padding changes nothing
    assert (features[0] - features[1]).norm() > 1e-3
    assert torch.equal(features[2], features[3])
    assert not torch.allclose(features[2], features[0], atol=1e-3)      # both are cut


def test_features_have_unit_length_and_do_not_depend_on_the_batch(encoder):
    # more than one batch
    images = torch.rand(70, 3, 36, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for kind in ("object", "style"):
        features = encoder.features(images, kind)
        assert torch.allclose(features.norm(dim=1), torch.ones(70))
        assert torch.allclose(features[66:67], encoder.features(images[66:67], kind), atol=1e-5)
    assert torch.allclose(encoder.caption_features(["a dog"]).norm(dim=1), torch.ones(1))


def test_folders_that_are_none(clip_folder, dino_folder, tmp_path):
    with pytest.raises(ConceptError, match="CLIP folder '.*nowhere' does not exist"):
        ClipEncoder.load(tmp_path / "nowhere")
    with pytest.raises(ConceptError, match="CLIP .* cannot be loaded"):
        ClipEncoder.load(tmp_path)
    with pytest.raises(ConceptError, match="DINO"):
        ClipEncoder.load(clip_folder, clip_folder)
    with pytest.raises(ConceptError, match="CLIP"):
        ClipEncoder.load(dino_folder)


def test_weights_that_execute_are_not_read(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConceptError, match="safetensors"):
        ClipEncoder.load(tmp_path)
