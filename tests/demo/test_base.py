"""The embedded bases: their sizes, and that their pictures follow captions."""

from __future__ import annotations

import random

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.demo import scenes
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.demo.bases import (
    ASSETS,
    FILES,
    NAMES,
    NEWEST,
    TRANSFORMERS,
    file_of,
    picture_size,
)
from continual_concepts.core.demo.judges import at_encoder_size, held_out_prompts, load_classifier, to_tensor
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings
from continual_concepts.tests.quick import thinned

SITES = {"embedded-dit": [f"blocks.{number}.cross_attn" for number in range(10)],
         "embedded-joint": ["double_blocks.0", "double_blocks.1",
                            *(f"single_blocks.{number}" for number in range(7))]}
# a transformer's file need not be there
TRAINED = {name: file for name, file in (FILES | TRANSFORMERS).items() if file.exists()}


@pytest.fixture(scope="module", params=list(TRAINED))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def base(name):
    return load_base(TRAINED[name])


def size_of(*files) -> int:
    return sum(file.stat().st_size for file in files)


def test_the_newest_base_and_its_judges_fit_into_sixteen_megabytes():
    others = {file for name, file in (FILES | TRANSFORMERS).items() if name != NEWEST}
    assert size_of(*(set(ASSETS.glob("*.safetensors")) - others)) <= 16e6


def test_each_transformer_fits_into_twelve_megabytes():
    assert all(size_of(file) <= 12e6 for file in TRANSFORMERS.values() if file.exists())


def test_all_weights_that_ship_fit_into_forty_six_megabytes():
    """16 for the newest base and its judges, 20 for two transformers, 10 for the older base."""
    assert size_of(*ASSETS.glob("*.safetensors")) <= 46e6


def test_names_of_bases():
    assert file_of("embedded") == FILES[NEWEST] and "embedded-64" in NAMES
    with pytest.raises(ConceptError, match="'embedded-63' is unknown; allowed: embedded, embedded-64"):
        file_of("embedded-63")


def test_a_layout_names_its_base(name, base):
    assert base.layout.embedded_base == name and f"as {name} has" in base.layout.describe()
    assert base.picture_size == picture_size(name)


def test_the_structure_is_stable_diffusions_or_a_transformers(name, base):
    if name in TRANSFORMERS:
        assert [site.name for site in base.layout.sites] == SITES[name]
        assert base.layout.copies == 1
        return
    blocks = [site.name.split(".")[0] for site in base.layout.sites]
    order = ["down_blocks", "mid_block", "up_blocks"]
    assert blocks == sorted(blocks, key=order.index) and set(blocks) == set(order)
    assert base.layout.copies == len(base.layout.sites)


def test_the_autoencoder_keeps_pictures(base):
    drawn = [scenes.random_scene(random.Random(i)) for i in range(6)]
    pictures = to_tensor([scenes.render(scene, base.picture_size) for scene in drawn])
    with torch.no_grad():
        again = base.decode_latents(base.encode_images(pictures))
    error = (again - pictures).abs().mean()
    plain = (pictures.mean((2, 3), keepdim=True) - pictures).abs().mean()
    assert error < 0.15 * plain


def test_captions_of_the_world_are_whole_words_and_fit(base):
    rng = random.Random(3)
    for _ in range(300):
        text = scenes.caption(scenes.random_scene(rng), rng)
        ids = base.text[0].ids(text)
        assert len(ids) == len(text.split()) <= base.text[0].length - 2


def test_held_out_combinations_never_appear_in_pretraining():
    rng = random.Random(4)
    for _ in range(2000):
        thing = scenes.random_thing(rng)
        body = thing.names.get("body")
        assert body is None or not scenes.held_out(thing.kind, body, thing.pattern)


def test_a_scene_is_a_function_of_its_seed():
    assert (scenes.sample(random.Random(5))[0] == scenes.sample(random.Random(5))[0]).all()


@pytest.mark.parametrize("name", thinned(TRAINED, lambda place: place == 1), indirect=True)
def test_captions_are_followed(base):
    """A quick check, below the figures of the benchmark `base`, so that a broken file cannot pass."""
    wishes = held_out_prompts(4, seed=5)
    settings = SampleSettings(8, 4.0, (base.picture_size,) * 2, batch=4)
    images = sample(base, ConceptBank(base.layout), [text for text, _, _ in wishes], list(range(4)), settings)
    with torch.no_grad():
        named = load_classifier().name(at_encoder_size(images))
    assert sum(named[i] == wishes[i][1:] for i in range(4)) >= 3
