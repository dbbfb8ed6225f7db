"""Models that read more than latents and text."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")
SCENE = "a photo of a dog in a meadow"


@pytest.fixture
def reading(pack, studio, tiny_xl, tiny_sdxl, make_concept):
    """reading(channels): the small SDXL as a model that reads so many channels."""
    def make(channels: int):
        from diffusers import UNet2DConditionModel

        from continual_concepts.tests.host.make_sdxl import tiny_xl_model

        with torch.inference_mode(False), torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DConditionModel.from_config({**tiny_sdxl.unet.config, "in_channels": channels})
        bank = ConceptBank(tiny_sdxl.layout).add(make_concept(tiny_sdxl.layout, "rex", seed=0, size=0.3))
        small = type(studio)(pack, (tiny_xl_model(unet), *tiny_xl[1:]), bank)
        small.latent = lambda count=1: {"samples": torch.zeros(count, 4, 8, 8)}
        return small

    return make


@pytest.mark.parametrize("channels", [9, 8])
def test_d3_inpainting_models_learn_and_sample(reading, channels):
    """9: inpainting. 8: InstructPix2Pix."""
    own = reading(channels)
    plain = own.ksampler(own.model, SCENE, "")
    assert torch.equal(own.regional(SCENE, bank=own.bank), plain)
    bank = own.learn(steps=2, bank=[own.bank], preview_every=1)
    assert torch.equal(own.ksampler(own.model, SCENE, ""), plain)
    model, clip, positive = own.aggregate("<spot> and <rex>", bank)
    picture = own.ksampler(model, positive, own.encode(clip, ""))
    regions = own.regional(SCENE, [own.region("<rex>", right=0.5)], bank, solo=0.5)
    assert torch.isfinite(torch.cat([picture, regions])).all()
    assert not torch.equal(picture, plain) and not torch.equal(regions, plain)


def test_d3_sibling_other_models_are_refused(reading):
    from continual_concepts.core.errors import ConceptError

    own = reading(5)
    with pytest.raises(ConceptError, match="the model: its unet reads 5 channels; allowed: 4 .*, 8 .* and 9"):
        own.learn()
