"""Regions beside what other nodes patch into a MODEL, and isolation, which patches self-attention itself."""

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


def extra(module: str, name: str, **inputs):
    """Output of one of ComfyUI's further nodes, in its old or new form."""
    import importlib

    cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    call = cls.execute if hasattr(cls, "define_schema") else getattr(cls(), cls.FUNCTION)
    return call(**inputs)[0]


def patched(studio, kind: str):
    """The model as other nodes leave it."""
    model = studio.model.clone()
    if kind == "patch":
        model.set_model_attn2_patch(lambda n, context, value, options: (n, 1.1 * context, 1.1 * value))
    elif kind == "output":
        model.set_model_attn2_output_patch(lambda n, options: 0.9 * n)
    elif kind.startswith("replace"):
        from comfy.ldm.modules.attention import optimized_attention

        factor = 0.5 if kind == "replace" else 1.0

        def replace(q, k, v, options):
            return factor * optimized_attention(q, k, v, options["n_heads"])

        for block in (("input", 1), ("input", 2), ("middle", 0)):
            model.set_model_attn2_replace(replace, *block, *([0] if kind == "replace" else []))
    elif kind == "self":
        from continual_concepts.core.comfy.families import find_sites

        for address in find_sites(model, (("clip_l", 1),)).addresses:
            model.set_model_attn1_replace(lambda q, k, v, options: v, *address)
    elif kind == "freeu":
        model = extra("nodes_freelunch", "FreeU", model=model, b1=1.4, b2=1.6, s1=0.9, s2=0.2)
    elif kind == "pag":
        model = extra("nodes_pag", "PerturbedAttentionGuidance", model=model, scale=3.0)
    elif kind == "shrink":
        where = {"block_number": 2, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.5,
                 "downscale_after_skip": True}
        model = extra("nodes_model_downscale", "PatchModelAddDownscale", model=model,
                      downscale_method="bicubic", upscale_method="bicubic",
                      **where)
    elif kind == "cfg":
        model.set_model_sampler_cfg_function(lambda args: args["cond"] + 2 * (args["cond"] - args["uncond"]))
    return model


@pytest.mark.parametrize("kind", ["patch", "output", "replace", "replace whole block", "freeu", "cfg", "pag",
                                  "shrink"])
def test_other_nodes_patches_still_act(studio, kind):
    """Before us: a region of strength near zero gives what their patch gives alone; a full one gives
    something else."""
    model = patched(studio, kind)
    theirs = studio.ksampler(model, SCENE, "")
    faint = studio.regional(SCENE, [studio.region("a red ball", right=0.5, strength=1e-6)], model=model)
    assert distance(faint, theirs) < 1e-4
    if kind != "replace whole block":
        assert distance(theirs, studio.ksampler(studio.model, SCENE, "")) > 1e-3
    full = studio.regional(SCENE, columns(studio, 2), studio.bank, model=model)
    assert torch.isfinite(full).all() and distance(full, theirs) > 1e-3


@pytest.mark.parametrize("kind", ["patch", "output", "replace", "freeu"])
def test_the_incoming_model_keeps_its_patches(studio, kind):
    model = patched(studio, kind)
    options = repr(model.model_options)
    before = studio.ksampler(model, SCENE, "")
    studio.regional(SCENE, columns(studio, 2), studio.bank, model=model)
    assert repr(model.model_options) == options and torch.equal(before, studio.ksampler(model, SCENE, ""))


def test_a_patch_between_the_aggregation_and_the_sampler(studio):
    """Deltas of regions are computed from what the last patch hands to the projections, whoever set it and
    when."""
    def scaled(n, context, value, options):
        return n, 1.5 * context, 1.5 * value

    before, after = studio.model.clone(), studio.aggregate("a dog", studio.bank)[0].clone()
    before.set_model_attn2_patch(scaled)
    before = studio.aggregate("a dog", studio.bank, model=before)[0]
    after.set_model_attn2_patch(scaled)
    scenes = [studio.regional("<blueprint> in a meadow", [studio.region("<blueprint>", right=0.5)],
                              studio.bank, model=model, steps=2)
              for model in (before, after)]
    assert distance(*scenes) < 1e-4


def test_regions_on_an_aggregated_model(studio):
    """The aggregation's deltas are in the weights already: regions add theirs to them."""
    model, clip, _ = studio.aggregate("a dog", studio.bank)
    plain = studio.regional(SCENE, columns(studio, 2), studio.bank)
    assert distance(studio.regional(SCENE, columns(studio, 2), studio.bank, model=model, clip=clip),
                    plain) < 1e-5


def test_isolation(studio):
    """It matters with two regions, not with one; another node's self-attention goes before it; nothing of it
    stays."""
    halves = [studio.region("<rex>", right=0.5), studio.region("<mimi>", left=0.5)]
    off, on, again = (studio.regional(SCENE, halves, studio.bank, isolation=share)
                      for share in (0.0, 1.0, 0.0))
    assert torch.equal(off, again) and distance(on, off) > 1e-3 and torch.isfinite(on).all()
    one = [studio.regional(SCENE, [studio.region("<rex>")], studio.bank, isolation=share)
           for share in (0.0, 1.0)]
    assert distance(*one) < 1e-4
    pag = patched(studio, "self")
    theirs = [studio.regional(SCENE, halves, studio.bank, model=pag, isolation=share) for share in (0.0, 1.0)]
    assert torch.equal(*theirs) and distance(theirs[0], off) > 1e-3
    odd, plain = (studio.regional(SCENE, halves, studio.bank, isolation=share, solo=0.4, steps=4,
                                  latent=studio.latent(2, 9, 30)) for share in (0.7, 0.0))
    assert 1e-3 < distance(odd, plain) < 2
