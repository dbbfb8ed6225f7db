"""The networks and commands of the 128-pixel bases; ComfyUI's transformer is in tests/host."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from continual_concepts.benchmarks.__main__ import build_parser, main
from continual_concepts.benchmarks.pretraining import command_128, denoisers, progress, quality, stages
from continual_concepts.benchmarks.pretraining.autoencoder import fit_linear
from continual_concepts.benchmarks.pretraining.data import to_tensor
from continual_concepts.benchmarks.pretraining.latent_set import LatentSet
from continual_concepts.benchmarks.pretraining.long_run import Plan, never
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.demo import base
from continual_concepts.core.demo.autoencoder import SceneAutoencoder
from continual_concepts.core.demo.bases import read_sizes
from continual_concepts.core.demo.joint_transformer import JointTransformer
from continual_concepts.core.demo.transformer import DiffusionTransformer
from continual_concepts.core.demo.vocabulary import CONTEXT_LENGTH
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.neurons.scores import encode_plain
from continual_concepts.core.sampling.sampling import sample, starting_noise
from continual_concepts.core.sampling.settings import SampleSettings

AUTOENCODER = {"latent_channels": 6, "encoder_widths": (8, 8), "encoder_blocks": 1,
               "decoder_widths": (8, 8, 8), "decoder_blocks": (1, 1, 1)}
TINY = {"in_channels": 4, "model_channels": 48, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 16,
        "adaln_lora_dim": 8, "rope_ratio": 0.0125}
TINY_JOINT = {"in_channels": 4, "hidden_size": 32, "depth": 1, "depth_single_blocks": 1, "num_heads": 2,
              "context_in_dim": 16, "mlp_ratio": 2.0, "theta": 50.0}


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


@pytest.mark.parametrize("transformer, sizes", [(DiffusionTransformer, TINY), (JointTransformer, TINY_JOINT)])
def test_an_untrained_transformer_predicts_nothing(transformer, sizes):
    x = torch.randn(1, 4, 4, 4)
    assert not transformer(**sizes)(x, torch.tensor([500.0]), torch.randn(1, 3, 16)).any()


@pytest.mark.parametrize("kind", list(stages.FLOWS))
def test_a_flow_learns_and_goes_on_where_it_stopped(kind, tmp_path):
    """Two steps in two calls; the loss of the second step is finite and the weights have changed."""
    sizes = TINY_JOINT if kind == "joint" else TINY
    widths = {"in_channels": 6, "context_in_dim" if kind == "joint" else "crossattn_emb_channels": 128}
    ids = torch.zeros(4, 1, CONTEXT_LENGTH, dtype=torch.int16)
    data = LatentSet(torch.randn(4, 6, 4, 4).half(), ids, ids[0, 0])
    for steps in (1, 2):
        run = denoisers.train_flow(kind, sizes | widths, stages.FLOWS[kind][1], data, tmp_path,
                                   Plan(steps, 1e-3, warmup=1, muon=True), never, batch=2)
        assert run.finished and run.start == steps - 1 and np.isfinite(run.smooth)


def test_a_flow_goes_on_from_a_base_file(transformer_base, joint_base, tmp_path):
    """Its weights and steps are the start where there is no checkpoint."""
    modules, done = denoisers.modules_of("transformer", transformer_base)
    ids, size = torch.zeros(4, 1, CONTEXT_LENGTH, dtype=torch.int16), read_sizes(transformer_base)
    data = LatentSet(torch.randn(4, size["transformer"]["in_channels"], 4, 4).half(), ids, ids[0, 0])
    for more in (0, 1, 2):
        plan = Plan(done + more, 0.0, warmup=1)
        run = denoisers.train_flow("transformer", {}, 1000.0, data, tmp_path, plan, never, batch=2,
                                   begun=transformer_base)
        assert run.start == max(done, done + more - 1) and run.finished
    state = run.modules.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in modules.state_dict().items())
    with pytest.raises(ConceptError, match="holds no transformer"):
        denoisers.modules_of("transformer", joint_base)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", list(stages.FLOWS))
def test_the_library_draws_what_the_training_draws(request, kind, monkeypatch):
    """Euler's method with many steps, and Heun's method with the schedule that the exported file names."""
    file = request.getfixturevalue("joint_base" if kind == "joint" else "transformer_base")
    backbone, drawn = base.load_base(file), []
    monkeypatch.setattr(backbone, "decode_latents", lambda latents: drawn.append(latents) or latents)
    settings = SampleSettings(steps=100, cfg=1.5, size=(32, 32))
    sample(backbone, ConceptBank(backbone.layout), ["a dog"], [3], settings)
    empty, text = (encode_plain(backbone, [prompt]).hidden[:, 0] for prompt in ("", "a dog"))
    noise = starting_noise(backbone, [3], (32, 32))
    expected = progress.flow_sample(backbone.denoiser, stages.FLOWS[kind][1], noise, text, empty, 50, 1.5)
    assert (drawn[0] - expected).norm() < 0.1 * (noise - expected).norm()


def test_the_command_line_names_the_stages(tmp_path):
    line = ["pretraining-128", str(tmp_path), "--stages", "unet", "--hours", "1"]
    options = build_parser().parse_args(line)
    assert options.run is command_128.train and options.stages == ["unet"] and options.hours == 1.0


@pytest.mark.parametrize("kind", base.DENOISERS)
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
