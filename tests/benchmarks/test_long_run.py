"""Trainings that are stopped and resumed."""

from __future__ import annotations

import torch

from continual_concepts.benchmarks.pretraining.long_run import LongRun, Plan, load_average, newest_checkpoints


def learn(folder, steps: int, stop_at: int | None = None) -> tuple[LongRun, torch.nn.Linear]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    run = LongRun(model, folder, "toy", Plan(steps, 0.05, warmup=2))
    for step in run:
        run.learn(model(torch.full((1, 3), float(step))).square().mean())
        if stop_at is not None and run.step == stop_at:
            run.save()
            break
    return run, model


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, whole = learn(tmp_path / "a", 12)
    learn(tmp_path / "b", 12, stop_at=5)
    run, resumed = learn(tmp_path / "b", 12)
    assert run.start == 5 and run.finished
    assert torch.allclose(whole.weight, resumed.weight, atol=1e-6)


def test_only_the_two_newest_checkpoints_stay_and_a_broken_one_is_passed_over(tmp_path):
    for stop in (2, 4, 6):
        learn(tmp_path, 12, stop_at=stop)
    files = newest_checkpoints(tmp_path, "toy")
    assert [file.name for file in files] == ["toy-0000006.pt", "toy-0000004.pt"]
    files[0].write_bytes(b"cut short")
    assert load_average(torch.nn.Linear(3, 2), tmp_path, "toy") == 4


def test_the_rate_rises_stays_and_falls():
    plan = Plan(1000, 1.0, warmup=100, decay=0.2)
    assert plan.rate(0) == 0.01 and plan.rate(100) == plan.rate(790) == 1.0
    assert abs(plan.rate(900) - 0.5) < 1e-9 and plan.rate(1000) == 0.0
