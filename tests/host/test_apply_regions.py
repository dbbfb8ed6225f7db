"""Regions as MODEL and CONDITIONING: the sampler's picture in ComfyUI's own samplers."""

from __future__ import annotations

import inspect

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
SCENE = "a photo of <blueprint> in a meadow"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def halves(studio) -> list:
    return [studio.region("<rex> in a meadow", right=0.5, negative="a cat"),
            studio.region("<mimi> in a meadow", left=0.5)]


def applied(studio, bank, scene=SCENE, regions=None, **other):
    """model, positive and negative behind Apply Concepts and Apply Regions."""
    model, clip, positive = studio.aggregate(scene, bank)
    regions = halves(studio) if regions is None else regions
    return studio.apply_regions(regions, positive, studio.encode(clip, ""), model, clip, **other)


@pytest.mark.parametrize("settings", [{}, {"solo": 0.5, "overlap": "priority"}])
@pytest.mark.parametrize("kind", ["prompt-activated", "word-bound"])
def test_the_picture_is_the_samplers(studio, word_bound, kind, settings):
    """Bit for bit, in a batch, at two sizes one after the other."""
    bank = word_bound if kind == "word-bound" else studio.bank
    model, positive, negative = applied(studio, bank, **settings)
    for latent in (studio.latent(2), studio.latent(1, 8, 24)):
        ours = studio.regional(SCENE, halves(studio), bank, latent=latent, **settings)
        assert torch.equal(studio.ksampler(model, positive, negative, latent), ours)


def test_no_regions_leave_everything_as_it_is(studio):
    positive, negative = (studio.encode(studio.clip, text) for text in ("a dog", "blurry"))
    for regions in ([], [studio.region("a cat", strength=0.0)]):
        out = studio.apply_regions(regions, positive, negative)
        assert out[0] is studio.model and out[1] is positive and out[2] is negative
        assert torch.equal(studio.ksampler(*out), studio.ksampler(studio.model, "a dog", "blurry"))


def test_faint_regions_are_the_plain_picture(studio):
    """Nothing but the regions acts."""
    positive, negative = (studio.encode(studio.clip, text) for text in ("a dog", "blurry"))
    faint = studio.apply_regions([studio.region("a cat", right=0.5, strength=1e-6)], positive, negative)
    assert distance(studio.ksampler(*faint), studio.ksampler(studio.model, "a dog", "blurry")) < 1e-4


def test_a_b_a(studio):
    """One model for several samplings, in between with other weights behind it; nothing is kept."""

    model, positive, negative = applied(studio, studio.bank)
    first = studio.ksampler(model, positive, negative)
    other = model.clone()
    keys = [key for key in model.model.state_dict() if key.endswith("attn2.to_k.weight")]
    weights = model.model.state_dict()
    other.add_patches({key: ("diff", (0.5 * torch.ones_like(weights[key]),)) for key in keys})
    changed = studio.ksampler(other, positive, negative)
    assert torch.equal(studio.ksampler(model, positive, negative), first) and distance(changed, first) > 1e-3


def sampled(studio, guider, latent, steps=3):
    import comfy.samplers

    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    noise = torch.randn(latent["samples"].shape, generator=torch.manual_seed(1))
    return guider.sample(noise, latent["samples"], comfy.samplers.sampler_object("euler"), sigmas, seed=1)


