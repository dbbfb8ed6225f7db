"""Checks that every family with joint attention passes."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.attention.adapters import AdapterProcessor
from continual_concepts.core.attention.token_lora import TokenLora, TokenLoraProcessor
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.slots import SLOTS, SlotDelta

from .make_flux import distance


def foreign_patches_act_in_front_alone(ours, bank) -> None:
    """Another node's attention patch acts before the concepts, and is refused behind them."""
    def doubled(q, k, v, extra_options=None, **_):
        return {"v": 2 * v}

    patched = ours.model.clone()
    patched.set_model_attn1_patch(doubled)
    model, clip, positive = ours.aggregate("a <spot>", bank, model=patched)
    negative = ours.encode(clip, "")
    drawn = ours.ksampler(model, positive, negative)
    model = ours.aggregate("a <spot>", bank)[0]
    assert distance(drawn, ours.ksampler(model, positive, negative)) > 1e-3
    model = model.clone()
    model.set_model_attn1_patch(doubled)
    with pytest.raises(ConceptError, match="put that node before Apply Concepts"):
        ours.ksampler(model, positive, negative)


def gradients_are_those_of_the_prediction(backbone, slots, inputs) -> None:
    """Of the keys of the first site, with and without checkpointing. inputs: as of `Backbone.predict`; called
    inside `Backbone.training`."""
    first = slots[0, SLOTS]
    keys, found = first.key.clone().requires_grad_(), []

    def loss(key):
        deltas = slots | {(0, SLOTS): SlotDelta(key, first.value, first.heads)}
        return backbone.predict(*inputs, TokenLoraProcessor({"rex": deltas})).double().square().sum()

    for checkpointed in (False, True):
        with torch.enable_grad(), backbone.gradient_checkpointing(checkpointed):
            found.append(torch.autograd.grad(loss(keys), keys)[0])
    with torch.no_grad():
        step = 0.3 * found[0] / found[0].norm()
        expected = (loss(keys + step) - loss(keys - step)).item() / 0.6
    assert found[0].norm().item() == pytest.approx(expected, rel=0.01)
    assert distance(found[1], found[0]) < 1e-4


def deltas_act_alike_in_three_ways(backbone, model, deltas, adapters, inputs) -> None:
    """Added to outputs, as adapters, and as the host's patches of the weights."""
    import comfy.model_management as management

    from continual_concepts.core.comfy.apply import fold

    with torch.inference_mode(False), backbone.training(), torch.no_grad():
        plain, adapted = backbone.predict(*inputs), backbone.predict(*inputs, AdapterProcessor(adapters))
        with backbone.folded(deltas):
            folded = backbone.predict(*inputs)
        assert torch.equal(backbone.predict(*inputs), plain)
    management.load_models_gpu([fold(model, backbone.sites, deltas, False)])
    expected = backbone.sites.evaluate(*inputs, {}, 8)
    management.load_models_gpu([model])
    assert distance(backbone.sites.evaluate(*inputs, {}, 8), plain) < 1e-4
    assert distance(folded, expected) < 1e-4 and distance(adapted, expected) < 1e-4
    assert distance(plain, expected) > 1e-3


def two_concepts_add_few_operations(make, layout, text_width: int, monkeypatch) -> None:
    """For a picture of 1024 pixels, counted without computing. make: makes the model; layout: its sites."""
    import comfy.model_management as management
    from torch.utils.flop_counter import FlopCounterMode

    from continual_concepts.core.comfy.families.joint import Begin, Finish
    from continual_concepts.core.comfy.sites import ATTENTION, PROCESSOR, differentiable_attention

    monkeypatch.setattr(management, "in_training", True)      # rotary positions in torch alone
    hooks = {"attn1_patch": [Begin(layout)], "attn1_output_patch": [Finish()]}
    processor, names = TokenLoraProcessor({}), ("rex", "mimi")
    with torch.device("meta"):
        model = make()
        deltas = {(site.index, SLOTS): SlotDelta(torch.zeros(8, site.width), torch.zeros(8, site.width),
                                                 site.heads) for site in layout.sites}
        processor.concepts = TokenLora.at({name: torch.zeros(1, 256) for name in names},
                                          {name: deltas for name in names})
        given = torch.zeros(1, 16, 128, 128), torch.zeros(1), torch.zeros(1, 256, text_width)

        def operations(acting) -> int:
            options = {"patches": hooks, PROCESSOR: acting, ATTENTION: differentiable_attention}
            with FlopCounterMode(display=False) as counter:
                model(*given, transformer_options=options)
            return counter.get_total_flops()

        ratio = operations(processor) / operations(None)
    print(f"operations with two concepts: {ratio:.3f} times those without")
    assert 1.0 < ratio <= 1.06
