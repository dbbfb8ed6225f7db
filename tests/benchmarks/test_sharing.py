"""The default plan, and several processes that share its runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest

from continual_concepts.benchmarks.continual.plan import NAMED, ORDERS, SEEDS, all_methods, planned
from continual_concepts.benchmarks.continual.runs import Run
from continual_concepts.benchmarks.continual.sharing import claimed, is_finished, share
from continual_concepts.core.methods import DEFAULT, METHODS

RUNS = [Run("bound", 1, 0, seed) for seed in range(6)]


def finish(folder, run, text="{}"):
    (folder / f"{run.name}.json").write_text(text)


def test_the_plan_tells_seeds_and_orders_apart():
    runs = planned(all_methods(), 10)
    counts = Counter(run.method for run in runs)
    assert set(counts) == set(METHODS) and DEFAULT in NAMED
    assert all(counts[name] == (7 if name in NAMED else 3) for name in METHODS)
    for method in METHODS:
        places = [(run.order, run.seed) for run in runs if run.method == method]
        assert len(set(places)) == len(places)
        assert len({seed for order, seed in places if order == ORDERS[0]}) == (5 if method in NAMED else 2)
        assert len({order for order, seed in places if seed == SEEDS[0]}) == (3 if method in NAMED else 2)
    common = set.intersection(*({(run.order, run.seed) for run in runs if run.method == method}
                                for method in METHODS))
    assert len(common) == 3 and [(r.order, r.seed) for r in runs[:len(METHODS)]] == [(21, 21)] * len(METHODS)


def test_overrides_have_the_runs_of_their_method():
    runs = planned([("bound", "rank=2"), ("ewc", "")], 4)
    assert Counter(run.label for run in runs) == {"bound+rank=2": 7, "ewc": 3} and runs[0].tasks == 4


def test_a_claimed_run_is_taken_by_nobody_else(tmp_path):
    with claimed(tmp_path, RUNS[0]) as mine, claimed(tmp_path, RUNS[0]) as other:
        assert (mine, other) == (True, False)
        with claimed(tmp_path, RUNS[1]) as free:
            assert free
    with claimed(tmp_path, RUNS[0]) as again:
        assert again
        finish(tmp_path, RUNS[0])
    assert not (tmp_path / f".{RUNS[0].name}.lock").exists() and is_finished(tmp_path, RUNS[0])


def test_an_error_leaves_the_run_to_others(tmp_path):
    with pytest.raises(OSError), claimed(tmp_path, RUNS[0]):
        raise OSError("disk full")
    with claimed(tmp_path, RUNS[0]) as mine:
        assert mine


def test_runs_that_sample_another_runs_bank_wait_for_it(tmp_path):
    sampled = Run("cidm", 1, 0, 0, overrides="mode=paper")
    done = []
    share(tmp_path, lambda: [sampled, sampled.learned_as()],
          lambda run: (done.append(run.label), finish(tmp_path, run)), pause=0)
    assert done == ["cidm", "cidm+mode=paper"]


def test_finished_runs_decide_which_are_wanted_next(tmp_path):
    done = []

    def wanted():
        return RUNS[:2] if len(done) < 2 else RUNS[:4]

    share(tmp_path, wanted, lambda run: (done.append(run.seed), finish(tmp_path, run)), pause=0)
    assert done == [0, 1, 2, 3]


def _work(folder, label, seconds):
    def perform(run):
        if not is_finished(folder, run):
            time.sleep(seconds)
            finish(folder, run, json.dumps(label))
            with open(folder / "done.txt", "a") as file:
                file.write(f"{label} {run.seed}\n")
    share(folder, lambda: RUNS, perform, pause=0.02)


def test_two_processes_do_no_run_twice(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(tmp_path, label, 0.05)) for label in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    lines = (tmp_path / "done.txt").read_text().split("\n")[:-1]
    assert sorted(line.split()[1] for line in lines) == list("012345")
    assert {line.split()[0] for line in lines} == {"a", "b"}
    assert not list(tmp_path.glob(".*.lock"))


def test_the_run_of_a_killed_process_is_performed_by_another(tmp_path):
    context = multiprocessing.get_context("fork")
    stuck = context.Process(target=_work, args=(tmp_path, "stuck", 600))
    stuck.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".*.lock")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(stuck.pid, signal.SIGKILL)
    stuck.join(30)
    _work(tmp_path, "a", 0)
    assert all(is_finished(tmp_path, run) for run in RUNS)
