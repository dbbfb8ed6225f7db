"""Four blocks of Anima at their true shape (width 2048, 16 heads of 128), with the whole adapter, text
encoder and VAE: learn two concepts from drawn photos, two regions, save. Two minutes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from .make_transformer import Sizes, anima_clip, anima_model, wan_vae

pytestmark = [pytest.mark.usefixtures("as_in_comfyui"), pytest.mark.slow]
TRUE = Sizes(blocks=4, width=2048, adapter_layers=6, encoder_layers=28, encoder_width=3072, picture_width=96)
SIDE = 64
SCENE = "a photo of a dog and a duck toy in a meadow"


def photos(folder: Path) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).float().unsqueeze(0) / 255
            for file in sorted(folder.glob("*.jpg"))[:3]]


def test_learn_two_concepts_two_regions_save(comfyui, pack, studio, draw_photos, tmp_path, own_folder,
                                             count_tensors):
    pytest.importorskip("comfy.ldm.anima.model", reason="this ComfyUI has no Anima")
    from continual_concepts.core.bank.format import open_bank, save_bank

    parts = anima_model(TRUE, torch.bfloat16), anima_clip(TRUE, torch.bfloat16), wan_vae(TRUE)
    own = type(studio)(pack, parts, None)
    own.side, latent = SIDE, {"samples": torch.zeros(1, 16, 1, SIDE // 8, SIDE // 8)}
    before = own.ksampler(own.model, SCENE, "", latent, steps=2)
    assert torch.isfinite(before).all() and before.std() > 0.1
    (_, held), drawn = count_tensors(), {noun: draw_photos(tmp_path / noun, noun, 3, 2 * SIDE)
                                         for noun in ("dog", "duck toy")}
    bank = own.learn(photos(drawn["dog"]), "rex", "dog", method="slots", steps=2, resolution=SIDE)
    bank = own.learn(photos(drawn["duck toy"]), "duck", "duck toy", method="slots", steps=2, resolution=SIDE,
                     bank=[bank], training_settings=[{"gradient_checkpointing": True}])
    assert count_tensors()[1] <= 1.05 * held
    assert torch.equal(before, own.ksampler(own.model, SCENE, "", latent, steps=2))
    save_bank(bank, tmp_path / "bank.safetensors")
    bank = open_bank(tmp_path / "bank.safetensors")
    assert [site.width for site in bank.layout.sites] == [2048] * 4
    assert torch.equal(before, own.regional(SCENE, bank=bank, latent=latent, steps=2))
    model, clip, positive = own.aggregate("a photo of <rex> and <duck>", bank)
    together = own.ksampler(model, positive, own.encode(clip, ""), latent, steps=2)
    regions = [own.region("a photo of <rex>", right=0.5), own.region("<duck>", left=0.5)]
    both = own.regional(SCENE, regions, bank, latent=latent, steps=2)
    assert torch.isfinite(both).all() and not torch.equal(both, before) and not torch.equal(together, before)
    pixels = own.vae.decode(both)
    assert pixels.shape[-3:] == (SIDE, SIDE, 3) and torch.isfinite(pixels).all()
