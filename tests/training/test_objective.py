"""The loss of one batch: masks, weights, and gradient checkpointing that changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.data.batch import Batch
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.methods import Task, make
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.objective import Draw, denoising_loss, draw, predict
from continual_concepts.core.training.trainer import Trainer


@pytest.fixture
def begun(slim_backbone):
    """A run before its first step, its first batch, and how to get that batch's loss."""
    pictures = [Picture(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1, "")
                for i in range(2)]
    data = prepare(slim_backbone, pictures, "rex", "dog", Framing(32, flip=False))
    config = TrainingConfig(steps=2, batch_size=2, resolution=32)
    run = Trainer(Task("rex", "dog", slim_backbone, ConceptBank(slim_backbone.layout)), make("cidm"), data,
                  config)
    for up in run.method.adapters.up.values():
        torch.nn.init.normal_(up, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = data.draw(2, 1.0, torch.Generator().manual_seed(0))
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(3))

    def loss(batch, config=config):
        context = encode_prompts(slim_backbone, run.vocabulary.parse_all(batch.prompts),
                                 {"rex": run.method.token_group()})
        seen = predict(slim_backbone, batch, context, Draw(torch.tensor([100, 800]), noise),
                       run.method.processor())
        return denoising_loss(slim_backbone, seen, config), run.method.penalty(seen)

    return run, batch, loss


def test_logit_normal_timesteps_prefer_the_middle():
    ones, generator = torch.ones(4000), torch.Generator().manual_seed(0)
    batch = Batch(ones.view(-1, 1, 1, 1), ("",) * 4000, ones.view(-1, 1, 1, 1), ones > 1, ones)
    even, middle = (draw(batch, 1000, TrainingConfig(timestep_sampling=kind), generator).timesteps.float()
                    for kind in ("uniform", "logit-normal"))
    assert abs(even.mean() - 500) < 15 and abs(even.std() - 289) < 8
    logits = torch.logit((middle + 0.5) / 1000)
    assert abs(logits.mean()) < 0.05 and abs(logits.std() - 1) < 0.05
    assert middle.min() >= 0 and middle.max() <= 999


def test_what_a_mask_hides_has_no_influence(slim_backbone, begun, monkeypatch):
    _, batch, loss = begun
    masks = batch.masks.clone()
    masks[..., :4] = 0
    original, change = slim_backbone.predict, torch.zeros(2, 4, 8, 8)
    monkeypatch.setattr(slim_backbone, "predict", lambda *args: original(*args) + change)
    base = loss(replace(batch, masks=masks))[0].item()
    change[..., :4] = 100.0
    assert loss(replace(batch, masks=masks))[0].item() == pytest.approx(base)
    change[..., 4:] = 1.0
    assert loss(replace(batch, masks=masks))[0].item() != pytest.approx(base)


def test_the_loss_is_a_mean_over_what_counts(begun):
    """A mask of half the picture does not halve it; weights and Min-SNR multiply it per sample."""
    _, batch, loss = begun
    full = loss(batch)[0].item()
    assert full == pytest.approx(loss(replace(batch, masks=batch.masks * 0.5))[0].item(), rel=1e-5)
    first = loss(replace(batch, weights=torch.tensor([1.0, 0.0])))[0].item()
    second = loss(replace(batch, weights=torch.tensor([0.0, 1.0])))[0].item()
    assert first + second == pytest.approx(full, rel=1e-5)
    both = loss(replace(batch, weights=torch.tensor([1.0, 0.25])))[0].item()
    assert both == pytest.approx(first + 0.25 * second, rel=1e-5)
    gamma = begun[0].task.backbone.schedule.min_snr_weights(torch.tensor([100, 800]), 5.0)
    weighted = loss(batch, TrainingConfig(min_snr_gamma=5.0))[0].item()
    assert weighted == pytest.approx(float(gamma[0]) * first + float(gamma[1]) * second, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(slim_backbone, begun):
    run, batch, loss = begun
    masks = batch.masks.clone()
    masks[..., :masks.shape[-1] // 2] = 0      # a full mask has no attention term
    batch = replace(batch, masks=masks)
    forward = type(slim_backbone.unet.down_blocks[0].resnets[0]).forward
    results = []
    for enabled in (False, True):
        with slim_backbone.gradient_checkpointing(enabled):
            for _ in range(2):      # twice: nothing of the first backward pass may remain
                value, terms = loss(batch)
                (value + 100 * terms["attention"]).backward()
        results.append((value.item(), terms["attention"].item(), [p.grad.clone() for p in run.parameters]))
        run.optimizer.zero_grad()
    (plain, plain_terms, gradients), (again, again_terms, checkpointed) = results
    assert again == pytest.approx(plain, abs=1e-6) and again_terms == pytest.approx(plain_terms, abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, checkpointed, strict=True))
    assert sum(g.abs().sum() for g in gradients) > 0
    assert slim_backbone.unet.down_blocks[0].resnets[0].forward.__func__ is forward
    assert not slim_backbone.unet.training


def test_checkpointing_recomputes_with_its_own_program(slim_backbone, begun):
    """Another forward pass between a forward and its backward pass (distillation, replay) must not mix in."""
    run, batch, loss = begun
    gradients = []
    for between in (False, True):
        with slim_backbone.gradient_checkpointing(True):
            value, _ = loss(batch)
            if between:
                context = encode_prompts(slim_backbone, run.vocabulary.parse_all(["", ""]), {})
                with torch.no_grad():
                    slim_backbone.predict(batch.latents, torch.tensor([1, 2]), context)
            value.backward()
        gradients.append([p.grad.clone() for p in run.parameters])
        run.optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_saves_activations(slim_backbone, begun):
    _, batch, loss = begun
    kept = []
    for enabled in (False, True):
        total = [0]

        def count(tensor, total=total):
            total[0] += tensor.numel()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with slim_backbone.gradient_checkpointing(enabled), hooks:
            loss(batch)
        kept.append(total[0])
    assert kept[1] < 0.7 * kept[0]
