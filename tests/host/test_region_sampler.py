"""Regions in real sampling: how much they cost, and what they touch."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
SCENE = "a photo in a meadow"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def columns(studio, count: int, **other) -> list:
    prompts = ["<rex>", "a photo of <mimi>", "<blueprint> of a car", "a red ball", "<rex> and <mimi>",
               "a (<mimi>:1.2) at night"]
    return [studio.region(prompts[i % 6], left=i / count, right=(i + 1) / count, **other)
            for i in range(count)]


@pytest.fixture
def calls(studio):
    """Batch sizes of the UNet's calls from here on."""
    seen = []
    unet = studio.model.model.diffusion_model
    hook = unet.register_forward_pre_hook(lambda _unet, inputs: seen.append(len(inputs[0])))
    yield seen
    hook.remove()


@pytest.mark.parametrize("count, sampler", [(1, "euler"), (2, "dpmpp_sde"), (6, "heun"), (12, "euler")])
def test_any_number_of_regions_costs_what_ksampler_costs(studio, calls, count, sampler):
    studio.ksampler(studio.model, SCENE, "", sampler=sampler)
    plain, _ = list(calls), calls.clear()
    studio.regional(SCENE, columns(studio, count), studio.bank, sampler_name=sampler)
    assert calls == plain


def test_region_noise_costs_one_more_for_each(studio, calls):
    studio.regional(SCENE, [*columns(studio, 2), studio.region("a ball", end=0.0)], studio.bank,
                    region_noise=True)
    assert len(calls) == 3 * 3 + 1


def test_no_guidance_needs_no_negative_half(studio, calls):
    studio.regional(SCENE, columns(studio, 2), studio.bank, cfg=1.0)
    assert calls == [1, 1, 1]


CASES = {
    "batch": {"latent": (3, 16, 16)}, "odd": {"latent": (1, 13, 11)}, "wide": {"latent": (2, 9, 30)},
    "large": {"latent": (1, 24, 24)},
    "feather": {"feather": 0.2}, "half": {"strength": 0.5}, "late": {"start": 0.5}, "early": {"end": 0.4},
    "noise": {"region_noise": True},
    "literal": {"region_noise": True, "outside": "literal"}, "weak": {"scale": -0.5},
    "denoise": {"denoise": 0.5},
}


@pytest.mark.parametrize("case, sampler", [*((case, "euler") for case in CASES), ("late", "heun"),
                                           ("odd", "dpmpp_2m_sde")])
def test_settings_work_and_matter(studio, case, sampler):
    chosen = dict(CASES[case])
    latent = studio.latent(*chosen.pop("latent", (1, 16, 16)), content=True)
    per_region = {key: chosen.pop(key) for key in ("feather", "strength", "start", "end") if key in chosen}
    if "scale" in chosen:
        chosen["strength"] = chosen.pop("scale")

    def picture(**region):
        return studio.regional(SCENE, columns(studio, 2, **region), studio.bank, latent=latent,
                               sampler_name=sampler, steps=4, **chosen)

    denoise = chosen.get("denoise", 1.0)
    found = picture(**per_region)
    plain = studio.regional(SCENE, [], studio.bank, latent=latent, sampler_name=sampler, steps=4,
                            denoise=denoise)
    assert torch.isfinite(found).all() and found.shape == latent["samples"].shape
    assert not torch.equal(found, plain)
    if per_region:
        assert not torch.equal(found, picture())


def test_a_region_over_everything_is_its_prompt(studio):
    """One region over the whole frame, with the concept's deltas as activations, is the concept folded into
    the weights."""
    regions = [studio.region("<rex> on a beach")]
    for prompt_model in ("<rex> on a beach", "a dog"):
        model, clip, _ = studio.aggregate(prompt_model, studio.bank)
        folded = studio.ksampler(model, studio.encode(clip, "<rex> on a beach"), studio.encode(clip, ""),
                                 steps=2)
        close = distance(studio.regional(SCENE, regions, studio.bank, steps=2), folded) < 1e-3
        assert close == (prompt_model != "a dog")


def test_a_long_region_prompt_and_a_long_scene(studio):
    long = "a photo of <rex> " + "in a green meadow with a red ball, " * 6
    halves = [studio.region(long, right=0.5), studio.region("<mimi>", left=0.5)]
    picture = studio.regional(long, halves, studio.bank)
    # Which comes first does not matter
    assert distance(studio.regional(long, halves[::-1], studio.bank), picture) < 1e-4
    # Nor the scene where they cover all
    assert distance(studio.regional(SCENE, halves, studio.bank), picture) < 1e-4
    assert distance(studio.regional(SCENE, halves[1:], studio.bank), picture) > 1e-3


