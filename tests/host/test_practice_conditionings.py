"""ComfyUI's nodes that compute with conditionings, on conditionings that carry concepts."""

from __future__ import annotations

import copy
import io

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def by_hand(conditioning):
    """The same CONDITIONING as a plain tensor with model conditions."""
    from continual_concepts.core.comfy.prompt_states import carried_by

    states, conditions = carried_by(conditioning)
    return [[states, {**conditioning[0][1], "model_conds": conditions}]]


def test_g5_concat_carries_concepts_along(studio, draw, carrying, contents):
    one, two = (studio.encode(carrying[1], text) for text in ("a dog and <rex>", "a <mimi:0.5> at night"))
    joined = studio.stock.ConditioningConcat().concat(one, two)[0]
    found, first, second = (contents(each) for each in (joined, one, two))
    assert torch.equal(found.hidden, torch.cat([first.hidden, second.hidden], 2))
    length = first.hidden.shape[2]
    shifted = {name: tuple(length + place for place in places) for name, places in second.words[0].items()}
    assert found.words == ({**first.words[0], **shifted},) and found.strengths[0]["mimi"] == (0.5, 0.5)
    latents = draw(joined)
    assert torch.equal(latents, draw(by_hand(joined)))
    dropped = [[joined[0][0].plain, joined[0][1]]]      # with the first prompt's dictionary alone
    assert distance(draw(dropped), latents) > 1e-3


@pytest.mark.parametrize("clip_of_to", ["plain", "with concepts"])
def test_g5_average_carries_concepts_along(studio, draw, carrying, clip_of_to, contents):
    clip = studio.clip if clip_of_to == "plain" else carrying[1]
    one, two = studio.encode(clip, "a photo of a dog"), studio.encode(carrying[1], "a photo of <rex>")
    average = studio.stock.ConditioningAverage().addWeighted(one, two, 0.25)[0]
    found, first, second = (contents(each) for each in (average, one, two))
    assert torch.allclose(found.hidden, 0.25 * first.hidden + 0.75 * second.hidden, atol=1e-6)
    assert found.words == second.words and found.strengths == ({"rex": (0.75, 0.75)},)
    assert torch.equal(draw(average), draw(by_hand(average)))
    whole = studio.stock.ConditioningAverage().addWeighted(one, two, 0.0)[0]
    assert distance(draw(whole), draw(two)) < 1e-4


def test_g5_sibling_one_place_with_two_concepts(studio, draw, carrying, contents):
    one, two = (studio.encode(carrying[1], f"a {name}") for name in ("<rex>", "<mimi>"))
    average = studio.stock.ConditioningAverage().addWeighted(one, two, 0.5)[0]
    found = contents(average)
    assert found.words[0] == {"rex": (2, 3), "mimi": (2, 3)} and set(found.strengths[0]["rex"]) == {0.5}
    alone = [draw(each) for each in (average, one, two)]
    assert min(distance(alone[0], other) for other in alone[1:]) > 1e-3
    together = studio.ksampler(carrying[0], average, studio.encode(carrying[1], "a <mimi>"), steps=2)
    assert torch.isfinite(together).all()


@pytest.fixture
def scheduled(studio):
    """scheduled(clip): the CLIP with hooks that change nothing, scheduled in two halves."""
    import comfy.hooks
    from comfy_extras.nodes_hooks import SetClipHooks

    def hooked(clip):
        fc = studio.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp.fc1.weight
        name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
        lora = {f"{name}.lora_up.weight": torch.zeros(fc.shape[0], 2),
                f"{name}.lora_down.weight": torch.zeros(2, fc.shape[1]), f"{name}.alpha": torch.tensor(2.0)}
        group, keyframes = comfy.hooks.create_hook_lora(lora, 1.0, 1.0), comfy.hooks.HookKeyframeGroup()
        for start, strength in ((0.0, 1.0), (0.5, 0.5)):
            keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        group.set_keyframes_on_hooks(keyframes)
        return SetClipHooks().apply_hooks(clip, schedule_clip=True, apply_to_conds=False, hooks=group)[0]

    return hooked


