"""The noise schedule: what the net is asked for, and how it is weighed."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.schedule import PREDICTIONS, NoiseSchedule

T = torch.tensor([0, 300, 700, 999])


@pytest.fixture(params=PREDICTIONS)
def schedule(request, tiny_backbone):
    return NoiseSchedule(tiny_backbone.schedule.alphas_cumprod, request.param)


@pytest.fixture
def drawn():
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, 3, 3, generator=g), torch.randn(4, 4, 3, 3, generator=g)


def test_a_perfect_net_gives_the_noise_back(schedule, drawn):
    latents, noise = drawn
    noisy = schedule.add_noise(latents, noise, T)
    assert torch.allclose(schedule.to_epsilon(schedule.target(latents, noise, T), noisy, T), noise, atol=1e-5)


def test_variance_is_preserved(schedule):
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(4, 1, 200, 200, generator=g), torch.randn(4, 1, 200, 200, generator=g)
    assert torch.allclose(schedule.add_noise(latents, noise, T).var((1, 2, 3)), torch.ones(4), atol=0.03)


def test_v_is_the_derivative_of_salimans_and_ho(tiny_backbone, drawn):
    latents, noise = drawn
    schedule = NoiseSchedule(tiny_backbone.schedule.alphas_cumprod, "v_prediction")
    alpha = schedule.alphas_cumprod[T].view(-1, 1, 1, 1)
    assert torch.allclose(schedule.target(latents, noise, T),
                          alpha.sqrt() * noise - (1 - alpha).sqrt() * latents, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(schedule, gamma):
    alpha = schedule.alphas_cumprod[T]
    snr = alpha / (1 - alpha)
    expected = torch.minimum(snr, torch.tensor(gamma)) / (snr if schedule.prediction == "epsilon"
                                                          else snr + 1)
    assert torch.allclose(schedule.min_snr_weights(T, gamma), expected)
    assert (schedule.min_snr_weights(T, gamma) <= 1).all()


def test_other_predictions_are_refused():
    with pytest.raises(ConceptError, match="epsilon, v_prediction"):
        NoiseSchedule(torch.ones(3), "sample")
