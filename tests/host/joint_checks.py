"""Checks that every family with joint attention passes; the last also others whose text is read as rows."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.attention.adapters import AdapterProcessor
from continual_concepts.core.attention.token_lora import TokenLora, TokenLoraProcessor
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.context import Context
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


def nodes_that_compute_with_conditionings_carry_concepts_along(ours, bank) -> None:
    """Concat, Average, Multiply and Zero Out, of a text whose rows the model reads as they are."""
    from continual_concepts.core.comfy.apply import context_of
    from continual_concepts.core.comfy.families import find_sites
    from continual_concepts.core.comfy.text import text_widths

    sites, stock = find_sites(ours.model, text_widths(ours.clip)), ours.stock
    model, clip, _ = ours.aggregate("", bank)
    one, two = (ours.encode(clip, prompt) for prompt in ("a (<spot>:0.5)", "a <tom> at night"))

    def read(conditioning) -> Context:
        return context_of(conditioning, 1, ("spot", "tom"), sites)

    def of(context: Context, name: str) -> tuple[tuple[int, ...], set[float]]:
        places = context.words[0].get(name, ())
        return places, set(context.strengths[0][name]) if context.strengths else {1.0}

    first, (places, _) = read(one), of(read(two), "tom")
    weight, = of(first, "spot")[1]      # 1 where the host ignores weights
    joined = read(stock.ConditioningConcat().concat(one, two)[0])
    assert of(joined, "spot") == of(first, "spot")
    assert of(joined, "tom") == (tuple(first.hidden.shape[2] + place for place in places), {1.0})
    average = stock.ConditioningAverage().addWeighted(one, two, 0.25)[0]
    kept = tuple(place for place in places if place < first.hidden.shape[2])
    assert kept and of(read(average), "tom") == (kept, {0.75})
    assert of(read(average), "spot") == (of(first, "spot")[0], {0.25 * weight})
    if hasattr(stock, "ConditioningMultiply"):      # older versions have no such node
        half = read(stock.ConditioningMultiply().multiply(one, 0.5)[0])
        assert of(half, "spot") == (of(first, "spot")[0], {0.5 * weight})
    negative = ours.encode(clip, "")
    plain = [[states.plain, extra] for states, extra in average]      # with the first prompt's dictionary
    drawn, other = (ours.ksampler(model, each, negative, steps=2) for each in (average, plain))
    assert torch.isfinite(drawn).all() and distance(other, drawn) > 1e-4
    zeros = [stock.ConditioningZeroOut().zero_out(each)[0] for each in (one, ours.encode(ours.clip, "a dog"))]
    positive = ours.encode(clip, "a red dog")
    if zeros[0][0][0].shape == zeros[1][0][0].shape:
        assert distance(*(ours.ksampler(model, positive, zero, steps=2) for zero in zeros)) < 1e-4


def weights_are_read_as_in_plain_comfyui_and_those_of_concepts_act(ours, bank) -> None:
    """Also where the host's tokenizer takes parentheses and weights as text."""
    from continual_concepts.core.comfy.apply import context_of
    from continual_concepts.core.comfy.families import find_sites
    from continual_concepts.core.comfy.text import row_tokens, text_widths

    sites, clip = find_sites(ours.model, text_widths(ours.clip)), ours.aggregate("", bank)[1]
    told = row_tokens(ours.clip.tokenize("a (red:1.3) dog"))
    assert sites.reads_weights == any(weight != 1.0 for _, weight, *_ in told)
    text = r"a (red) ((big)) (old:1.3) dog \(in snow\)"
    assert torch.equal(ours.encode(clip, text)[0][0], ours.encode(ours.clip, text)[0][0])
    weighted, dogs = ours.encode(clip, "a (<spot>:0.5), <spot:0.25> and <spot>"), "dog dog dog dog"
    # a host that reads weights splits the text at parentheses
    plain = (f"a {dogs}, {dogs} and {dogs}", f"a ({dogs}:1.0), ({dogs}:1.0) and {dogs}")
    assert any(torch.equal(weighted[0][0], ours.encode(ours.clip, each)[0][0]) for each in plain)
    factors = context_of(weighted, 1, ("spot",), sites).strengths[0]["spot"]
    assert [factors.count(factor) for factor in (0.5, 0.25, 1.0)] == [4, 4, 4]
