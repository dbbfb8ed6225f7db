"""The same photos are recognised whether the command line or ComfyUI learned them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.cli import main
from continual_concepts.core.evaluation.collisions import collisions_of
from continual_concepts.core.evaluation.inspection import inspect

pytestmark = pytest.mark.usefixtures("own_folder")


def save_photos(folder, endings) -> None:
    """One smooth photo per ending, all of one size."""
    folder.mkdir()
    for i, ending in enumerate(endings):
        small = np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(small).resize((40, 32), Image.BICUBIC).save(folder / f"{i}.{ending}")


@pytest.fixture
def learned_by_command(tmp_path):
    """learned_by_command(folder): a bank with <rex>, learned by the command line."""
    def learn(folder):
        file = tmp_path / "pets.safetensors"
        assert main(["--json", "learn", str(folder), "--bank", str(file), "--name", "rex", "--noun", "dog",
                     "--base", "embedded-64",
                     "--steps", "1"]) in (0, None)
        return open_bank(file)

    return learn


def assert_recognised(bank) -> None:
    first, second = (bank.infos[name].provenance.images for name in ("rex", "spot"))
    assert first == second and all(len(digest) == 16 for digest in first)
    collisions = collisions_of(list(bank.infos.values()))
    assert [(c.one, c.other, c.kind) for c in collisions] == [("rex", "spot", "photos")]
    warning = "<rex> and <spot> collide: they were learned from the same photos (3 of 3)"
    assert warning in inspect(bank).warnings


def test_through_load_concept_photos(studio, learned_by_command):
    """Whatever the files' format: both read the folder alike."""
    folder = studio.pack.folder / "input" / "rex"
    save_photos(folder, ("png", "jpg", "webp"))
    bank = learned_by_command(folder)
    with torch.inference_mode():
        images = studio.pack.ConceptPhotosLoad.execute("rex")[0]
        assert_recognised(studio.learn(images=images, bank=[bank], steps=1))


def test_through_a_batch_of_load_image(studio, learned_by_command, monkeypatch):
    """PNG, which every version of ComfyUI opens without loss."""
    import folder_paths

    folder = studio.pack.folder / "input" / "batch"
    save_photos(folder, ("png", "png", "png"))
    bank = learned_by_command(folder)
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(folder))
    with torch.inference_mode():
        batch = torch.cat([studio.stock.LoadImage().load_image(f"{i}.png")[0] for i in range(3)])
        assert_recognised(studio.learn(images=batch, bank=[bank], steps=1))
