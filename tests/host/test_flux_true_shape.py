"""Flux.1 with one block of each kind at its true widths."""

from __future__ import annotations

import pytest
import torch

from .joint_checks import two_concepts_add_few_operations
from .make_flux import FLUX, flux_model, studio_of, text_encoders

pytestmark = pytest.mark.usefixtures("has_patches", "as_in_comfyui", "own_folder")
TRUE = {"hidden_size": 3072, "num_heads": 24, "depth": 1, "depth_single_blocks": 1}
DOGS = "dog dog dog dog"      # what stands for an object of four words


@pytest.mark.slow
def test_one_block_of_each_kind_at_the_true_widths(pack, comfyui):
    """Width 3072, 24 heads of 128, bfloat16; texts keep their reduced width."""
    own = studio_of(pack, flux_model(torch.bfloat16, **TRUE), text_encoders(True))
    plain = own.ksampler(own.model, f"a {DOGS}", "", steps=2)
    bank = own.learn(method="slots", steps=2, training_settings=[{"gradient_checkpointing": True}])
    assert [(site.width, site.heads) for site in bank.layout.sites] == [(3072, 24)] * 2
    model, clip, positive = own.aggregate("a <spot>", bank)
    changed = own.ksampler(model, positive, own.encode(clip, ""), steps=2)
    assert torch.isfinite(changed).all() and not torch.equal(changed, plain)
    assert torch.equal(own.ksampler(own.model, f"a {DOGS}", "", steps=2), plain)


def test_two_concepts_add_few_operations_at_the_true_widths(comfyui, monkeypatch):
    """One block of each kind, a picture of 1024 pixels, counted without computing."""
    import comfy.ldm.flux.model as flux
    import comfy.ops

    from continual_concepts.core.model.sites import joint_layout

    sizes = FLUX | TRUE | {"guidance_embed": False}

    def make():
        return flux.Flux(**sizes, dtype=torch.float32, operations=comfy.ops.disable_weight_init)

    layout = joint_layout(1, 1, 24, 3072, (("t5xxl", 4096),))
    two_concepts_add_few_operations(make, layout, sizes["context_in_dim"], monkeypatch)
