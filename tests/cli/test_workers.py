"""Processes of a command end with it, whatever ends it."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import active_children, get_context

import pytest

from continual_concepts.core.cli import commands, demo
from continual_concepts.core.cli.parser import main
from continual_concepts.core.cli.workers import Workers
from continual_concepts.core.errors import ConceptError

forks = pytest.mark.skipif(sys.platform != "linux", reason="forks need Linux")


def _started(jobs):
    pool = Workers(2, lambda: None)
    for job, argument in jobs:
        pool.start(argument, job, argument)
    return pool


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@forks
@pytest.mark.parametrize("error", [KeyboardInterrupt, ConceptError])
def test_an_error_ends_running_jobs_and_begins_no_other(error, tmp_path):
    before, began = set(active_children()), time.monotonic()
    jobs = [(time.sleep, 60), (time.sleep, 61), (os.mkdir, str(tmp_path / "begun"))]
    with pytest.raises(error), _started(jobs) as pool:
        pool.finished()
        raise error("stop")
    assert time.monotonic() - began < 20 and set(active_children()) <= before
    assert not list(tmp_path.iterdir())


@forks
def test_a_process_that_was_ended_from_outside_is_one_sentence():
    with pytest.raises(ConceptError, match="ended from outside"), _started([(os._exit, 9)]) as pool:
        while pool.running:
            pool.finished()


def _killed_parent(said):
    pool = _started([(time.sleep, 60)])
    said.send([process.pid for process in active_children()])
    pool.finished()
    os.kill(os.getpid(), signal.SIGKILL)


@forks
def test_processes_end_when_their_parent_is_killed():
    context = get_context("fork")
    heard, said = context.Pipe(duplex=False)
    parent = context.Process(target=_killed_parent, args=(said,))
    parent.start()
    workers = heard.recv()
    parent.join(30)
    assert parent.exitcode == -signal.SIGKILL and len(workers) == 2
    until = time.monotonic() + 20
    while any(map(_lives, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(_lives, workers))


@pytest.mark.parametrize("command", [["demo"], ["sample", "a dog"], ["learn-all", "x", "--bank", "b"]])
def test_a_stopped_command_says_whether_it_goes_on_where_it_was(command, monkeypatch, capsys):
    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, command[0].replace("-", "_"), stopped)
    assert main(command) == 130
    goes_on = "continues learning where it stopped" in capsys.readouterr().err
    assert goes_on == (command[0] == "learn-all")


def test_the_demo_says_at_once_that_matplotlib_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ConceptError, match="pip install matplotlib"):
        demo.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_demo_says_at_once_that_an_earlier_bank_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "draw_all", lambda *_: pytest.fail("began"))
    (tmp_path / "bank.safetensors").write_bytes(b"garbage")
    with pytest.raises(ConceptError, match="not a readable"):
        demo.run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]
