"""Other weight types, and SDXL's two encoders, in a size that takes no time."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.encoding import encode_prompts

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")
SCENE = "a photo of a dog in a meadow"
TYPES = {"bf16, cast": (torch.bfloat16, torch.float32), "fp16, cast": (torch.float16, torch.float32),
         "bf16": (torch.bfloat16, None)}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(params=list(TYPES))
def other_type(request, pack, studio, bank, monkeypatch):
    """The embedded base with weights of another type: stored so and cast for arithmetic, or used as they
    are."""
    from continual_concepts.core.comfy import demo as module

    stored, cast = TYPES[request.param]
    config = module._unet_config
    monkeypatch.setitem(module._CONFIGS, "unet", lambda shape: config(shape) | {"dtype": stored})
    monkeypatch.setattr(module._Config, "manual_cast_dtype", cast)
    return type(studio)(pack, module.load_demo(name="embedded-64"), bank), stored


@pytest.mark.parametrize("method", ["bound", "cidm", "finetune"])
def test_weights_of_eight_bits(pack, studio, bank, monkeypatch, method):
    """A base in fp8, cast for arithmetic: learning leaves its weights alone, and gives what the same numbers
    give in fp32."""
    from continual_concepts.core.comfy import demo as module

    config, eight = module._unet_config, torch.float8_e4m3fn
    rounded = type(studio)(pack, module.load_demo(name="embedded-64"), bank)
    for weight in rounded.model.model.diffusion_model.parameters():
        weight.data = weight.data.to(eight).float()
    monkeypatch.setitem(module._CONFIGS, "unet", lambda shape: config(shape) | {"dtype": eight})
    monkeypatch.setattr(module._Config, "manual_cast_dtype", torch.float32)
    ours, results = type(studio)(pack, module.load_demo(name="embedded-64"), bank), []
    before = {name: weight.clone().view(torch.uint8) for name, weight in ours.model.model.state_dict().items()
              if weight.dtype == eight}
    assert len(before) > 100
    for one in (ours, rounded):
        first = one.learn(steps=2, method=method,
                          training_settings=[{"checkpoint_every": 0, "gradient_checkpointing": True}])
        both = one.learn(steps=2, method=method, name="tom", noun="cat", bank=[first])
        after = ours.model.model.state_dict()
        assert all(torch.equal(after[name].view(torch.uint8), weight) for name, weight in before.items())
        model, clip, positive = one.aggregate("<spot>", both)
        regions = [one.region("<spot>", right=0.5), one.region("<tom>", left=0.5)]
        results.append(torch.cat([one.ksampler(model, positive, one.encode(clip, ""), steps=2),
                                  one.regional(SCENE, regions, both, steps=2)]))
        one.ksampler(one.model, SCENE, "")      # the host takes the concepts out of the weights
    assert torch.isfinite(results[0]).all() and distance(*results) < (0.02 if method != "finetune" else 0.3)


@pytest.mark.parametrize("method", ["cidm", "finetune"])
def test_weights_of_other_types(other_type, studio, method):
    """Learn, learn another on top, aggregate, sample, regions: all close to what the same weights give in
    fp32."""
    ours, stored = other_type
    before = {name: weight.clone() for name, weight in ours.model.model.state_dict().items()}
    assert before["diffusion_model.out.2.weight"].dtype == stored
    banks = []
    for one in (ours, studio):
        first = one.learn(steps=2, method=method,
                          training_settings=[{"checkpoint_every": 0, "gradient_checkpointing": True}])
        banks.append(one.learn(steps=2, method=method, name="tom", noun="cat", bank=[first]))
    after = ours.model.model.state_dict()
    assert all(after[name].dtype == weight.dtype and torch.equal(after[name], weight)
               for name, weight in before.items())
    results = []
    for one, bank in zip((ours, studio), banks, strict=True):
        model, clip, positive = one.aggregate("<spot>", bank)
        pictures = [one.ksampler(model, positive, one.encode(clip, ""), steps=2),
                    one.regional(SCENE, [one.region("<spot>", right=0.5), one.region("<tom>", left=0.5)],
                                 bank, steps=2)]
        results.append(torch.cat(pictures))
    assert torch.isfinite(results[0]).all() and distance(*results) < 0.1
    assert torch.equal(ours.regional(SCENE), ours.ksampler(ours.model, SCENE, ""))


@pytest.fixture
def xl(pack, studio, tiny_xl, tiny_sdxl, make_concept):
    bank = ConceptBank(tiny_sdxl.layout)
    for i, name in enumerate(("rex", "mimi")):
        bank = bank.add(make_concept(tiny_sdxl.layout, name, seed=i, size=0.3))
    small = type(studio)(pack, tiny_xl, bank)
    small.latent = lambda count=1: {"samples": torch.zeros(count, 4, 8, 8)}
    return small


def test_sdxl_in_both_hosts(xl, tiny_sdxl):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    ours = ComfyBackbone(xl.model, xl.clip, xl.vae)
    assert ours.layout == tiny_sdxl.layout and ours.layout.copies == 7
    assert ours.fingerprint == tiny_sdxl.fingerprint
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([100, 800])
    for prompt in ("a photo of a dog", "<rex> in a meadow",
                   "a photo of <rex> and <mimi> with " + "a red ball and a car and " * 3):
        contexts = [encode_prompts(host, xl.bank.vocabulary.parse_all([prompt] * 2),
                                   {name: xl.bank[name].tokens for name in xl.bank.names})
                    for host in (ours, tiny_sdxl)]
        assert distance(contexts[0].hidden,
                        contexts[1].hidden) < 1e-5 and distance(contexts[0].pooled, contexts[1].pooled) < 1e-5
        stock = xl.stock.CLIPTextEncode().encode(xl.aggregate("a dog", xl.bank)[1], prompt)[0]
        assert distance(stock[0][1]["pooled_output"], contexts[1].pooled[:1]) < 1e-5
        assert distance(stock[0][0], contexts[1].hidden[:1].mean(1)) < 1e-5
        with ours.folded(xl.bank["rex"].deltas), tiny_sdxl.folded(xl.bank["rex"].deltas):
            results = [host.predict(x, t, context)
                       for host, context in zip((ours, tiny_sdxl), contexts, strict=True)]
        assert distance(*results) < 1e-4


def test_sdxl_learns_the_same_in_both_hosts(tiny_xl, tiny_sdxl, teach):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    def as_coarse_pictures(images):
        return tiny_xl[2].encode(((images + 1) / 2).permute(0, 2, 3, 1))

    losses = []
    with torch.inference_mode(False):
        for host in (ComfyBackbone(*tiny_xl), tiny_sdxl):
            host.encode_images = as_coarse_pictures
            with host.training() if host is not tiny_sdxl else nullcontext():
                losses.append(teach(host, ConceptBank(host.layout), steps=5).losses)
            del host.encode_images
    assert torch.allclose(*(torch.tensor(one) for one in losses), rtol=1e-4)


def test_sdxl_through_the_nodes(xl):
    plain = xl.ksampler(xl.model, SCENE, "")
    assert torch.equal(xl.regional(SCENE, bank=xl.bank), plain)
    model, clip, positive = xl.aggregate(SCENE, xl.bank, strength=0.0)
    assert torch.equal(xl.ksampler(model, positive, xl.encode(clip, "")), plain)
    bank = xl.learn(steps=2, bank=[xl.bank], preview_every=1)
    assert torch.equal(xl.ksampler(xl.model, SCENE, ""), plain)
    model, clip, positive = xl.aggregate("<spot> and <rex>", bank)
    picture = xl.ksampler(model, positive, xl.encode(clip, ""))
    regions = [xl.region("<spot>", right=0.5), xl.region("<mimi>", left=0.4, feather=0.1)]
    both = [xl.regional(SCENE, regions, bank, latent=xl.latent(2), sampler_name="euler_ancestral")
            for _ in range(2)]
    assert torch.equal(*both) and torch.isfinite(both[0]).all() and not torch.equal(picture, plain)


def test_sdxl_region_over_everything_is_its_prompt(xl):
    model, clip, positive = xl.aggregate("<rex> in a meadow", xl.bank)
    folded = xl.ksampler(model, positive, xl.encode(clip, ""), steps=2)
    # the pooled text is the region's too
    found = xl.regional(SCENE, [xl.region("<rex> in a meadow")], xl.bank, steps=2)
    assert distance(found, folded) < 1e-3


def test_banks_of_one_family_are_refused_by_the_other(xl, studio):
    from continual_concepts.core.errors import ConceptError

    for one, bank in ((xl, studio.bank), (studio, xl.bank)):
        with pytest.raises(ConceptError, match="another base"):
            one.aggregate("<rex>", bank)
