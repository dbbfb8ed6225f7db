"""Processes of a command end with it, whatever ends it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import wait
from multiprocessing import active_children, get_context

import pytest
import torch

from continual_concepts.core.cli import commands, demo, workers
from continual_concepts.core.cli.parser import main
from continual_concepts.core.cli.workers import Steps, Workers, _begin_process, stopped_as_by_ctrl_c
from continual_concepts.core.errors import ConceptError


@pytest.fixture(autouse=True)
def usual_signals():
    """Signals act as in a terminal. Runners of tests may ignore some, as `nohup` does."""
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    before = {getattr(signal, name): signal.signal(getattr(signal, name), handler)
              for name, handler in usual.items() if hasattr(signal, name)}      # Windows has no SIGHUP
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


@forks
def test_other_errors_of_a_job_are_passed_on_as_they_are():
    told = pytest.raises(FileNotFoundError, match="nowhere")
    with told as found, _started([(os.listdir, "nowhere")]) as pool:
        while pool.running:
            pool.finished()
    assert found.value.filename == "nowhere"


@forks
def test_a_job_that_comes_after_such_an_end_is_one_sentence_too():
    with pytest.raises(ConceptError, match="ended from outside"), _started([(os._exit, 9)]) as pool:
        wait(pool.running, timeout=60)
        pool.start("late", time.sleep, 0)


class Turned(Exception):
    """Another process would receive something that is no error."""

    def __reduce__(self):
        return dict, ()


class Unreadable(Exception):
    def __init__(self) -> None:
        super().__init__()
        self.held = threading.Lock()

    def __str__(self) -> str:
        raise ValueError("no text")


def _fail_oddly(kind):
    raise kind()


@forks
@pytest.mark.parametrize(("kind", "told"), [(Turned, "Turned: "),
                                            (Unreadable, "Unreadable: its text cannot be read")])
def test_odd_errors_are_told_by_their_type(kind, told):
    with pytest.raises(RuntimeError, match=told), _started([(_fail_oddly, kind)]) as pool:
        while pool.running:
            pool.finished()


class OfALibrary(Exception):
    """It cannot be rebuilt from its text, so no other process can receive it."""

    def __init__(self, place: str, missing: str) -> None:
        super().__init__(f"{place} lacks {missing}")


def _fail(way):
    class Local(Exception):
        """No other process finds it."""

    error = Exception("the graph lacks a node")
    if way == "OfALibrary":
        error = OfALibrary("the graph", "a node")
    elif way == "Local":
        error = Local(*error.args)
    elif way == "Gone":
        error = type(way, (Exception,), {})(*error.args)
    else:
        error.held = threading.Lock() if way == "Exception" else lambda: None
    raise error


@forks
@pytest.mark.parametrize("way", ["OfALibrary", "Local", "Gone", "Exception", "Exception with a function"])
def test_an_error_that_cannot_be_passed_on_is_told(way):
    told = pytest.raises(RuntimeError, match=rf"{way.partition(' ')[0]}: the graph lacks a node")
    with told, _started([(_fail, way)]) as pool:
        while pool.running:
            pool.finished()


STOPPED_EARLY = """
import sys, time
from multiprocessing.process import BaseProcess
from continual_concepts.core.cli.workers import Workers, stopped_as_by_ctrl_c

begin, count = BaseProcess.start, 0

def stop(process):
    global count
    begin(process)
    count += 1
    if count % 2:
        raise KeyboardInterrupt

BaseProcess.start = stop
with stopped_as_by_ctrl_c():
    for _ in range(12):
        try:
            with Workers(2, lambda: None) as pool:
                pool.start("", time.sleep, 60)
        except KeyboardInterrupt:
            count = 0
print("ended")
"""


@forks
def test_a_stop_between_the_starts_of_two_processes_ends_both(installed):
    """A new process has the signals' handling of the one that starts it, until it is prepared."""
    done = subprocess.run([sys.executable, "-I", "-c", STOPPED_EARLY], capture_output=True, text=True,
                          timeout=100, check=False)
    assert done.stdout == "ended\n" and done.returncode == 0, done.stderr[-500:]