def test_guiders_of_custom_samplers(studio):
    """A guider numbers its prompts as it likes: regions follow their prompts, and others have none."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    model, positive, negative = applied(studio, studio.bank)
    latent = studio.latent()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(4.0)
    expected = studio.ksampler(model, positive, negative, latent)
    assert torch.equal(sampled(studio, guider, latent), expected)
    both, plain = Guider_DualCFG(model), studio.encode(studio.clip, "a photo")
    both.set_conds(positive, plain, negative)
    both.set_cfg(4.0, 4.0)
    assert distance(sampled(studio, both, latent), expected) < 1e-4      # the middle prompt cancels out
    both.set_cfg(4.0, 2.0)
    assert distance(sampled(studio, both, latent), expected) > 1e-3


def test_prompts_without_regions(studio):
    """A plain prompt beside ours is drawn as without regions."""
    positive, negative = (studio.encode(studio.clip, text) for text in ("a dog", "blurry"))
    model, ours, _ = studio.apply_regions([studio.region("a red ball", right=0.5)], positive, negative)
    found = studio.ksampler(model, ours, negative, cfg=4.0)
    assert torch.isfinite(found).all()
    with pytest.raises(Exception, match="no conditioning of the node that applied them reaches the sampler"):
        studio.ksampler(model, positive, negative)


def test_an_area_shows_its_part_of_the_layout(studio):
    """A prompt for a part of the picture has the regions of that part."""
    import nodes

    model, positive, negative = applied(studio, studio.bank)
    whole = nodes.ConditioningSetAreaPercentage().append(positive, 1.0, 1.0, 0.0, 0.0, 1.0)[0]
    expected = studio.ksampler(model, positive, negative)
    assert distance(studio.ksampler(model, whole, negative), expected) < 1e-4
    left = nodes.ConditioningSetAreaPercentage().append(positive, 0.5, 1.0, 0.0, 0.0, 1.0)[0]
    right_only = [halves(studio)[1]]
    without = applied(studio, studio.bank, regions=right_only)
    within = nodes.ConditioningSetAreaPercentage().append(without[1], 0.5, 1.0, 0.0, 0.0, 1.0)[0]
    found = studio.ksampler(without[0], within, without[2])
    assert distance(studio.ksampler(model, left, negative), found) > 1e-3


def test_tiles_that_do_not_say_where_they_are_are_refused(studio):
    model, positive, negative = applied(studio, studio.bank)
    model = model.clone()

    def tiled(apply_model, args):
        return torch.cat([apply_model(tile, args["timestep"], **args["c"])
                          for tile in args["input"].chunk(2, -1)], -1)

    model.set_model_unet_function_wrapper(tiled)
    with pytest.raises(Exception, match="in parts of 8x16 and does not say where they are"):
        studio.ksampler(model, positive, negative)


def test_regions_twice_are_refused(studio):
    model, positive, negative = applied(studio, studio.bank)
    for call in (lambda: studio.apply_regions(halves(studio), positive, negative, model,
                                              studio.aggregate("", studio.bank)[1]),
                 lambda: studio.aggregate("<rex>", studio.bank, model=model),
                 lambda: studio.regional(SCENE, halves(studio), studio.bank, model=model)):
        with pytest.raises(Exception, match="the model has regions already; connect all regions to one"):
            call()


@pytest.mark.parametrize("keyframes", [False, True])
def test_weight_hooks_act_in_regions(studio, keyframes):
    """A LoRA hook on the positive prompt alone, the same in every step or in the second half. A region over
    everything is its prompt."""
    import comfy.hooks

    positive, negative = (studio.encode(studio.clip, text) for text in ("a red ball", "blurry"))
    weights = studio.model.model.state_dict()
    lora = {}
    for key in (key for key in weights if key.endswith("attn2.to_k.weight")):
        (rows, columns), name = weights[key].shape, key.removesuffix(".weight")
        random = torch.randn(rows + columns, generator=torch.manual_seed(3))
        lora |= {f"{name}.lora_up.weight": 0.5 * random[:rows, None],
                 f"{name}.lora_down.weight": random[None, rows:]}
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    if keyframes:
        frames = comfy.hooks.HookKeyframeGroup()
        for strength, start in ((0.0, 0.0), (1.0, 0.4)):
            frames.add(comfy.hooks.HookKeyframe(strength, start_percent=start))
        hooks.set_keyframes_on_hooks(frames)
    hooked = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    expected = studio.ksampler(studio.model, hooked, negative, steps=4)
    assert distance(expected, studio.ksampler(studio.model, positive, negative, steps=4)) > 1e-2
    model, ours, theirs = studio.apply_regions([studio.region("a red ball")], positive, negative)
    ours = comfy.hooks.set_hooks_for_conditioning(ours, hooks)
    assert distance(studio.ksampler(model, ours, theirs, steps=4), expected) < 1e-3


def test_windows_of_a_batch(studio):
    """A node that evaluates a long batch in windows."""
    windows = pytest.importorskip("comfy_extras.nodes_context_windows")
    node = windows.ContextWindowsManualNode
    if "freenoise" not in inspect.signature(node.execute).parameters:
        pytest.skip("the windows of this ComfyUI fail with a plain model too")
    model, positive, negative = applied(studio, studio.bank)
    latent = studio.latent(4)
    whole = studio.ksampler(model, positive, negative, latent, steps=2)
    windowed = node.execute(model, 2, 0, "standard_static", 1, False, "flat", 0, False)[0]
    assert distance(studio.ksampler(windowed, positive, negative, latent, steps=2), whole) < 1e-3
