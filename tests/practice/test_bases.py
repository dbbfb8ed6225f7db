"""D: bases of other kinds, and versions of other packages."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

import continual_concepts
from continual_concepts.core import cli, versions
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.prompts import Vocabulary
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.demo import base as embedded
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.hosts.pretrained import load_pretrained, noise_schedule
from continual_concepts.core.model.schedule import NoiseSchedule
from continual_concepts.core.model.solver import denoise, solver_for

ROOT = Path(__file__).resolve().parents[2]
TORCH = versions.OLDEST["torch"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
         "num_train_timesteps": 1000, "prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("saved") / "base")


@pytest.fixture
def base(saved, tmp_path) -> Path:
    """A base of one's own in diffusers' layout. It has no model_index.json."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def with_channels(base: Path, channels: int) -> Path:
    from diffusers import UNet2DConditionModel

    config = json.loads((base / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config | {"in_channels": channels}).save_pretrained(base / "unet")
    return base


def refused(base: Path) -> str:
    """The sentence of a base that is refused."""
    with pytest.raises(ConceptError) as caught:
        load_pretrained(base)
    assert "\n" not in str(caught.value) and str(base) in str(caught.value)
    return str(caught.value)


def prediction(base: Path) -> torch.Tensor:
    backbone = load_pretrained(base)
    context = encode_prompts(backbone, Vocabulary([]).parse_all(["a red dog"]), {})
    return backbone.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), context)


@pytest.mark.parametrize("change", [{"rescale_betas_zero_snr": True},
                                    {"trained_betas": [0.001 * i for i in range(1, 300)]}])
def test_d1_schedules_are_as_diffusers_computes_them(change):
    from diffusers import DDPMScheduler

    alphas = noise_schedule(BETAS | change, "base").alphas_cumprod
    assert torch.allclose(alphas, DDPMScheduler(**BETAS | change).alphas_cumprod, atol=1e-6)
    assert alphas[-1] < 1e-7


@pytest.mark.parametrize("change", [
    {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "sigmoid"}, {"beta_schedule": "linear"},
    {"rescale_betas_zero_snr": True, "beta_schedule": "linear"},
    {"rescale_betas_zero_snr": True, "trained_betas": [0.01] * 50},
])
def test_d1_sibling_every_kind_of_betas(change):
    from diffusers import DDPMScheduler

    alphas = noise_schedule(BETAS | change, "base").alphas_cumprod
    assert torch.allclose(alphas, DDPMScheduler(**BETAS | change).alphas_cumprod, atol=1e-6)


