"""Permuted cells in ComfyUI: the same pictures, and only where no other node's code is in between. And crops
in one batch."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
PROMPTS = ("<rex>", "a photo of <mimi>", "<blueprint> of a car", "a red ball")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def entered(monkeypatch):
    """For every call of a site from here on: whether its cells were permuted, and whether it read no text."""
    from continual_concepts.core.comfy.families import unet
    from continual_concepts.core.regional import processor as processor

    seen, enter, begin = {"entered": [], "no text": []}, processor.RegionProcessor.enter, unet.Begin.__call__

    def asked(self, call):
        before = call.hidden
        enter(self, call)
        seen["entered"].append(call.hidden is not before)

    def begun(self, *args):
        inputs = begin(self, *args)
        seen["no text"].append(inputs[1].shape[1] == 0)
        return inputs

    monkeypatch.setattr(processor.RegionProcessor, "enter", asked)
    monkeypatch.setattr(unet.Begin, "__call__", begun)
    return seen


def drawn(studio, kind: str, **other):
    regions = [studio.region(prompt, left=i / 4, right=(i + 1) / 4) for i, prompt in enumerate(PROMPTS)]
    if kind == "island":
        regions = [studio.region("<rex>", left=0.25, right=0.75, top=0.25, bottom=0.75)]
    latent = studio.latent(2, 32, 32)
    return studio.regional("a photo in a meadow", regions, studio.bank, latent=latent, **other)


@pytest.mark.parametrize("kind, sampler",
                         [("columns", "euler"), ("columns", "dpmpp_sde"), ("island", "euler")])
def test_pictures_are_the_same(studio, entered, kind, sampler, monkeypatch):
    from continual_concepts.core.comfy.families import unet
    from continual_concepts.core.regional import processor as processor

    one = drawn(studio, kind, sampler_name=sampler)
    assert any(entered["entered"]) and any(entered["no text"]) == (kind == "columns")
    entered["no text"].clear()
    # weights of another kind: the text is projected, and the result is not used
    monkeypatch.setattr(unet, "is_plain", lambda _: False)
    two = drawn(studio, kind, sampler_name=sampler)
    assert not any(entered["no text"])
    monkeypatch.setattr(processor.RegionProcessor, "enter", lambda *_: None)
    three = drawn(studio, kind, sampler_name=sampler)
    assert distance(one, two) < 1e-5 and distance(one, three) < 1e-4


@pytest.mark.parametrize("is_permuted", [False, True])
def test_outside_the_region_is_nothing_of_its_words(studio, monkeypatch, is_permuted):
    """Outside the region the sites give the scene's output: bit for bit, or to rounding where the cells are
    permuted. Only self-attention and convolutions carry the region further."""
    from continual_concepts.core.regional import processor as processor

    seen, attend, enter = [], processor.RegionProcessor.attend, processor.RegionProcessor.enter

    def attending(self, call, query, key, value, attention):
        out = attend(self, call, query, key, value, attention)
        outside = self.cover(query.shape[1], query.device).weights[0].sum(-1) == 0
        seen.append(torch.equal(out[:, outside], attention(query, key, value)[:, outside]))
        return out

    def entering(self, call):
        rows, cells = call.hidden.shape[:2]
        enter(self, call)
        inner = call._attend_reordered
        scene = rows * int((self.cover(cells, call.hidden.device).scene == 1).sum())

        def attending(query, key, value, attention):
            out = inner(query, key, value, attention)
            # the scene's cells come last
            found, asked = (x[:, -scene:].reshape(rows, -1, x.shape[-1]) for x in (out, query))
            seen.append(torch.allclose(found, attention(asked, key, value), atol=1e-5))
            return out

        call._attend_reordered = attending

    monkeypatch.setattr(processor.RegionProcessor, "enter", entering if is_permuted else lambda *_: None)
    monkeypatch.setattr(processor.RegionProcessor, "attend", attend if is_permuted else attending)
    studio.regional("a photo in a meadow", [studio.region("<rex>", right=0.5)], studio.bank)
    assert seen and all(seen)


@pytest.mark.parametrize("kind", ["output", "replacement"])
def test_cells_keep_their_places_where_another_nodes_code_is_in_between(studio, entered, kind):
    model = studio.model.clone()
    if kind == "output":
        model.set_model_attn2_output_patch(lambda n, options: 0.9 * n)
    else:
        model.set_model_attn2_replace(lambda q, k, v, options: q, "middle", 0, 0)
    drawn(studio, "columns", model=model)
    assert not entered["entered"] and not any(entered["no text"])


def test_cells_are_permuted_after_another_nodes_code(studio, entered):
    model = studio.model.clone()
    model.set_model_attn2_patch(lambda n, context, value, options: (1.1 * n, context, value))
    drawn(studio, "columns", model=model)
    assert any(entered["entered"])


@pytest.mark.parametrize("other", ["nobody", "output", "cfg"])
def test_crops_in_one_batch_are_crops_one_by_one(studio, monkeypatch, other):
    from continual_concepts.core.sampling import denoise

    model, batches, calls = studio.model.clone(), [], {}
    if other == "output":
        model.set_model_attn2_output_patch(lambda n, options: 0.9 * n)
    elif other == "cfg":
        model.set_model_sampler_cfg_function(lambda args: args["cond"] + 2 * (args["cond"] - args["uncond"]))
    four = [studio.region(prompt, left=i % 2 / 2, right=(i % 2 + 1) / 2, top=i // 2 / 2,
                          bottom=(i // 2 + 1) / 2)
            for i, prompt in enumerate(PROMPTS)]

    def drawn(name: str):
        batches.clear()
        found = studio.regional("a photo in a meadow", four, studio.bank, steps=4, solo=0.5,
                                latent=studio.latent(2, 32, 32), model=model)
        calls[name] = list(batches)
        return found

    def counting(_unet, inputs) -> None:
        batches.append(len(inputs[0]))

    hook = model.model.diffusion_model.register_forward_pre_hook(counting)
    try:
        together = drawn("together")
        monkeypatch.setattr(denoise, "batches_of", lambda crops, _most: [[i] for i in range(len(crops))])
        apart = drawn("apart")
    finally:
        hook.remove()
    assert calls["together"] == [16, 16, 4,
                                 4] and calls["apart"] == [4] * 10 and distance(together, apart) < 1e-4
