"""The networks and commands of the 128-pixel bases; ComfyUI's transformer is in tests/host."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from continual_concepts.benchmarks.__main__ import build_parser, main
from continual_concepts.benchmarks.pretraining import command_128, progress, quality
from continual_concepts.benchmarks.pretraining.autoencoder import fit_linear
from continual_concepts.benchmarks.pretraining.data import to_tensor
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.demo import base
from continual_concepts.core.demo.autoencoder import SceneAutoencoder
from continual_concepts.core.demo.transformer import DiffusionTransformer
from continual_concepts.core.neurons.scores import encode_plain
from continual_concepts.core.sampling.sampling import sample, starting_noise
from continual_concepts.core.sampling.settings import SampleSettings

AUTOENCODER = {"latent_channels": 6, "encoder_widths": (8, 8), "encoder_blocks": 1,
               "decoder_widths": (8, 8, 8), "decoder_blocks": (1, 1, 1)}
TINY = {"in_channels": 4, "model_channels": 48, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 16,
        "adaln_lora_dim": 8, "rope_ratio": 0.0125}


def test_the_linear_code_alone_is_an_orthogonal_projection():
    autoencoder = SceneAutoencoder(**AUTOENCODER).requires_grad_(False)
    pictures = np.random.default_rng(1).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    fit_linear(autoencoder, pictures, evening=0.5)
    latents = autoencoder.encode(to_tensor(pictures)).latent_dist.mean
    once = autoencoder.decode(latents).sample
    twice = autoencoder.decode(autoencoder.encode(once).latent_dist.mean).sample
    assert latents.shape == (20, 6, 2, 2) and torch.allclose(once, twice, atol=1e-4)


def test_text_enters_the_transformer_at_cross_attention_only():
    generator = torch.Generator().manual_seed(0)
    transformer = DiffusionTransformer(**TINY).requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    x, times = torch.randn(2, 4, 6, 4, generator=generator), torch.tensor([100.0, 900.0])
    texts = [torch.randn(2, 5, 16, generator=generator) for _ in range(2)]
    assert not torch.allclose(transformer(x, times, texts[0]), transformer(x, times, texts[1]))
    for block in transformer.blocks:
        block.cross_attn.output_proj.weight.zero_()
    first, second = (transformer(x, times, text) for text in texts)
    assert torch.equal(first, second) and first.shape == x.shape


def test_an_untrained_transformer_predicts_nothing():
    x = torch.randn(1, 4, 4, 4)
    assert not DiffusionTransformer(**TINY)(x, torch.tensor([500.0]), torch.randn(1, 3, 16)).any()


@torch.no_grad()
def test_the_library_draws_what_the_training_draws(transformer_base, monkeypatch):
    """Euler's method with many steps, and Heun's method with the schedule that the exported file names."""
    backbone, drawn = base.load_base(transformer_base), []
    monkeypatch.setattr(backbone, "decode_latents", lambda latents: drawn.append(latents) or latents)
    settings = SampleSettings(steps=100, cfg=1.5, size=(32, 32))
    sample(backbone, ConceptBank(backbone.layout), ["a dog"], [3], settings)
    empty, text = (encode_plain(backbone, [prompt]).hidden[:, 0] for prompt in ("", "a dog"))
    noise = starting_noise(backbone, [3], (32, 32))
    expected = progress.flow_sample(backbone.denoiser, noise, text, empty, 50, 1.5)
    assert (drawn[0] - expected).norm() < 0.1 * (noise - expected).norm()


def test_the_command_line_names_the_stages(tmp_path):
    line = ["pretraining-128", str(tmp_path), "--stages", "unet", "--hours", "1"]
    options = build_parser().parse_args(line)
    assert options.run is command_128.train and options.stages == ["unet"] and options.hours == 1.0


@pytest.mark.parametrize("kind", command_128.KINDS)
def test_a_base_that_was_never_trained_is_refused(kind, tmp_path, capsys):
    assert main(["pretraining-128-export", str(tmp_path), kind, str(tmp_path / "base.safetensors")]) == 1
    assert "no checkpoint" in capsys.readouterr().err and not (tmp_path / "base.safetensors").exists()


def test_a_base_file_that_does_not_ship_can_be_judged(transformer_base, tmp_path, monkeypatch):
    for other in ("classifier_accuracy", "encoder_auc"):      # slow, and not of this file
        monkeypatch.setattr(quality, other, dict)
    target = tmp_path / "quality.json"
    assert main(["base", "--base-file", str(transformer_base), "--pictures", "2", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["pictures"] == 2 and set(found["generated"]) == {"class", "colour", "both"}