def test_a_new_process_ignores_at_no_time_the_signal_that_ends_it(monkeypatch):
    """One that did so for a moment lived on, and waited forever for a lock of one that ended."""
    calls = []
    monkeypatch.setattr(signal, "signal", lambda *call: calls.append(call))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(Steps, "counter", None)
    _begin_process(None)
    assert [action for number, action in calls if number == signal.SIGTERM] == [signal.SIG_DFL]
    assert (signal.SIGINT, signal.SIG_IGN) in calls


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


@pytest.mark.parametrize("output", ["file", "file/below", "file\0"])
def test_a_demo_that_is_refused_promises_nothing(tmp_path, capsys, output):
    (tmp_path / "file").write_text("not a folder")
    assert main(["demo", "--output", str(tmp_path / output)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_demo_says_at_once_that_there_is_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "draw_all", lambda *_: pytest.fail("began"))
    little = shutil.disk_usage(tmp_path)._replace(free=1_900_000)
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda folder: little)
    with pytest.raises(ConceptError, match="has room for 1 MB, and the demo needs 5 MB"):
        demo.run(tmp_path / "out")

    def nowhere():
        raise FileNotFoundError("no usable folder")

    monkeypatch.setattr(demo.tempfile, "gettempdir", nowhere)
    with pytest.raises(ConceptError, match="no folder for temporary files"):
        demo.run(tmp_path / "out")


def _demo_that_gets(name, output, temporary):
    """A demo that receives a signal while its processes work."""
    def draw_all(*_):
        with _started([(time.sleep, 60), (time.sleep, 61)]) as pool:
            pool.finished()
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(30)

    tempfile.tempdir, demo.draw_all = str(temporary), draw_all
    sys.exit(main(["demo", "--output", str(output)]))


@forks
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_demo_that_is_ended_leaves_no_temporary_files(tmp_path, capfd, name):
    (tmp_path / "temporary").mkdir()
    process = get_context("fork").Process(target=_demo_that_gets,
                                          args=(name, tmp_path / "out", tmp_path / "temporary"))
    process.start()
    process.join(60)
    assert process.exitcode == 130 and not list((tmp_path / "temporary").iterdir())
    promise, stopped = capfd.readouterr().err.splitlines()
    assert promise.startswith("Three ways learn") and "stopped; the same command begins anew" in stopped


@forks
def test_signals_that_come_together_stop_once(monkeypatch):
    """The second one would break off what removes files and ends processes."""
    numbers, cleaned = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}, []
    with pytest.raises(KeyboardInterrupt), stopped_as_by_ctrl_c():
        try:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
            for number in numbers:
                os.kill(os.getpid(), number)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            cleaned.append(True)
    assert cleaned
    monkeypatch.setattr(workers, "GRACE", 0.0)      # a clean-up that hangs can be stopped
    with pytest.raises(KeyboardInterrupt), stopped_as_by_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@forks
def test_processes_that_learn_together_keep_what_signals_do(monkeypatch):
    """One that waits for another one in code that Python cannot interrupt would not end."""
    monkeypatch.setattr(workers, "is_launched", lambda: True)
    with stopped_as_by_ctrl_c():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@forks
def test_signals_mean_what_they_did_before():
    """After a demo, in other threads, and where they are ignored, as by nohup."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before, inside = [signal.getsignal(number) for number in numbers], []

    def look():
        with stopped_as_by_ctrl_c():
            inside.append([signal.getsignal(number) for number in numbers])

    other = threading.Thread(target=look)
    other.start()
    other.join()
    assert inside == [before] and before == [signal.SIG_DFL] * 2
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        look()
        assert callable(inside[1][0]) and inside[1][1] is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    look()
    assert all(map(callable, inside[2])) and [signal.getsignal(number) for number in numbers] == before
