"""Solvers by their formulas, the guided estimate, and the loop."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.model.flow import FlowSchedule
from continual_concepts.core.model.solver import DpmSolver, FirstOrder, denoise, guided, solver_for
from continual_concepts.core.neurons.scores import encode_plain


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_dpm_solver_runs_on_the_schedule_of_training(tiny_backbone):
    solver = DpmSolver(tiny_backbone.schedule, 10)
    assert torch.allclose(solver.scheduler.alphas_cumprod.float(), tiny_backbone.schedule.alphas_cumprod,
                          atol=1e-5)
    assert len(solver.timesteps) == 10 and solver.timesteps[0] == 999


def test_ddim_by_its_equation(tiny_backbone):
    schedule, solver = tiny_backbone.schedule, FirstOrder(tiny_backbone.schedule, 4)
    x, noise = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    assert solver.timesteps == [999, 749, 499, 249]
    now, then = schedule.alphas_cumprod[749], schedule.alphas_cumprod[499]
    clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
    assert torch.allclose(solver.step(noise, 749, x), then.sqrt() * clean + (1 - then).sqrt() * noise,
                          atol=1e-5)


@pytest.mark.parametrize("solver", [FirstOrder, DpmSolver])
def test_a_solver_that_knows_the_noise_ends_at_the_clean_latents(tiny_backbone, solver):
    schedule, seen = tiny_backbone.schedule, []
    clean, noise = 0.3 * random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    start = schedule.add_noise(clean, noise, torch.full((2,), 999))

    def estimate(x, t, progress):
        seen.append(progress)
        alpha = schedule.alphas_cumprod[t]
        return (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()

    found = denoise(solver(schedule, 5), start, estimate)
    assert torch.allclose(found, clean, atol=1e-2) and seen == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_eulers_method_by_its_equation():
    flow = FlowSchedule.shifted(3.0)
    solver = FirstOrder(flow, 4)
    x, velocity = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    assert solver.timesteps == [999, 749, 499, 249]
    expected = x + (flow.sigmas[499] - flow.sigmas[749]) * velocity
    assert torch.allclose(solver.step(velocity, 749, x), expected, atol=1e-6)
    assert torch.allclose(solver.step(velocity, 249, x), x - flow.sigmas[249] * velocity, atol=1e-6)


def test_a_flow_that_is_known_ends_at_the_clean_latents():
    clean, noise, flow = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1), FlowSchedule.shifted(3.0)
    found = denoise(solver_for(flow, 5), noise, lambda x, t, progress: noise - clean)
    assert torch.allclose(found, clean, atol=1e-5)


def test_each_schedule_has_its_solver(tiny_backbone):
    assert isinstance(solver_for(tiny_backbone.schedule, 3), DpmSolver)
    assert isinstance(solver_for(FlowSchedule.shifted(3.0), 3), FirstOrder)


def test_what_moves_latents_acts_before_every_estimate(tiny_backbone):
    found = denoise(FirstOrder(tiny_backbone.schedule, 3), random(1, 4, 3, 3),
                    lambda x, t, progress: torch.zeros_like(x),
                    lambda x, t, progress: torch.full_like(x, float(t)))
    last = tiny_backbone.schedule.alphas_cumprod[333].sqrt()
    assert torch.allclose(found, 333 / last.expand_as(found))


@torch.no_grad()
def test_guidance_is_both_halves_in_one_evaluation(tiny_backbone, monkeypatch):
    x, t = random(2, 4, 8, 8), torch.tensor([400, 400])
    negative, positive = (encode_plain(tiny_backbone, [text] * 2) for text in ("blurry", "a dog"))
    without, wanted = (tiny_backbone.predict(x, t, context) for context in (negative, positive))
    sizes, original = [], tiny_backbone.predict
    monkeypatch.setattr(tiny_backbone, "predict",
                        lambda latents, *rest: sizes.append(len(latents)) or original(latents, *rest))
    assert torch.allclose(guided(tiny_backbone, x, 400, negative, positive, 3.0),
                          without + 3 * (wanted - without), atol=1e-4)
    assert torch.allclose(guided(tiny_backbone, x, 400, negative, positive, 1.0), wanted, atol=1e-4)
    assert sizes == [4, 2]
