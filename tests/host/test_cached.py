"""Keys and values of word-bound concepts are cached from step to step: the same pictures, and never the cache
of another text or of other weights."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui")


@pytest.fixture
def calls(monkeypatch):
    """For every call of a site from here on, whether its keys and values were cached."""
    from continual_concepts.core.attention.cached import CachedTokenLora

    seen, enter = [], CachedTokenLora.enter

    def entered(self, call):
        enter(self, call)
        seen.append(not call.reads_text)

    monkeypatch.setattr(CachedTokenLora, "enter", entered)
    return seen


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def uncached(model):
    """The same MODEL with another node's patch that changes nothing. What sites read is then unknown."""
    clone = model.clone()
    clone.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
    return clone


def both_ways(studio, model, positive, negative, calls, **other):
    """A picture with the cache, after a check that it is the same without."""
    calls.clear()
    cached = studio.ksampler(model, positive, negative, **other)
    assert any(calls)
    calls.clear()
    plain = studio.ksampler(uncached(model), positive, negative, **other)
    assert not calls and distance(cached, plain) < 1e-4
    return cached


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_sde", "dpm_2_ancestral"])
def test_pictures_are_the_same(studio, word_bound, calls, sampler):
    model, clip, positive = studio.aggregate("a <rex> and <mimi>", word_bound)
    both_ways(studio, model, positive, studio.encode(clip, "<blueprint>"), calls, sampler=sampler,
              latent=studio.latent(2))
    both_ways(studio, model, positive, studio.encode(clip, ""), calls, sampler=sampler, cfg=1.0)


def test_a_text_that_changes_while_sampling(studio, word_bound, calls):
    model, clip, _ = studio.aggregate("", word_bound)
    parts = []
    for prompt, start, end in (("a <rex>", 0.0, 0.5), ("a <mimi> at night", 0.5, 1.0)):
        parts += [[hidden, extra | {"start_percent": start, "end_percent": end}]
                  for hidden, extra in studio.encode(clip, prompt)]
    both_ways(studio, model, parts, studio.encode(clip, ""), calls, steps=6)


def test_two_prompts_at_once(studio, word_bound, calls):
    """They share a batch, or follow each other where memory is short. Neither takes the other's cache."""
    model, clip, _ = studio.aggregate("", word_bound)
    both_ways(studio, model, studio.encode(clip, "a <rex>") + studio.encode(clip, "a <mimi>"),
              studio.encode(clip, ""), calls)
    long = "a <mimi>, " + "very " * 90 + "green"
    both_ways(studio, model, studio.encode(clip, "a <rex>") + studio.encode(clip, long),
              studio.encode(clip, "<rex>"), calls)


def test_weights_that_change_between_samplings(studio, word_bound, calls):
    """A LoRA loader after the concepts shares their run with the model before it, whose sampling was
    interrupted."""
    import comfy.sd

    model, clip, positive = studio.aggregate("a <rex>", word_bound)
    negative, state = studio.encode(clip, ""), {}
    for key, weight in model.model.state_dict().items():
        if key.endswith("attn2.to_k.weight"):
            name, (a, b) = key.removesuffix(".weight"), weight.shape
            state[f"{name}.lora_up.weight"] = torch.full((a, 1), 0.3)
            state[f"{name}.lora_down.weight"] = torch.full((1, b), 0.3)
    changed, _ = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)
    first = both_ways(studio, model, positive, negative, calls)
    stopped, steps = model.clone(), []

    def stopping(function, arguments):
        steps.append(None)
        if len(steps) > 2:
            raise InterruptedError
        return function(arguments["input"], arguments["timestep"], **arguments["c"])

    stopped.set_model_unet_function_wrapper(stopping)
    with pytest.raises(InterruptedError):
        studio.ksampler(stopped, positive, negative)
    second = both_ways(studio, changed, positive, negative, calls)
    assert distance(first, second) > 1e-3 and torch.equal(first, studio.ksampler(model, positive, negative))


def test_weights_that_change_within_a_sampling(studio, word_bound, calls):
    """LoRA hooks whose strength changes while sampling: nothing is cached under them."""
    import comfy.hooks

    model, clip, positive = studio.aggregate("a <rex>", word_bound)
    key = next(key for key in model.model.state_dict() if key.endswith("attn2.to_k.weight"))
    a, b = model.model.state_dict()[key].shape
    name = key.removesuffix(".weight")
    hook = comfy.hooks.create_hook_lora({f"{name}.lora_up.weight": torch.full((a, 1), 0.3),
                                         f"{name}.lora_down.weight": torch.full((1, b), 0.3)}, 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.4)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hook.set_keyframes_on_hooks(frames)
    hooked = comfy.hooks.set_conds_props([positive], 1.0, "default", hooks=hook)[0]
    calls.clear()
    one = studio.ksampler(model, hooked, studio.encode(clip, ""))
    assert distance(one, studio.ksampler(uncached(model), hooked, studio.encode(clip, ""))) < 1e-4
    assert distance(one, studio.ksampler(model, positive, studio.encode(clip, ""))) > 1e-4


def test_nothing_stays_after_a_sampling(studio, word_bound):
    from continual_concepts.core.comfy.apply import processor_of

    model, clip, positive = studio.aggregate("a <rex>", word_bound)
    studio.ksampler(model, positive, studio.encode(clip, ""))
    assert processor_of(model)._cached == {}