def test_a_region_over_everything_with_long_prompts_is_its_prompt(studio):
    long = "a photo of <rex> " + "in a green meadow with a red ball, " * 6
    model, clip, positive = studio.aggregate(long, studio.bank)
    folded = studio.ksampler(model, positive, studio.encode(clip, "bad"), steps=2)
    found = studio.regional(SCENE, [studio.region(long, negative="bad")], studio.bank, steps=2)
    assert distance(found, folded) < 1e-3


def test_overlapping_regions(studio):
    regions = [studio.region("<rex>", right=0.7), studio.region("<mimi>", left=0.3),
               studio.region("a ball", top=0.4, bottom=0.6)]
    found = studio.regional(SCENE, regions, studio.bank)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, studio.regional(SCENE, regions[:2], studio.bank))
    twice = [studio.region("<rex>", right=0.5)] * 2
    assert distance(studio.regional(SCENE, twice, studio.bank),
                    studio.regional(SCENE, twice[:1], studio.bank)) < 1e-4


def test_overlap_policies(studio):
    regions = [studio.region("<rex>"), studio.region("<mimi>", left=0.25, right=0.75, top=0.25, bottom=0.75)]
    found = {overlap: studio.regional(SCENE, regions, studio.bank, overlap=overlap)
             for overlap in ("average", "priority", "nearest")}
    assert torch.equal(found["average"], studio.regional(SCENE, regions, studio.bank))
    alone = studio.regional(SCENE, regions[:1], studio.bank)
    assert distance(found["priority"], alone) < 1e-4      # the first covers everything
    assert distance(found["nearest"], alone) > 1e-3 and distance(found["nearest"], found["average"]) > 1e-3


def test_region_noise_on_a_crop_costs_by_area(studio):
    sizes = []
    unet = studio.model.model.diffusion_model
    hook = unet.register_forward_pre_hook(lambda _unet, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    try:
        corner = [studio.region("<rex>", right=0.3, bottom=0.3)]
        found = studio.regional(SCENE, corner, studio.bank, region_noise=True, noise_area="crop", steps=2,
                                latent=studio.latent(1, 24, 16))
    finally:
        hook.remove()
    assert sizes == [(24, 16), (8, 8)] * 2 and torch.isfinite(found).all()
    whole = [studio.regional(SCENE, [studio.region("<rex>")], studio.bank, region_noise=True, noise_area=area)
             for area in ("crop", "frame")]
    assert torch.equal(*whole)


def test_region_noise_on_a_crop_refuses_what_belongs_to_the_whole(studio):
    masked = [[hidden, {**extra, "mask": torch.ones(1, 16, 16)}]
              for hidden, extra in studio.encode(studio.clip, SCENE)]
    with pytest.raises(Exception, match="carries mask, which belongs to the whole picture; choose"):
        studio.regional(SCENE, columns(studio, 2), studio.bank, region_noise=True, noise_area="crop",
                        positive=masked)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "dpmpp_sde"])
def test_crop_denoising_evaluates_crops_alone(studio, calls, sampler):
    """Halves that cover the picture: two crops in one batch in the first quarter of the steps, a frame in
    the others."""
    halves = [studio.region("<rex>", right=0.5), studio.region("<mimi>", left=0.5)]
    plain = studio.regional(SCENE, halves, studio.bank, steps=8, sampler_name=sampler)
    without, _ = list(calls), calls.clear()
    found = studio.regional(SCENE, halves, studio.bank, steps=8, sampler_name=sampler, solo=0.25)
    assert set(without) == {2} and len(calls) == len(without) and set(calls[:2]) == {4}
    assert set(calls[-4:]) == {2}
    assert torch.isfinite(found).all() and distance(found, plain) > 1e-3
    assert torch.equal(found, studio.regional(SCENE, halves, studio.bank, steps=8, sampler_name=sampler,
                                              solo=0.25))


def test_crop_denoising_does_nothing_where_something_belongs_to_the_whole(studio):
    halves = [studio.region("<rex>", right=0.5), studio.region("<mimi>", left=0.5)]
    masked = [[hidden, {**extra, "mask": torch.ones(1, 16, 16)}]
              for hidden, extra in studio.encode(studio.clip, SCENE)]
    found = [studio.regional(SCENE, halves, studio.bank, positive=masked, solo=solo) for solo in (0.0, 0.5)]
    assert torch.equal(*found)


