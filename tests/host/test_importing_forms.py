"""Every form that ComfyUI's LoRA loader reads gives the same prediction as an imported concept."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from continual_concepts.core.errors import ConceptError
from continual_concepts.tests.lora_files import COMFYUI_FORMS, Writer, module_names, written

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
EXACT = 1e-3


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def folder(comfyui, tmp_path_factory):
    """A folder of ComfyUI's for LoRA files."""
    import folder_paths

    folder = tmp_path_factory.mktemp("loras")
    folder_paths.add_model_folder_path("loras", str(folder))
    return folder


@pytest.fixture(scope="module")
def base(studio):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    return ComfyBackbone(studio.model, studio.clip)


def weights_of(base):
    """The stored weights, by site and projection."""
    def of(site: int, projection: str) -> torch.Tensor:
        return base.sites.linear(base.layout.sites[site], projection).weight.detach().float().clone()

    return of


@pytest.fixture(scope="module")
def weight(base):
    return weights_of(base)


@pytest.fixture
def predict(studio):
    """predict(model): one evaluation of the UNet with ComfyUI's own text states, as denoised latents."""
    positive = studio.encode(studio.clip, "a photo of a red dog in a meadow")
    return lambda model: studio.ksampler(model, positive, "", steps=1, cfg=1.0)


def loaded(studio, file: str):
    return studio.stock.LoraLoader().load_lora(studio.model, studio.clip, file, 1.0, 0.0)[0]


def imported(studio, file: str, **more):
    """A MODEL with the concept's deltas, and the notes."""
    bank, notes = studio.pack.ConceptImport.execute(
        model=studio.model, clip=studio.clip, lora=file, embedding="(none)", name="mine", class_noun="dog",
        kind="object", trigger="red dog", **more).args[:2]
    return studio.aggregate("a photo of <mine>", bank)[0], notes


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
@pytest.mark.parametrize("form", COMFYUI_FORMS)
def test_the_prediction_of_the_stock_loader(studio, folder, base, weight, predict, form, prefix):
    state, _ = written(form, base.layout, weight, prefix)
    file = f"{form}-{prefix}.safetensors"
    save_file(state, folder / file)
    ours, notes = imported(studio, file)
    theirs = predict(loaded(studio, file))
    assert distance(predict(ours), theirs) < EXACT
    assert distance(theirs, predict(studio.model)) > 20 * EXACT, "the file must do something"
    assert "100 % of what the LoRA changes" in notes


def test_the_part_that_is_taken(studio, folder, base, weight, predict):
    """A file with more than text cross-attention: the loader's prediction with the taken part alone."""
    state, _ = written("loha", base.layout, weight)
    save_file(state, folder / "part.safetensors")
    name = module_names(base.layout)[0, "to_q"].replace("attn2", "attn1")
    more, _ = Writer(1, size=30.0).lora(weight(0, "to_q"))
    save_file(state | {f"{name}.{side}": tensor.contiguous() for side, tensor in more.items()},
              folder / "whole.safetensors")
    ours, notes = imported(studio, "whole.safetensors")
    assert distance(predict(ours), predict(loaded(studio, "part.safetensors"))) < EXACT
    assert distance(predict(ours), predict(loaded(studio, "whole.safetensors"))) > 2 * EXACT
    assert "left out: self-attention (1 layer, " in notes


def test_custom_diffusion(studio, folder, base, weight, predict):
    """ComfyUI's loader has no such names; it sets the same weights under its own."""
    theirs, ours, names = {}, {}, module_names(base.layout)
    for site in base.layout.sites:
        for projection in ("to_k", "to_v"):
            before = weight(site.index, projection)
            changed = before + Writer(site.index).diff(before)[1]
            theirs[f"{names[site.index, projection]}.set_weight"] = changed
            ours[f"{site.name}.processor.{projection}_custom_diffusion.weight"] = changed.clone()
    save_file(theirs, folder / "set.safetensors")
    save_file(ours, folder / "custom.safetensors")
    prediction = predict(loaded(studio, "set.safetensors"))
    assert distance(predict(imported(studio, "custom.safetensors")[0]), prediction) < EXACT
    assert distance(prediction, predict(studio.model)) > 20 * EXACT


def test_a_choice_among_adapters(studio, folder, base, weight):
    state, _ = written("lora", base.layout, weight)
    renamed = {key.replace(".weight", f".{name}.weight"): tensor.clone() for name in ("rex", "mimi")
               for key, tensor in state.items() if not key.endswith("alpha")}
    save_file(renamed, folder / "two.safetensors")
    with pytest.raises(ConceptError, match="holds 2 adapters: mimi, rex; say with 'which'"):
        imported(studio, "two.safetensors")
    assert "100 %" in imported(studio, "two.safetensors", which="rex")[1]


@pytest.mark.parametrize("form", ["loha_of_full_rank", "lokr_of_factors", "dora_of_columns"])
def test_sdxl(pack, studio, folder, tiny_xl, form):
    """The tiny SDXL, whose sites have other names in ComfyUI than in diffusers."""
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    small = type(studio)(pack, tiny_xl, None)
    base = ComfyBackbone(small.model, small.clip)
    state, _ = written(form, base.layout, weights_of(base))
    save_file(state, folder / f"xl-{form}.safetensors")
    positive, latent = small.encode(small.clip, "a red dog"), {"samples": torch.zeros(1, 4, 8, 8)}
    ours, theirs, plain = (small.ksampler(model, positive, "", latent, steps=1, cfg=1.0) for model in (
        imported(small, f"xl-{form}.safetensors")[0], loaded(small, f"xl-{form}.safetensors"), small.model))
    assert distance(ours, theirs) < EXACT < distance(theirs, plain)


@pytest.mark.parametrize("form", ["dora_of_columns", "lokr_with_dora"])
def test_a_base_of_half_precision(pack, studio, folder, bank, monkeypatch, form):
    """The weights that DoRA needs are read as the host computes with them."""
    from continual_concepts.core.comfy import demo as module
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    config = module._unet_config
    monkeypatch.setitem(module._CONFIGS, "unet", lambda shape: config(shape) | {"dtype": torch.float16})
    monkeypatch.setattr(module._Config, "manual_cast_dtype", torch.float32)
    half = type(studio)(pack, module.load_demo(name="embedded-64"), bank)
    assert next(half.model.model.diffusion_model.parameters()).dtype == torch.float16
    base = ComfyBackbone(half.model, half.clip)
    state, _ = written(form, base.layout, weights_of(base))
    save_file(state, folder / f"half-{form}.safetensors")
    positive = half.encode(half.clip, "a red dog")
    ours, theirs = (half.ksampler(model, positive, "", steps=1, cfg=1.0) for model in (
        imported(half, f"half-{form}.safetensors")[0], loaded(half, f"half-{form}.safetensors")))
    assert distance(ours, theirs) < EXACT
