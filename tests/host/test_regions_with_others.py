"""Regions together with other nodes: ControlNet, image prompts, LoRA loaders, every sampler, no negatives."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
SCENE = "a photo in a meadow"
MORE = {"solo": {"solo": 0.4}, "found": {"find_regions": True}, "plain": {}}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def halves(studio, **other) -> list:
    return [studio.region("<rex> in a meadow", right=0.5, **other),
            studio.region("<mimi> in a meadow", left=0.5, **other)]


def samplers() -> list[str]:
    try:
        import comfy.samplers
    except ImportError:
        return ["euler"]      # the module is skipped anyway
    # they take as long as they like
    return [name for name in comfy.samplers.KSampler.SAMPLERS if "adaptive" not in name]


@pytest.fixture
def every_sampler(comfyui):
    return samplers()


@pytest.mark.parametrize("more", MORE)
def test_every_sampler_samples_with_regions_and_twice_the_same(studio, every_sampler, more):
    """Multi-step, ancestral, SDE, restarting ones: what they keep from step to step is the latent's own."""
    wrong = []
    for sampler in every_sampler:
        regions, scene = (None, "a photo of <rex> and <mimi>") if more == "found" else (halves(studio), SCENE)
        one = studio.regional(scene, regions or (), studio.bank, sampler_name=sampler, steps=4, **MORE[more])
        if not torch.isfinite(one).all() or one.std() < 1e-3:
            wrong.append(sampler)
    assert not wrong and len(every_sampler) > 20
    again = [studio.regional(SCENE, halves(studio), studio.bank, sampler_name="dpmpp_2m_sde", steps=4,
                             solo=0.4) for _ in range(2)]
    assert torch.equal(*again)


class Control:
    """A ControlNet as the sampler sees one: residuals for the UNet's blocks, of the frame's size."""

    def __init__(self, strength: float) -> None:
        import comfy.controlnet

        class Net(comfy.controlnet.ControlBase):
            def __init__(self) -> None:
                super().__init__()
                self.sizes = []

            def get_control(self, x, t, cond, batched_number, transformer_options):
                self.sizes.append(tuple(x.shape[-2:]))
                pattern = torch.randn(x.shape[0], 96, 4, 4, generator=torch.Generator().manual_seed(3))
                return {"middle": [strength * pattern.to(x)], "output": [], "input": []}

            def pre_run(self, model, percent_to_timestep_function):
                pass

            def copy(self):
                return self

            def get_models(self):
                return []

        self.net = Net()

    def on(self, conditioning):
        return [[hidden, {**extra, "control": self.net, "control_apply_to_uncond": True}]
                for hidden, extra in conditioning]


def test_a_controlnet_acts_with_regions_and_sees_whole_frames(studio):
    positive, negative = studio.encode(studio.clip, SCENE), studio.encode(studio.clip, "")
    control = Control(3.0)
    plain = studio.regional(SCENE, halves(studio), studio.bank, positive=positive, negative=negative,
                            solo=0.4)
    found = studio.regional(SCENE, halves(studio), studio.bank, positive=control.on(positive),
                            negative=control.on(negative), solo=0.4)
    assert torch.isfinite(found).all() and distance(found, plain) > 1e-3
    assert set(control.net.sizes) == {(16, 16)}
    off = Control(0.0)
    same = studio.regional(SCENE, halves(studio), studio.bank, positive=off.on(positive),
                           negative=off.on(negative), solo=0.4)
    assert distance(same,
                    studio.regional(SCENE, halves(studio), studio.bank, positive=positive, negative=negative,
                                    solo=0.0)) < 1e-5


def image_prompted(model, size: float = 1.0):
    """As an image prompt adapter: attention to a picture's tokens on top of the text's."""
    from comfy.ldm.modules.attention import optimized_attention

    def replace(q, k, v, options):
        tokens = torch.randn(q.shape[0], 4, q.shape[-1],
                             generator=torch.Generator().manual_seed(q.shape[-1])).to(q)
        plain = optimized_attention(q, k, v, options["n_heads"])
        return plain + size * optimized_attention(q, tokens, tokens, options["n_heads"])

    clone = model.clone()
    for block in (("input", 3), ("input", 4), ("middle", 0), ("output", 2), ("output", 3)):
        clone.set_model_attn2_replace(replace, *block, 0)
    return clone