BOTH = "a photo of <rex> and <mimi> in a meadow"


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_sde", "heun"])
def test_regions_are_found_at_the_price_of_ksampler(studio, calls, sampler):
    latent = studio.latent(2)
    plain = studio.regional(BOTH, bank=studio.bank, latent=latent, steps=6, sampler_name=sampler)
    without, _ = list(calls), calls.clear()
    found = studio.regional(BOTH, bank=studio.bank, latent=latent, steps=6, sampler_name=sampler,
                            find_regions=True)
    assert calls == without and torch.isfinite(found).all() and distance(found, plain) > 1e-3
    assert torch.equal(found, studio.regional(BOTH, bank=studio.bank, latent=latent, steps=6,
                                              sampler_name=sampler, find_regions=True))


@pytest.mark.parametrize("scene", ["a dog in a meadow", "<rex> in a meadow"])
def test_there_is_nothing_to_find_for_one_concept(studio, scene):
    found, plain = (studio.regional(scene, bank=studio.bank, find_regions=on) for on in (True, False))
    assert torch.equal(found, plain)


def test_found_regions_on_a_low_memory_host(studio, monkeypatch):
    """Halves of guidance in calls of their own, as on a card that is nearly full."""
    whole = studio.regional(BOTH, bank=studio.bank, steps=6, find_regions=True)
    monkeypatch.setattr(type(studio.model), "memory_required", lambda *_: 1e18, raising=False)
    monkeypatch.setattr(type(studio.model.model), "memory_required", lambda *_, **__: 1e18)
    assert distance(studio.regional(BOTH, bank=studio.bank, steps=6, find_regions=True), whole) < 1e-3


def test_found_regions_and_attention_guidance_exclude_each_other(studio):
    with pytest.raises(Exception, match=r"find_regions is on and attention guidance \(artists\) is 0.5"):
        studio.regional(BOTH, bank=studio.bank, find_regions=True, artists=0.5)


def test_masks_are_boxes_in_another_form(studio):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    by_mask, by_box = (studio.regional(SCENE, [region], studio.bank) for region in
                       (studio.region("<rex>", mask=mask), studio.region("<rex>", right=0.5)))
    assert distance(by_mask, by_box) < 1e-4


def test_inpainting_keeps_what_is_outside_its_mask(studio):
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    latent = studio.latent(content=True, noise_mask=mask)
    found = studio.regional(SCENE, [studio.region("<rex>", right=0.5)], studio.bank, latent=latent)
    assert torch.allclose(found[..., 8:], latent["samples"][..., 8:], atol=1e-5)
    assert not torch.allclose(found[..., :8], latent["samples"][..., :8], atol=1e-2)


def test_a_negative_of_its_own(studio):
    with_own = studio.regional(SCENE, [studio.region("<rex>", right=0.5, negative="a photo of <mimi>")],
                               studio.bank)
    assert not torch.equal(with_own, studio.regional(SCENE, [studio.region("<rex>", right=0.5)], studio.bank))


def test_the_picture_of_attention(studio):
    node = studio.pack.RegionalConceptSampler
    arguments = {"negative_scene": "", "seed": 1, "steps": 3, "cfg": 4.0, "sampler_name": "euler",
                 "scheduler": "normal", "denoise": 1.0,
                 "strength": 1.0, "region_noise": False, "alpha": 0.1, "outside": "keep"}
    out = node.execute(model=studio.model, clip=studio.clip, latent_image=studio.latent(), scene=SCENE,
                       bank=studio.bank,
                       regions=columns(studio, 2), **arguments)
    assert out[1].ndim == 4 and out[1].std() > 0.01
    preview = out.ui.as_dict()["images"][0]
    assert (studio.pack.folder / "temp" / preview["subfolder"] / preview["filename"]).is_file()


def test_deltas_on_a_scaled_latent_format(studio):
    """Region noise mixes noises: with one region over everything and alpha 0 it is the region's own guided
    picture."""
    regions = [studio.region("<rex>")]
    found = studio.regional(SCENE, regions, studio.bank, region_noise=True, alpha=0.0, steps=2)
    assert distance(found, studio.regional(SCENE, regions, studio.bank, steps=2)) < 1e-3