@pytest.mark.parametrize(("change", "words"), [
    ({"beta_schedule": "spiral"}, "spiral.*allowed: schedulers with betas"),
    ({"trained_betas": [0.1, 2.0]}, "trained_betas must be .* from 0 to 1"),
    ({"trained_betas": "many"}, "allowed: schedulers with betas"),
    ({"prediction_type": "sample"}, "'sample'; allowed: epsilon, v_prediction"),
    ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "needed: 'v_prediction'"),
])
def test_d1_sibling_schedulers_that_cannot_be_used(base, change, words):
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()      # nothing is loaded before
    (base / "unet" / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(ConceptError, match=words):
        load_pretrained(base)


def test_d1_sibling_a_scheduler_without_betas(base):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert "FlowMatchEulerDiscreteScheduler cannot be used (it has no 'beta_start')" in refused(base)


@pytest.mark.parametrize("change", [{}, {"rescale_betas_zero_snr": True},
                                    {"trained_betas": [0.01] * 499 + [1.0]}])
def test_d1_sibling_sampling_starts_from_pure_noise(change):
    """A model that always predicts one picture draws that picture."""
    schedule: NoiseSchedule = noise_schedule(BETAS | change, "base")
    picture = torch.full((1, 4, 8, 8), 0.7)

    def estimate(noisy, t, _progress):
        signal, noise = schedule._factors(noisy, torch.tensor([t]))
        v = (signal * noisy - picture) / noise
        return schedule.to_epsilon(v, noisy, torch.tensor([t]))

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = denoise(solver_for(schedule, 10), noise, estimate)
    assert torch.allclose(drawn, picture, atol=2e-3)


def as_variant(folder: Path, variant: str) -> None:
    [file] = folder.glob("*.safetensors")
    file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_d2_variants_are_read(base, variant):
    before = prediction(base)
    for part in ("unet", "vae", "text_encoder"):
        as_variant(base / part, variant)
    assert torch.equal(prediction(base), before)


def sharded(base: Path) -> None:
    """Saves the UNet in pieces, as a variant."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    for file in (base / "unet").glob("*.safetensors"):
        file.unlink()
    unet.save_pretrained(base / "unet", variant="fp16", max_shard_size="200KB")
    assert len(list((base / "unet").glob("*.safetensors"))) > 1


def test_d2_sibling_pieces_of_a_variant(base):
    before = prediction(base)
    sharded(base)
    assert torch.allclose(prediction(base), before, atol=1e-4)      # from other addresses: other last bits
    next((base / "unet").glob("*.safetensors")).unlink()
    assert "its unet cannot be loaded" in refused(base)


def test_d2_sibling_the_full_weights_are_preferred(base):
    before = prediction(base)
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight * 0 for name, weight in load_file(file).items()},
              file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert torch.equal(prediction(base), before)


def test_d2_sibling_weights_that_are_pickled_or_missing(base):
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    assert re.search(r"only diffusion_pytorch_model.bin, and pickled .*; needed: diffusion_pytorch_model.saf",
                     refused(base))
    file.with_suffix(".bin").unlink()
    assert "its unet has no weights; needed: diffusion_pytorch_model.safetensors" in refused(base)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_d2_sibling_incomplete_and_damaged_weights(base, part):
    [file] = (base / part).glob("*.safetensors")
    weights = load_file(file)
    weights.pop(max(weights))
    save_file(weights, file, {"format": "pt"})
    assert f"its {part} " in refused(base)
    file.write_bytes(file.read_bytes()[:100])
    assert f"its {part} cannot be loaded" in refused(base)


def test_d3_an_inpainting_base_learns_and_samples(base, learn, run, photos, tmp_path):
    with_channels(base, 9)
    assert learn(photos, "--base", base, "--resolution", 32).code == 0
    drawn = run("sample", "a photo of <rex>", "--bank", tmp_path / "bank.safetensors", "--base", base,
                "--size", 32, "--count", 1, "--steps", 2, "--output", tmp_path / "drawn")
    assert drawn.code == 0 and len(list((tmp_path / "drawn").glob("*.png"))) == 1


@pytest.mark.parametrize("channels", [9, 8])
def test_d3_sibling_what_the_unet_reads_besides_latents(base, channels, teach):
    """Inpainting: everything is painted. InstructPix2Pix: no picture."""
    backbone, read = load_pretrained(with_channels(base, channels)), []
    assert backbone.latent_channels == 4
    context = encode_prompts(backbone, Vocabulary([]).parse_all(["a red dog"] * 2), {})
    hook = backbone.unet.conv_in.register_forward_hook(lambda _module, x, _output: read.append(x[0]))
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    assert backbone.predict(latents, torch.tensor([5, 500]), context).shape == latents.shape
    hook.remove()
    assert torch.equal(read[0][:, :4], latents)
    if channels == 8:
        assert not read[0][:, 4:].any()
    else:
        grey = backbone.encode_images(torch.zeros(2, 3, 32, 24))
        assert read[0][:, 4].eq(1).all() and torch.allclose(read[0][:, 5:], grey, atol=1e-5)
    learned = teach(backbone, ConceptBank(backbone.layout), steps=1)
    assert torch.isfinite(torch.tensor(learned.losses)).all()


@pytest.mark.parametrize(("setting", "words"), [
    ({"in_channels": 5}, "reads 5 channels; allowed: 4 .*, 8 .* and 9 "),
    ({"in_channels": 7, "num_class_embeds": 1000}, "num_class_embeds = 1000"),
    ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
    ({"addition_embed_type": "image"}, "addition_embed_type = 'image'"),
    ({"addition_embed_type": "text_time"}, "no subfolder 'text_encoder_2'"),
    ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type = 'text_proj'"),
    ({"_class_name": "UNet2DModel"}, "its unet is a UNet2DModel"),
])
def test_d3_sibling_unets_that_read_something_else(base, setting, words):
    change(base / "unet" / "config.json", **setting)
    assert re.search(words, refused(base))


def test_d3_sibling_parts_that_are_missing(base):
    for part in ("tokenizer", "text_encoder", "unet"):
        shutil.rmtree(base / part)
        assert f"'{part}'" in refused(base)
    assert "no subfolder 'unet', 'text_encoder', 'tokenizer'; allowed:" in refused(base)


def test_d3_sibling_the_folder_around_a_base(base):
    """As a hub's cache has it."""
    inner = base.parent / "models--a--b" / "snapshots" / "0123abc"
    shutil.move(base, inner)
    assert refused(inner.parents[1]).endswith(f"; did you mean '{inner}'?")


def test_d3_sibling_parts_that_are_empty(base):
    (base / "unet" / "config.json").write_text("[]")
    assert "unet/config.json holds no settings" in refused(base)
    (base / "unet" / "config.json").unlink()
    assert "unet/config.json cannot be read" in refused(base)


def test_d3_sibling_a_tokenizer_without_a_vocabulary(base):
    for file in (base / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    assert "has no vocabulary; needed: vocab.json and merges.txt, or tokenizer.json" in refused(base)


def test_d3_sibling_parts_of_two_models(base):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = json.loads((base / "text_encoder" / "config.json").read_text())
    CLIPTextModel(CLIPTextConfig(**config | {"vocab_size": 300})).save_pretrained(base / "text_encoder")
    assert re.search(r"has \d+ tokens, and its text encoder knows 300", refused(base))
    CLIPTextModel(CLIPTextConfig(**config | {"hidden_size": 64})).save_pretrained(base / "text_encoder")
    assert "give a text of width 64, and the cross-attentions of its unet read width 32" in refused(base)


def test_d3_sibling_what_is_no_folder(run, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    for base, words in ((file, "is a single file; allowed: .*from_single_file"),
                        (tmp_path / "nowhere", "does not exist; allowed: embedded, .*, or SD1.5, SD2 or")):
        assert re.search(words, run("sample", "a dog", "--base", base, "--output", tmp_path / "o").sentence)


def other_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that the other version of transformers gives a text encoder's weights."""
    prefix = "text_model."
    return {name.removeprefix(prefix) if name.startswith(prefix) else prefix + name: weight
            for name, weight in weights.items()}


def test_d4_the_embedded_base_loads_with_other_names(tmp_path):
    state = load_file(embedded.BASE_FILE)
    text = "text_encoder."
    other = other_names({name.removeprefix(text): weight for name, weight in state.items()
                         if name.startswith(text)})
    rest = {name: weight for name, weight in state.items() if not name.startswith(text)}
    save_file(rest | {text + name: weight for name, weight in other.items()}, tmp_path / "base.safetensors",
              {embedded.HEADER: json.dumps(embedded.read_sizes())})
    one, two = (embedded.load_modules(path)["text_encoder"].state_dict()
                for path in (embedded.BASE_FILE, tmp_path / "base.safetensors"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_d4_sibling_a_base_that_another_transformers_saved(base):
    before = prediction(base)
    file = base / "text_encoder" / "model.safetensors"
    save_file(other_names(load_file(file)), file, {"format": "pt"})
    assert torch.equal(prediction(base), before)


def declared() -> dict[str, str]:
    """Package -> lower bound for this Python, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("dependencies = ["):text.index("[project.scripts]")]
    asked = map(Requirement, re.findall(r'"([^"]+>=[^"]+)"', block))
    return {entry.name: re.findall(r">=([\d.]+)", str(entry.specifier))[0] for entry in asked
            if entry.marker is None or entry.marker.evaluate()}


def test_d5_old_packages_are_refused_with_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(versions, "version",
                        lambda package: {"torch": "2.3.1+cu121", "pillow": "9.5.0"}.get(package, "99.1"))
    assert cli.main(["sample", "a dog"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"continual-concepts: these installed packages are too old: torch 2.3.1+cu121 (needed: {TORCH} or "
        "newer), pillow 9.5.0 (needed: 10.3 or newer); upgrade them with pip in the Python that runs this"]


def test_d5_sibling_comfyui_is_told_too(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: "1.0")
    with pytest.raises(ConceptError, match=f"too old: torch 1.0 .needed: {TORCH} or newer"):
        asyncio.run(continual_concepts.comfy_entrypoint())


@pytest.mark.parametrize("installed", ["2.4", "2.4.0", "2.4.0a0+5be2d1e", "2.11.0.dev20260101+cpu", "3"])
def test_d5_sibling_newer_packages_of_any_spelling(monkeypatch, installed):
    monkeypatch.setattr(versions, "OLDEST", {"torch": "2.4"})
    monkeypatch.setattr(versions, "version", lambda package: installed)
    versions.check_versions()


def test_d5_sibling_every_dependency_has_one_lower_bound():
    bounds = declared()
    assert {name: bounds[name] for name in versions.OLDEST} == versions.OLDEST
    required = [line.split(">=") for line in (ROOT / "requirements.txt").read_text().split()]
    assert dict(required) == {name: bound for name, bound in versions.OLDEST.items() if name != "torch"}
    assert f"PyTorch {bounds['torch']}" in (ROOT / "README.md").read_text()
