"""The true shapes, through the stock checkpoint loader, with drawn photos: learn, aggregate, two regions,
decode, PNG. Minutes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = [pytest.mark.usefixtures("as_in_comfyui"), pytest.mark.slow]
SHAPES = {"sd15": (16, 16, 128), "sdxl": (70, 11, 64)}     # sites, layer copies, picture side


@pytest.fixture(scope="module", params=list(SHAPES))
def loaded(request, pack, tmp_path_factory, script):
    """family, and MODEL, CLIP, VAE of Load Checkpoint."""
    import comfy.model_management
    import comfy.sd

    maker = script(Path(__file__).with_name("make_checkpoint.py"))
    file = maker.make(request.param, tmp_path_factory.mktemp("checkpoints") / f"{request.param}.safetensors")
    with torch.inference_mode():
        parts = comfy.sd.load_checkpoint_guess_config(str(file), output_vae=True, output_clip=True)[:3]
        yield request.param, parts
    comfy.model_management.unload_all_models()
    file.unlink()


def photos(folder: Path, side: int) -> list[torch.Tensor]:
    """Three photos as a list of IMAGEs of different sizes."""
    found = []
    for file in sorted(folder.glob("*.jpg"))[:3]:
        image = Image.open(file).convert("RGB")
        image.thumbnail((2 * side, 2 * side))
        found.append(torch.from_numpy(np.array(image)).float().unsqueeze(0) / 255)
    return found


def test_learn_aggregate_two_regions_decode(loaded, pack, studio, draw_photos, tmp_path, own_folder,
                                            count_tensors):
    family, parts = loaded
    own, (sites, copies, side) = type(studio)(pack, parts, None), SHAPES[family]
    latent = {"samples": torch.zeros(1, 4, side // 8, side // 8)}
    scene = "a photo of a dog and a duck toy in a meadow"
    before = own.ksampler(own.model, scene, "", latent, steps=2)
    assert torch.isfinite(before).all() and before.std() > 0.1
    (_, held), drawn = count_tensors(), {noun: draw_photos(tmp_path / noun, noun, 3, 2 * side)
                                         for noun in ("dog", "duck toy")}
    bank = own.learn(photos(drawn["dog"], side), "rex", "dog", steps=2, resolution=side)
    bank = own.learn(photos(drawn["duck toy"], side), "duck", "toy", method="bound", steps=2, resolution=side,
                     bank=[bank])
    assert (len(bank.layout), bank.layout.copies) == (sites, copies) and bank.names == ["rex", "duck"]
    assert torch.equal(before, own.ksampler(own.model, scene, "", latent, steps=2))
    assert count_tensors()[1] <= 1.05 * held
    assert torch.equal(before, own.regional(scene, latent=latent, steps=2))
    model, clip, positive = own.aggregate("a photo of <rex> on a beach", bank)
    alone = own.ksampler(model, positive, own.stock.CLIPTextEncode().encode(clip, "")[0], latent, steps=2)
    regions = [own.region("a photo of <rex>", right=0.5), own.region("<duck>", left=0.5)]
    both = [own.regional(scene, regions, bank, latent=latent, steps=2, sampler_name="euler_ancestral")
            for _ in range(2)]
    assert torch.equal(*both) and not torch.equal(both[0], before) and not torch.equal(alone, before)
    assert torch.isfinite(both[0]).all() and torch.isfinite(alone).all()
    saved = save(own, own.vae.decode(both[0]))
    assert saved.size == (side, side) and np.asarray(saved).std() > 1


def save(own, pixels: torch.Tensor) -> Image.Image:
    """As the stock Save Image node does."""
    import folder_paths

    node = own.stock.SaveImage()
    node.output_dir = folder_paths.get_output_directory()
    name = node.save_images(pixels, "two")["ui"]["images"][0]["filename"]
    return Image.open(Path(node.output_dir) / name)
