"""Scenes and bases of other sizes than those that ship."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from continual_concepts.core.demo import base, bases, judges, scenes
from continual_concepts.core.demo.packing import pack, unpack
from continual_concepts.core.demo.render import render
from continual_concepts.core.errors import ConceptError


@pytest.mark.parametrize("style", [*scenes.STYLES, "blueprint"])
def test_a_larger_picture_shows_the_same_scene(style):
    drawn = scenes.CONCEPTS["blueprint"].style if style == "blueprint" else style
    scene, other = (scenes.random_scene(random.Random(seed), style=drawn) for seed in (4, 5))
    small = render(scene, 64).astype(np.float32)
    large = render(scene, 128).astype(np.float32).reshape(64, 2, 64, 2, 3).mean((1, 3))
    another = render(other, 64).astype(np.float32)
    assert np.abs(small - large).mean() < 0.2 * np.abs(small - another).mean()


def test_the_encoder_sees_larger_pictures_averaged_down():
    small, large = (judges.assignment("mimi", 4, seed=3, size=size) for size in (64, 128))
    assert [p.caption for p in small.pictures] == [p.caption for p in large.pictures]
    encoder = judges.SceneEncoder()
    features, of_large = (encoder.features(task.references, "object") for task in (small, large))
    others = encoder.features(judges.assignment("fido", 4, seed=3).references, "object")
    assert (features * of_large).sum(1).min() > 0.9 > (features @ others.T).max()
    assert judges.at_encoder_size(torch.zeros(1, 3, 128, 64)).shape == (1, 3, 64, 64)


def test_packed_weights_come_back_within_half_a_step():
    weight, bias = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(2)), torch.arange(5.0)
    stored = pack({"conv.weight": weight, "conv.bias": bias})
    restored = unpack(stored)
    assert stored["conv.weight"].dtype == torch.int8 and set(restored) == {"conv.weight", "conv.bias"}
    error = (restored["conv.weight"] - weight).square().mean().sqrt()
    step = weight.flatten(1).abs().amax(1).mean() / 127
    assert error < step / 2 and torch.equal(restored["conv.bias"], bias)


def test_a_base_of_other_sizes_is_built_from_its_own_header(other_base):
    backbone = base.load_base(other_base)
    assert backbone.latent_channels == 6 and backbone.picture_multiple == 8
    assert backbone.picture_size == bases.read_sizes(other_base)["picture_size"] == 32
    assert bases.read_sizes(other_base)["notes"] == {"steps": 1}
    assert backbone.layout.embedded_base == "" and " has" not in backbone.layout.describe()


def test_a_base_without_a_known_denoiser_is_refused(tmp_path):
    sizes = {part: size for part, size in base.SIZES.items() if part != "unet"} | {"mamba": {}}
    base.save_base({}, tmp_path / "base.safetensors", {}, sizes)
    with pytest.raises(ConceptError, match="but no denoiser; allowed: unet, transformer, joint"):
        base.load_base(tmp_path / "base.safetensors")


def test_the_base_of_64_pixels_names_the_default_sizes():
    header = bases.read_sizes(bases.FILES["embedded-64"])
    assert header.pop("notes") and header == json.loads(json.dumps(base.SIZES))
