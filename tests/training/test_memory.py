"""Memory that stays with the process between steps of learning."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from continual_concepts.core.training import memory

needs_glibc = pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")


# counts the pages that the system gives anew for tensors of 40 MiB: 10,240 each, fewer where pages are larger
MEASURED = """
import resource
import torch
from continual_concepts.core.training.memory import retained_between_steps

def clearing(rounds):
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(rounds):
        torch.ones(40 * 2**18)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

cpu, before = torch.device("cpu"), clearing(5)
with retained_between_steps(cpu):
    with retained_between_steps(cpu):
        clearing(20)      # older C libraries find their place for aligned pieces only after some rounds
    inside = clearing(5)
print(before, inside, clearing(5))
"""


@needs_glibc
def test_what_is_freed_is_used_again(installed):
    """Until the last who asked for it has gone. In a process of its own: where other tests left a hole of 40
    MiB between their tensors, the system gives no new pages at all."""
    done = subprocess.run([sys.executable, "-I", "-c", MEASURED], capture_output=True, text=True, timeout=100,
                          check=False)
    assert done.returncode == 0, done.stderr[-500:]
    before, inside, after = map(int, done.stdout.split())
    assert inside < 0.5 * before and inside < 0.5 * after


def test_other_libraries_and_devices_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_enter", lambda library: pytest.fail("told a library that is none of ours"))
    with memory.retained_between_steps(torch.device("cuda")):
        pass
    monkeypatch.setattr(sys, "platform", "win32")
    assert memory._glibc() is None
    with memory.retained_between_steps(torch.device("cpu")):
        pass


@needs_glibc
def test_an_error_ends_it():
    with pytest.raises(ValueError), memory.retained_between_steps(torch.device("cpu")):
        raise ValueError
    assert memory._users == 0


@needs_glibc
def test_threads_count_together():
    cpu, inside, leave = torch.device("cpu"), threading.Event(), threading.Event()

    def other() -> None:
        with memory.retained_between_steps(cpu):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with memory.retained_between_steps(cpu):
        assert memory._users == 2
    assert memory._users == 1
    leave.set()
    thread.join()
    assert memory._users == 0