def test_g5_scheduled_hooks_carry_concepts_along(studio, draw, carrying, scheduled, contents):
    plain, text = studio.encode(carrying[1], "a <rex> in a park"), "a <rex> in a park"
    halves = studio.encode(scheduled(carrying[1]), text)
    assert [(entry[1]["clip_start_percent"], entry[1]["clip_end_percent"]) for entry in halves] == \
        [(0.0, 0.5), (0.5, 1.0)]
    for entry in halves:
        found, expected = contents([entry]), contents(plain)
        assert torch.equal(found.hidden, expected.hidden) and found.words == expected.words
    assert distance(draw(halves), draw(plain)) < 1e-4


def test_g5_sibling_nodes_that_keep_the_states(studio, draw, carrying, contents):
    nodes, one = studio.stock, studio.encode(carrying[1], "a <rex:0.5>")
    expected = contents(one)
    kept = [nodes.ConditioningSetTimestepRange().set_range(one, 0.0, 0.7)[0],
            nodes.ConditioningCombine().combine(one, studio.encode(carrying[1], "a dog"))[0],
            nodes.ConditioningSetArea().append(one, 64, 64, 0, 0, 1.0)[0],
            nodes.ConditioningSetMask().append(one, torch.ones(1, 16, 16), "default", 1.0)[0]]
    for conditioning in kept:
        found = contents(conditioning[:1])
        assert torch.equal(found.hidden, expected.hidden) and found.strengths == expected.strengths
        assert torch.isfinite(draw(conditioning)).all()


def test_g5_sibling_zero_out_and_multiply(studio, draw, carrying, contents):
    one, nodes = studio.encode(carrying[1], "a <rex>"), studio.stock
    zero = nodes.ConditioningZeroOut().zero_out(one)[0]
    assert not contents(zero).hidden.any() and torch.isfinite(draw(zero)).all()
    if hasattr(nodes, "ConditioningMultiply"):
        half = contents(nodes.ConditioningMultiply().multiply(one, 0.5)[0])
        assert torch.allclose(half.hidden, 0.5 * contents(one).hidden, atol=1e-6)
        assert half.strengths == ({"rex": (0.5, 0.5)},)


def test_g5_sibling_prompts_of_several_chunks(studio, draw, carrying, contents):
    long = "a photo of a cat, " + "in a green meadow with a red ball, " * 6 + "<mimi> at night"
    one, two = (studio.encode(carrying[1], text) for text in (long, "a <rex>"))
    nodes = studio.stock
    joined = contents(nodes.ConditioningConcat().concat(one, two)[0])
    assert joined.words[0]["rex"] == (one[0][0].shape[1] + 2, one[0][0].shape[1] + 3)
    assert joined.words[0]["mimi"] == contents(one).words[0]["mimi"]
    for to, other in ((one, two), (two, one)):
        average = nodes.ConditioningAverage().addWeighted(to, other, 0.5)[0]
        assert "rex" in contents(average).words[0] and torch.isfinite(draw(average)).all()


def test_g5_sibling_states_are_an_ordinary_tensor_elsewhere(studio, carrying):
    """Files hold plain tensors, other operations give plain tensors, copies stay complete."""
    states = studio.encode(carrying[1], "a <rex>")[0][0]
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert type(loaded) is torch.Tensor and torch.equal(loaded, states.plain)
    for plain in (states.softmax(-1), states @ torch.ones(states.shape[-1], 3), states[0], states.mean(1),
                  states + 1.0, states.flatten(1), torch.zeros_like(states)):
        assert type(plain) is torch.Tensor
    for moved in (states.half(), states.to(torch.float64), states.clone(), states.repeat(2, 1, 1)):
        assert moved.carried.shape[:2] == moved.shape[:2] and moved.carried.dtype == moved.dtype
    assert torch.equal(copy.deepcopy(states).as_subclass(torch.Tensor), states.plain)


def test_g5_sibling_a_model_without_concepts_takes_the_states(studio, carrying):
    positive, negative = (studio.encode(carrying[1], text) for text in ("a <rex>", ""))
    plain = [[positive[0][0].plain, {"pooled_output": positive[0][1].get("pooled_output")}]]
    assert distance(studio.ksampler(studio.model, positive, negative),
                    studio.ksampler(studio.model, plain, "")) < 1e-4
