"""Graphs that people build around regions: caches, guidance nodes, models that carry concepts already."""

from __future__ import annotations

import importlib

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.sampling.settings import SampleSettings

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
SCENE = "a photo in a meadow"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def halves(studio, **other) -> list:
    return [studio.region("<rex> in a meadow", right=0.5, **other),
            studio.region("<mimi> in a meadow", left=0.5, **other)]


def extra(module: str, name: str, **inputs):
    """Output of one of ComfyUI's further nodes, in its old or new form; skips where this ComfyUI lacks it."""
    try:
        cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this ComfyUI has no {name}")
    call = cls.execute if hasattr(cls, "define_schema") else getattr(cls(), cls.FUNCTION)
    return call(**inputs)[0]


LAYOUTS = {"one": {"right": 0.5}, "two": {}}


def regions_of(studio, layout: str) -> list:
    return halves(studio)[:1] if layout == "one" else halves(studio)


def easy_cache(model, threshold: float):
    return extra("nodes_easycache", "EasyCacheNode", model=model, reuse_threshold=threshold,
                 start_percent=0.0, end_percent=1.0, verbose=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_g1_easycache_keeps_crops_and_frames_apart(studio, layout):
    """A cache that may reuse nothing changes nothing. One that may reuses frames, never crops."""
    def picture(threshold=None):
        model = studio.model if threshold is None else easy_cache(studio.model, threshold)
        return studio.regional(SCENE, regions_of(studio, layout), studio.bank, model=model, steps=7, solo=0.3)

    plain = picture()
    assert torch.equal(picture(0.0), plain)
    reused = picture(1.0)
    assert torch.isfinite(reused).all() and 1e-4 < distance(reused, plain) < 1.5


def test_g1_sibling_region_noise(studio):
    """Crops as large as the frame have its shape, and still no share in its cache."""
    plain, cached = (studio.regional(SCENE, halves(studio), studio.bank, model=model, steps=2,
                                     region_noise=True)
                     for model in (studio.model, easy_cache(studio.model, 0.0)))
    assert torch.equal(plain, cached)


def test_g1_sibling_lazycache(studio):
    """It stores whole steps, so it sees one prediction per step."""
    model = extra("nodes_easycache", "LazyCacheNode", model=studio.model, reuse_threshold=0.0,
                  start_percent=0.0, end_percent=0.6, verbose=False)
    plain, cached = (studio.regional(SCENE, halves(studio), studio.bank, model=m, steps=3, solo=0.5)
                     for m in (studio.model, model))
    assert torch.equal(plain, cached)


def test_g1_sibling_a_cache_behind_the_regions(studio):
    """Apply Regions first, EasyCache or LazyCache after it."""
    positive, negative = (studio.encode(studio.clip, text) for text in ("a dog", ""))
    regions = [studio.region("a red ball", right=0.5)]
    model, *prompts = studio.apply_regions(regions, positive, negative, solo=0.5)
    lazy = extra("nodes_easycache", "LazyCacheNode", model=model, reuse_threshold=0.0, start_percent=0.0,
                 end_percent=0.9, verbose=False)
    plain = studio.ksampler(model, *prompts)
    for cached in (easy_cache(model, 0.0), lazy):
        assert torch.equal(studio.ksampler(cached, *prompts), plain)


def remembering(seen: list):
    """A cache in a node's closure: every call is compared with the one before."""
    def wrapper(apply_model, args):
        seen.append(args["input"].clone())
        assert all(x.shape == seen[0].shape for x in seen)
        return apply_model(args["input"], args["timestep"], **args["c"])

    return wrapper


@pytest.mark.parametrize("level", ["function", "diffusion_model", "apply_model", "calc_cond_batch"])
def test_g1_sibling_wrappers_of_the_model_see_frames_only(studio, level):
    """At every level at which nodes keep caches; the frame is seen once per step."""
    seen: list = []
    model = studio.model.clone()
    if level == "function":
        model.set_model_unet_function_wrapper(remembering(seen))
    else:
        def wrapper(executor, *args, **kwargs):
            x = args[2] if level == "calc_cond_batch" else args[0]
            seen.append(x.clone())
            assert all(other.shape == seen[0].shape for other in seen)
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(level, "other", wrapper)
    plain, wrapped = (studio.regional(SCENE, regions_of(studio, "one"), studio.bank, model=m, steps=3,
                                      solo=0.4) for m in (studio.model, model))
    assert torch.equal(plain, wrapped) and len(seen) == 3


def apg(model, momentum):
    return extra("nodes_apg", "APG", model=model, eta=0.5, norm_threshold=5.0, momentum=momentum)


def counted_pre_cfg(model, shapes: list):
    model = model.clone()

    def before(args):
        shapes.append((tuple(args["input"].shape), tuple(args["conds_out"][0].shape)))
        return args["conds_out"]

    model.set_model_sampler_pre_cfg_function(before)
    return model


def test_g2_apg_with_momentum(studio):
    one, two = (studio.regional(SCENE, halves(studio), studio.bank, model=apg(studio.model, -0.5), steps=3,
                                solo=0.4) for _ in range(2))
    plain = studio.regional(SCENE, halves(studio), studio.bank, steps=3, solo=0.4)
    assert torch.equal(one, two) and torch.isfinite(one).all() and distance(one, plain) > 1e-4


@pytest.mark.parametrize("settings", [{"solo": 0.5}, {"region_noise": True, "noise_area": "crop"}])
def test_g2_sibling_functions_before_guidance_see_one_whole_picture_per_step(studio, settings):
    shapes: list = []
    model = counted_pre_cfg(studio.model, shapes)
    found = studio.regional(SCENE, regions_of(studio, "one"), studio.bank, model=model, steps=3, **settings)
    assert shapes == [(tuple(studio.noise().shape),) * 2] * 3
    assert torch.equal(found, studio.regional(SCENE, regions_of(studio, "one"), studio.bank, steps=3,
                                              **settings))


NODES = {
    "CFGNorm": ("nodes_cfg", "CFGNorm", {"strength": 1.0}),
    "Mahiro": ("nodes_mahiro", "Mahiro", {}),
    "NAG": ("nodes_nag", "NAGuidance", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}),
    "PAG": ("nodes_pag", "PerturbedAttentionGuidance", {"scale": 3.0}),
    "SAG": ("nodes_sag", "SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
    "RescaleCFG": ("nodes_model_advanced", "RescaleCFG", {"multiplier": 0.7}),
    "TCFG": ("nodes_tcfg", "TCFG", {}),
    "FreeU": ("nodes_freelunch", "FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
}


@pytest.mark.parametrize("node", NODES)
def test_g2_sibling_guidance_nodes(studio, node):
    """With crop denoising, the node acts."""
    module, name, inputs = NODES[node]
    if node == "FreeU" and not {2, 4} & set(studio.model.model.diffusion_model.channel_mult):
        pytest.skip("FreeU acts on levels two or four times as wide as the first; this base has none")
    model = extra(module, name, model=studio.model, **inputs)
    one, plain = (studio.regional(SCENE, halves(studio), studio.bank, model=m, steps=3, solo=0.5)
                  for m in (model, studio.model))
    assert torch.isfinite(one).all() and 1e-6 < distance(one, plain) < 3


def test_g2_sibling_guidance_from_the_models_own_attention_turns_crops_off(studio, caplog):
    """Self-Attention Guidance reads the attention of the whole picture, which crops do not have."""
    model = extra("nodes_sag", "SelfAttentionGuidance", model=studio.model, scale=0.5, blur_sigma=2.0)
    with_crops, without = (studio.regional(SCENE, halves(studio), studio.bank, model=model, steps=2,
                                           solo=solo) for solo in (0.5, 0.0))
    assert torch.equal(with_crops, without)
    assert "crop denoising is off: the prompt or the model carries another node's self-attention" in (
        caplog.text)


KINDS = {"prompt-activated": "cidm", "word-bound": "bound", "always on": "ewc"}
NAMED = "<rex> in a meadow"


@pytest.mark.parametrize("kind", KINDS)
def test_g4_a_model_that_carries_the_concepts_gives_the_same_picture(studio, of_method, kind):
    """Apply Concepts before the sampler, with the bank there, here, or at both: nothing twice."""
    bank = of_method(KINDS[kind])
    expected = studio.regional(NAMED, halves(studio), bank, steps=2)
    model, clip, _ = studio.aggregate(NAMED, bank)
    both = studio.regional(NAMED, halves(studio), bank, model=model, clip=clip, steps=2)
    alone = studio.regional(NAMED, halves(studio), None, model=model, clip=clip, steps=2)
    assert torch.equal(both, expected) and torch.equal(alone, expected)
    patches = {key: len(found) for key, found in model.patches.items()}
    twice, clip, conditioning = studio.aggregate(NAMED, bank, model=model, clip=clip)
    assert {key: len(found) for key, found in twice.patches.items()} == patches
    once = studio.ksampler(model, conditioning, studio.encode(clip, ""), steps=2)
    assert torch.equal(studio.ksampler(twice, conditioning, studio.encode(clip, ""), steps=2), once)


def test_g4_sibling_without_regions_and_with_two_banks(studio):
    """One bank in the model, another at the sampler: both act, each once, at its own strength."""
    first = ConceptBank(studio.bank.layout).add(studio.bank["rex"])
    second = ConceptBank(studio.bank.layout).add(studio.bank["mimi"])
    plain = studio.regional(NAMED, bank=first, steps=2)
    model, clip, _ = studio.aggregate(NAMED, first)
    assert torch.equal(studio.regional(NAMED, bank=first, model=model, clip=clip, steps=2), plain)
    assert torch.equal(studio.regional(NAMED, model=model, clip=clip, steps=2), plain)
    expected = studio.regional("in a meadow", halves(studio), studio.bank, steps=2)
    carrying, clip, _ = studio.aggregate("", first)
    found = studio.regional("in a meadow", halves(studio), second, model=carrying, clip=clip, steps=2)
    assert distance(found, expected) < 1e-5
    weak, clip, _ = studio.aggregate(NAMED, studio.bank, strength=0.5)
    assert torch.equal(studio.regional(NAMED, halves(studio), None, model=weak, clip=clip, steps=2),
                       studio.regional(NAMED, halves(studio), studio.bank, strength=0.5, steps=2))


def test_g4_sibling_a_clip_that_knows_more_than_the_model(studio):
    clip = studio.aggregate(NAMED, studio.bank)[1]
    with pytest.raises(Exception, match="names <rex>, which the CLIP knows, but neither the bank nor the"):
        studio.regional(SCENE, halves(studio), None, clip=clip, steps=2)


def test_g4_sibling_another_lora_between_stays(studio):
    """Taking a concept out of a model leaves other nodes' patches in it."""
    def with_lora(model):
        model = model.clone()
        key = next(key for key in model.model.state_dict() if key.endswith("attn2.to_k.weight"))
        model.add_patches({key: ("diff", (torch.ones_like(model.model.state_dict()[key]),))}, 0.3)
        return model

    model, clip, _ = studio.aggregate(NAMED, studio.bank)
    found = studio.regional(NAMED, halves(studio), studio.bank, model=with_lora(model), clip=clip, steps=2)
    expected = studio.regional(NAMED, halves(studio), studio.bank, model=with_lora(studio.model), steps=2)
    assert torch.equal(found, expected)
    assert distance(found, studio.regional(NAMED, halves(studio), studio.bank, steps=2)) > 1e-4


def test_g16_regions_for_any_sampler(studio):
    """More in test_apply_regions.py."""
    model, clip, positive = studio.aggregate(NAMED, studio.bank)
    applied = studio.apply_regions(halves(studio), positive, studio.encode(clip, ""), model, clip)
    expected = studio.regional(NAMED, halves(studio), studio.bank, steps=2)
    assert torch.equal(studio.ksampler(*applied, steps=2), expected)


def seen(studio, regions, **other):
    """The attention maps behind the sampler's picture."""
    from continual_concepts.core.comfy.region_sampling import Scene, prepare

    settings = SampleSettings(**other)
    ready = prepare(studio.model, studio.clip, studio.bank, Scene(SCENE), regions, (16, 16), settings)
    studio.ksampler(ready.model, ready.positive, ready.negative, steps=2)
    return ready.run.maps((16, 16))


def test_g11_the_attention_picture_shows_words_where_they_act(studio):
    left, right = seen(studio, halves(studio))
    assert left[:, :8].max() > 0.99 and not left[:, 8:].any()
    assert right[:, 8:].max() > 0.99 and not right[:, :8].any()


def test_g11_sibling_covered_and_weak_regions(studio):
    """A region under another one acts nowhere; a weak one is as dark as it acts."""
    covered = seen(studio, [studio.region("<rex>"), studio.region("<mimi>", left=0.5)], overlap="priority")
    assert covered[0].max() > 0.99 and not covered[1].any()
    weak, = seen(studio, [studio.region("<rex>", strength=0.5)])
    assert 0.4 < weak.max() <= 0.5
