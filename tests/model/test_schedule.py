"""Schedules: what the net is asked for, and how it is weighed."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.flow import FlowSchedule
from continual_concepts.core.model.schedule import PREDICTIONS, NoiseSchedule
from continual_concepts.core.training.config import TrainingConfig

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


def test_the_shares_of_a_flow_are_shifted():
    """A shift of 3 moves the middle of the timesteps to three quarters of noise."""
    flow = FlowSchedule.shifted(3.0)
    assert len(flow) == 1000 and flow.sigmas[-1] == 1 and torch.isclose(flow.sigmas[499], torch.tensor(0.75))
    assert torch.allclose(FlowSchedule.shifted(1.0).sigmas, torch.arange(1, 1001) / 1000)


def test_a_flow_is_a_straight_line_from_the_picture_to_the_noise(drawn):
    latents, noise = drawn
    flow = FlowSchedule.shifted(3.0)
    noisy, velocity = flow.add_noise(latents, noise, T), flow.target(latents, noise, T)
    sigma = flow.sigmas[T].view(-1, 1, 1, 1)
    assert torch.allclose(noisy - sigma * velocity, latents, atol=1e-5)
    assert torch.allclose(noisy + (1 - sigma) * velocity, noise, atol=1e-5)
    assert flow.estimate(velocity, noisy, T) is velocity


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shift_that_is_none_is_refused(shift):
    with pytest.raises(ConceptError, match="allowed: above 0"):
        FlowSchedule.shifted(shift)


@pytest.mark.parametrize("sigmas", [[0.0, 0.5], [0.5, 0.4], [0.5, 1.5]])
def test_shares_that_are_no_flow_are_refused(sigmas):
    with pytest.raises(ConceptError, match="rising, above 0 and at most 1"):
        FlowSchedule(torch.tensor(sigmas))


def test_min_snr_weights_are_refused_for_a_flow(schedule):
    weighted = TrainingConfig(min_snr_gamma=5.0)
    weighted.check_schedule(schedule)
    TrainingConfig().check_schedule(FlowSchedule.shifted(3.0))
    with pytest.raises(ConceptError, match="'min_snr_gamma' is 5; allowed: 0 for a base"):
        weighted.check_schedule(FlowSchedule.shifted(3.0))
