"""One transformer with joint attention in both hosts: the library's, and ComfyUI's own class with the weights
of the same file. Predictions and gradients agree, with concepts and with regions."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.attention.adapters import AdapterProcessor, LowRankAdapters
from continual_concepts.core.attention.token_lora import TokenLora, TokenLoraProcessor
from continual_concepts.core.demo import base
from continual_concepts.core.model.context import Context
from continual_concepts.core.model.processor import AttentionProcessor
from continual_concepts.core.regional.joint import JointRegions
from continual_concepts.core.regional.processor import Part
from continual_concepts.core.regional.regions import Region

from .make_flux import distance
from .make_transformer import slots

pytestmark = pytest.mark.usefixtures("has_patches")
TOLERANCE = 1e-4
ROWS = 14


@pytest.fixture(scope="module")
def hosts(comfyui, has_patches, joint_base):
    """The library's backbone and ComfyUI's."""
    from continual_concepts.core.comfy.backbone import ComfyBackbone
    from continual_concepts.core.comfy.demo import load_demo_file

    return base.load_base(joint_base), ComfyBackbone(*load_demo_file(joint_base))


@pytest.fixture
def both(hosts):
    """both(make_processor, context): the predictions of the two hosts; a processor is made for each."""
    latents = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([120, 870])

    def predictions(make_processor, context):
        with hosts[1].training():
            return [host.predict(latents, timesteps, context, make_processor()) for host in hosts]

    return predictions


@pytest.fixture
def context():
    states = torch.randn(2, 1, ROWS, 128, generator=torch.Generator().manual_seed(2))
    return Context(states, words=({"rex": (2, 3, 4)}, {"rex": (1, 2), "tom": (5,)}))


def test_the_layouts_texts_and_schedules_agree(hosts):
    ours, theirs = hosts
    assert ours.layout == theirs.layout and theirs.layout.is_joint and not theirs.layout.takes_words
    assert torch.allclose(ours.schedule.sigmas, theirs.schedule.sigmas, atol=1e-6)
    assert ours.fingerprint == theirs.fingerprint


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "neutral", "slots"])
def test_predictions_agree(both, hosts, context, kind):
    deltas = {name: slots(hosts[0].layout, i) for i, name in enumerate(("rex", "tom"))}
    make = {"none": lambda: None, "neutral": AttentionProcessor, "slots": lambda: TokenLoraProcessor(deltas)}
    plain, ours, theirs = both(lambda: None, context)[0], *both(make[kind], context)
    assert distance(ours, theirs) < TOLERANCE
    assert distance(ours, plain) > 1e-2 or kind != "slots"


@torch.no_grad()
@pytest.mark.parametrize("isolation", [0.0, 1.0])
def test_predictions_with_regions_agree(both, hosts, context, isolation):
    layout = hosts[0].layout
    regions = [Region("<rex>", box=(0.0, 0.0, 1.0, 0.5)),
               Region("<tom>", box=(0.2, 0.4, 1.0, 1.0), feather=0.1)]
    parts = [Part(context, {}, {name: slots(layout, i)}) for i, name in enumerate(("rex", "tom"))]

    def processor():
        made = JointRegions(regions, parts, (4, 4), isolation=isolation)
        made.rows, made.scene_concepts = torch.tensor([0, 1]), TokenLora.at({}, {})
        return made

    ours, theirs = both(processor, context)
    assert distance(ours, theirs) < TOLERANCE
    assert distance(ours, both(lambda: None, context)[0]) > 1e-2


def test_gradients_agree(both, hosts, context):
    gradients = []
    for i in (0, 1):
        adapters = LowRankAdapters(hosts[0].layout, 2, 1.0, torch.Generator().manual_seed(3), "cpu")
        for parameter in adapters.parameters():
            parameter.data += 0.1
        both(lambda adapters=adapters: AdapterProcessor(adapters), context)[i].square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in adapters.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-3 * gradients[0].abs().max())
    assert gradients[0].abs().max() > 0
