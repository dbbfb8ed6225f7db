"""One transformer in both hosts: the library's embedded structure, and ComfyUI's own class with the same
weights, as the family of Anima and Cosmos Predict2 sees it. Predictions and gradients agree, with concepts
and with regions."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.attention.adapters import AdapterProcessor, LowRankAdapters
from continual_concepts.core.attention.token_lora import TokenLoraProcessor
from continual_concepts.core.model.context import Context
from continual_concepts.core.model.processor import AttentionProcessor
from continual_concepts.core.model.sites import PROJECTIONS
from continual_concepts.core.regional.processor import Part, RegionProcessor
from continual_concepts.core.regional.regions import Region

from .make_transformer import slots

TOLERANCE = 1e-4
BATCH, ROWS = 2, 14


@pytest.fixture(scope="module")
def family(comfyui, tiny_transformer):
    """ComfyUI's MODEL with the weights of the library's tiny transformer, as our family."""
    import comfy.ldm.cosmos.predict2 as predict2
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    from continual_concepts.core.comfy.families.predict2 import Predict2

    class Config(comfy.supported_models.CosmosT2IPredict2):
        sampling_settings = {"multiplier": 1000.0, "shift": 3.0}

    ratios = {f"rope_{axis}_extrapolation_ratio": 0.0125 for axis in "hw"}
    config = Config({
        "in_channels": 4, "model_channels": 48, "num_blocks": 3, "num_heads": 2, "crossattn_emb_channels": 32,
        "adaln_lora_dim": 8, "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "out_channels": 4,
        "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "pos_emb_cls": "rope3d",
        "use_adaln_lora": True, "rope_enable_fps_modulation": False, "dtype": torch.float32, **ratios})
    device = torch.device("cpu")
    base = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.FLOW, device, predict2.MiniTrainDIT)
    base.diffusion_model.load_state_dict(tiny_transformer.denoiser.state_dict())
    patcher = comfy.model_patcher.ModelPatcher(base, device, device)
    return Predict2(patcher, (("t5xxl", 32),))


@pytest.fixture
def both(family, tiny_transformer):
    """both(processor, context): the predictions of the two hosts."""
    from continual_concepts.core.comfy.sites import ALONE, PROCESSOR

    latents = torch.randn(BATCH, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([120, 870])

    def predictions(processor, context):
        ours = tiny_transformer.predict(latents, timesteps, context, processor)
        options = {**family.own_options(), ALONE: True}
        if processor is not None:
            processor.prepare(context)
            options[PROCESSOR] = processor
        with family.attached():
            theirs = family.evaluate(latents, timesteps, context, options, 4)
        return ours, theirs

    return predictions


@pytest.fixture
def context():
    states = torch.randn(BATCH, 1, ROWS, 32, generator=torch.Generator().manual_seed(2))
    return Context(states, words=({"rex": (2, 3, 4)}, {"rex": (1, 2), "tom": (5,)}))


def test_the_layouts_agree(family, tiny_transformer):
    assert family.layout.sites == tiny_transformer.layout.sites
    for site in family.layout.sites:
        for projection in PROJECTIONS:
            x = torch.randn(3, site.shape(projection)[1], generator=torch.Generator().manual_seed(4))
            ours, theirs = (host.project(site, projection, x) for host in (tiny_transformer, family))
            assert torch.allclose(ours, theirs, atol=1e-5)
            if projection in ("to_q", "to_k"):
                normed = [host.normalised(site, projection, ours) for host in (tiny_transformer, family)]
                assert torch.allclose(*normed, atol=1e-4)
    assert torch.allclose(family.schedule().sigmas, tiny_transformer.schedule.sigmas, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "neutral", "slots", "word-bound"])
def test_predictions_agree(both, context, tiny_transformer, make_concept, kind):
    layout = tiny_transformer.layout
    concepts = {"slots": lambda i, _: slots(layout, i),
                "word-bound": lambda i, name: make_concept(layout, name, seed=i, size=0.3).deltas}
    plain, _ = both(None, context)
    if kind in ("none", "neutral"):
        ours, theirs = both(None if kind == "none" else AttentionProcessor(), context)
    else:
        deltas = {name: concepts[kind](i, name) for i, name in enumerate(("rex", "tom"))}
        ours, theirs = both(TokenLoraProcessor(deltas), context)
        assert (ours - plain).abs().max() > 1e-2
    assert (ours - theirs).abs().max() < TOLERANCE * plain.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("isolation", [0.0, 1.0])
def test_predictions_with_regions_agree(both, context, tiny_transformer, make_concept, family, isolation):
    layout, results = tiny_transformer.layout, []
    regions = [Region("<rex>", box=(0.0, 0.0, 1.0, 0.5)),
               Region("<tom>", box=(0.2, 0.4, 1.0, 1.0), feather=0.1)]
    for host in (tiny_transformer, family):
        ink = make_concept(layout, "ink", seed=9, size=0.2).deltas
        parts = [Part(context, ink, {"rex": slots(layout, 1)}),
                 Part(context, {}, {"tom": slots(layout, 2)})]
        processor = RegionProcessor(host, Part(context, {}), regions, parts, torch.tensor([0, 1]), (8, 6),
                                    "average", isolation)
        results.append(both(processor, context)[host is family])
    plain = both(None, context)[0]
    assert (results[0] - results[1]).abs().max() < TOLERANCE * plain.abs().max()
    assert (results[0] - plain).abs().max() > 1e-2


def test_gradients_agree(both, context, tiny_transformer):
    gradients = []
    for host in (0, 1):
        adapters = LowRankAdapters(tiny_transformer.layout, 2, 1.0, torch.Generator().manual_seed(3), "cpu")
        for parameter in adapters.parameters():
            parameter.data += 0.1
        both(AdapterProcessor(adapters), context)[host].square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in adapters.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-3 * gradients[0].abs().max())
    assert gradients[0].abs().max() > 0
