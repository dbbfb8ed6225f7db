"""A server that has run for long: the same graph gives the same pictures bit for bit, and the memory in use
does not grow.

500 queue runs of all workflows in one process with `make verify`, a few otherwise; about four seconds each.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
MOST_GROWTH = 0.02
WINDOWS = 5


@pytest.fixture(scope="module")
def workflows(script):
    """The module of tests about workflows: its graphs, and how they are shortened."""
    return script(Path(__file__).with_name("test_workflows.py"))


@pytest.fixture(scope="module")
def long_server(start_server) -> Iterator:
    """A server of its own, which keeps no node's output from run to run."""
    with start_server("--cache-none", packs=(Path(__file__).with_name("memory_probe"),)) as running:
        yield running


def resident(server) -> int:
    """Bytes of memory that the server's process holds."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.is_file():
        pytest.skip("memory is read from /proc, which this system has not")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


def held(server) -> int:
    """`resident`, once the host has collected garbage. By itself it does so every ten seconds: how many
    models of earlier runs still lie about would depend on how fast this machine is."""
    server.call("/free", {"unload_models": True, "free_memory": True})
    before, now = 0, resident(server)
    for _ in range(30):
        time.sleep(1.0)
        before, now = now, resident(server)
        if before == now:
            break
    return now


def used(server) -> int:
    """Bytes of memory that the server's process has in use."""
    found = server.run({"1": {"class_type": "MemoryProbe", "inputs": {}}})["outputs"]["1"]["used"][0]
    server.call("/history", {"clear": True})
    if not found:
        pytest.skip("memory in use is asked of glibc 2.33 or newer, which this system has not")
    return found


def run_once(server, workflows, graph: dict) -> str:
    """Runs a graph from the start, learning included; returns a digest of its pictures, which are deleted
    then."""
    for file in (server.base / "output" / "concept_banks" / ".unfinished").glob("*.checkpoint"):
        file.unlink()
    entry, digest = server.run(graph), hashlib.sha256()
    for saver in workflows.nodes_of(graph, "SaveImage"):
        for file in server.pictures(entry, saver):
            digest.update(workflows.pixels(file).tobytes())
            file.unlink()
    server.call("/history", {"clear": True})      # the host's record of every run grows with them
    return digest.hexdigest()[:16]


def growth_of(memory: list[int]) -> float:
    """By how much the median of the last window is above that of the first, of a figure per round of all
    graphs. The first tenth, one round in any case, is warming up."""
    measured = memory[max(1, len(memory) // 10):]
    size = max(1, len(measured) // WINDOWS)
    return statistics.median(measured[-size:]) / statistics.median(measured[:size]) - 1


def test_growth_is_seen():
    steady = [100, 102, 101] * 10
    assert abs(growth_of(steady)) <= 0.01
    assert growth_of([value - 50 * (i < 3) for i, value in enumerate(steady)]) == growth_of(steady)
    assert growth_of([value * (1 + 0.002 * i) for i, value in enumerate(steady)]) > MOST_GROWTH


def test_a_server_that_has_run_for_long(long_server, workflows, trials, capsys):
    paths = workflows.API_GRAPHS
    graphs = {path.stem: workflows.shortened(workflows.read(path), learning=2, sampling=2) for path in paths}
    rounds = -(-trials(2 * len(paths), 500) // len(paths))
    seen: dict[str, list[str]] = {name: [] for name in graphs}
    memory: dict[str, list[int]] = {"in use": [], "held": []}
    for done in range(rounds):
        for name, graph in graphs.items():
            seen[name].append(run_once(long_server, workflows, graph))
        drift = {name: len(set(digests)) - 1 for name, digests in seen.items() if len(set(digests)) > 1}
        assert not drift, f"after {done + 1} rounds: {drift}"
        memory["held"].append(held(long_server))
        memory["in use"].append(used(long_server))
        if done:
            told = ", ".join(f"{what} {found[-1] / 2**20:.1f} MiB, {100 * growth_of(found):+.2f} %"
                             for what, found in memory.items())
            with capsys.disabled():
                print(f"\n{(done + 1) * len(graphs)} runs, drift none, memory {told}", end="", flush=True)
    with capsys.disabled():
        print(flush=True)
    assert rounds < 5 or growth_of(memory["in use"]) <= MOST_GROWTH      # few rounds are all warming up