def test_an_image_prompt_acts_inside_regions_too(studio):
    """Two regions that cover everything leave the scene no place of its own; the image prompt is there all
    the same."""
    plain = studio.regional(SCENE, halves(studio), studio.bank)
    with_image = studio.regional(SCENE, halves(studio), studio.bank, model=image_prompted(studio.model))
    assert torch.isfinite(with_image).all() and distance(with_image, plain) > 1e-2
    without = studio.regional(SCENE, halves(studio), studio.bank, model=image_prompted(studio.model, 0.0))
    assert distance(without, plain) < 1e-4
    prompt = "<rex> in a meadow"
    one = studio.regional(SCENE, [studio.region(prompt)], studio.bank, model=image_prompted(studio.model))
    model, clip, positive = studio.aggregate(prompt, studio.bank, model=image_prompted(studio.model))
    assert distance(one, studio.ksampler(model, positive, studio.encode(clip, ""))) < 1e-3


def lora_of(studio, size: float) -> dict:
    """A LoRA of somebody else's on keys and queries of cross-attention and on one of self-attention."""
    generator, found = torch.Generator().manual_seed(7), {}
    for key, weight in studio.model.model.state_dict().items():
        if key.endswith(("attn2.to_k.weight", "attn2.to_q.weight", "attn1.to_v.weight")):
            name = key.removesuffix(".weight")
            found[f"{name}.lora_up.weight"] = size * torch.randn(weight.shape[0], 2, generator=generator)
            down = torch.randn(2, weight.shape[1], generator=generator)
            found[f"{name}.lora_down.weight"] = down * weight.shape[1]**-0.5
    return found


def test_a_lora_acts_in_scene_and_regions(studio):
    """Loaded before us; with strength 0 nothing changes, and a region over everything is its prompt with the
    LoRA."""
    import comfy.sd

    prompt = "<rex> in a meadow"
    loaded, empty = (comfy.sd.load_lora_for_models(studio.model, None, lora_of(studio, size), 1.0, 0.0)[0]
                     for size in (0.5, 0.0))
    plain = studio.regional(SCENE, halves(studio), studio.bank)
    assert distance(studio.regional(SCENE, halves(studio), studio.bank, model=empty), plain) < 1e-4
    assert distance(studio.regional(SCENE, halves(studio), studio.bank, model=loaded), plain) > 1e-2
    one = studio.regional(SCENE, [studio.region(prompt)], studio.bank, model=loaded)
    model, clip, positive = studio.aggregate(prompt, studio.bank, model=loaded)
    assert distance(one, studio.ksampler(model, positive, studio.encode(clip, ""))) < 1e-3
    assert torch.equal(plain, studio.regional(SCENE, halves(studio), studio.bank))      # nothing of it stays


@pytest.mark.parametrize("more", MORE)
def test_without_guidance_and_without_negatives(studio, more):
    """CFG 1, as turbo and distilled models want: one half, whatever the negative prompt says."""
    scene, regions = ("<rex> and <mimi>", ()) if more == "found" else (SCENE, halves(studio))
    one, two = (studio.regional(scene, regions, studio.bank, cfg=1.0, negative_scene=text, steps=4,
                                **MORE[more]) for text in ("", "blue"))
    assert torch.equal(one, two) and torch.isfinite(one).all()


@pytest.mark.parametrize("more", MORE)
def test_pictures_of_a_batch_have_their_own_noise_and_the_same_regions(studio, more):
    scene, regions = ("<rex> and <mimi>", ()) if more == "found" else (SCENE, halves(studio))
    found = studio.regional(scene, regions, studio.bank, latent=studio.latent(3), steps=4, **MORE[more])
    assert found.shape[0] == 3 and distance(found[0], found[1]) > 1e-2 and distance(found[1], found[2]) > 1e-2


@pytest.mark.parametrize("feather", [0.0, 0.2])
def test_another_attention_is_used_in_regions_too(studio, feather):
    """As nodes for SageAttention set it; cells in their places or not."""
    calls, model = [], studio.model.clone()

    def other(host, query, key, value, *args, **kwargs):
        calls.append(key.shape[1] != query.shape[1])      # at a text
        return host(query, key, value, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = other
    regions = halves(studio, feather=feather)
    found = studio.regional("a photo in a meadow", regions, studio.bank, model=model)
    assert any(calls) and torch.equal(found, studio.regional("a photo in a meadow", regions, studio.bank))
