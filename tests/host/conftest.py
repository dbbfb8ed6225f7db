"""Puts a real ComfyUI on the path: COMFYUI_PATH, else the ComfyUI whose custom_nodes this checkout lies in, else ~/comfy/ComfyUI."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def find_comfyui() -> Path | None:
    named = os.environ.get("COMFYUI_PATH")
    around = [ROOT.parents[1]] if ROOT.parent.name == "custom_nodes" else []
    candidates = [Path(named)] if named else [*around, Path.home() / "comfy" / "ComfyUI"]
    return next((path for path in candidates if (path / "comfy" / "model_patcher.py").is_file()), None)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """Its folder, importable and set to CPU; skips when there is none or when this Python lacks what it needs."""
    path = find_comfyui()
    if path is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH to its folder")
    sys.path.insert(0, str(path))
    try:
        from comfy.cli_args import args

        args.cpu = True
        import comfy.sd  # noqa: F401
    except ImportError as error:
        pytest.skip(f"this Python cannot run the ComfyUI in {path}: {error}")
    if importlib.util.find_spec("comfyui_version") is not None:
        import comfyui_version

        print(f"ComfyUI {comfyui_version.__version__} in {path}")
    return path


@pytest.fixture(scope="session")
def demo(comfyui):
    """MODEL, CLIP, VAE of the embedded base, made under inference mode as ComfyUI's loaders do."""
    from continual_concepts.core.hosts.comfy.demo import load_demo

    with torch.inference_mode():
        return load_demo()


@pytest.fixture(scope="session")
def reference():
    """The same base in the diffusers host."""
    from continual_concepts.core.demo.base import load_base

    return load_base()


@pytest.fixture(scope="session")
def bank(reference, make_concept):
    """Two layer-wise concepts and one with a single copy, of random numbers that change pictures visibly."""
    from continual_concepts.core.bank import ConceptBank

    bank = ConceptBank(reference.layout)
    for i, (name, layerwise) in enumerate((("rex", True), ("mimi", True), ("blueprint", False))):
        bank = bank.add(make_concept(reference.layout, name, seed=i, layerwise=layerwise, size=0.3))
    return bank
