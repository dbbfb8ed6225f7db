"""A server that has run for long: the same graph gives the same pictures bit for bit, and memory does not grow.

500 queue runs of all workflows in one process with `make verify`, a few otherwise; about four seconds each.
"""

from __future__ import annotations

import hashlib
import statistics
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
    with start_server("--cache-none") as running:
        yield running


def resident(server) -> int:
    """Bytes of memory that the server's process holds."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.is_file():
        pytest.skip("memory is read from /proc, which this system has not")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


def run_once(server, workflows, graph: dict) -> str:
    """Runs a graph from the start, learning included; returns a digest of its pictures, which are deleted then."""
    for file in (server.base / "output" / "concept_banks" / ".unfinished").glob("*.checkpoint"):
        file.unlink()
    entry, digest = server.run(graph), hashlib.sha256()
    for saver in workflows.nodes_of(graph, "SaveImage"):
        for file in server.pictures(entry, saver):
            digest.update(workflows.pixels(file).tobytes())
            file.unlink()
    server.call("/history", {"clear": True})      # the host's record of every run grows with them
    return digest.hexdigest()[:16]


def growth_of(memory: list[int], per_round: int) -> float:
    """By how much the median of the last window is above that of the first. Windows are whole rounds of all graphs; a tenth of the runs
    before them, and the first round in any case, is warming up."""
    rounds = len(memory) // per_round
    warm = max(1, rounds // 10)
    size = max(1, (rounds - warm) // WINDOWS) * per_round
    measured = memory[warm * per_round:]
    return statistics.median(measured[-size:]) / statistics.median(measured[:size]) - 1


def test_growth_is_seen():
    steady = [100, 120, 110] * 20
    assert growth_of(steady, 3) == 0.0 and growth_of([value + 100 * (i < 3) for i, value in enumerate(steady)], 3) == 0.0
    assert growth_of([value * (1 + 0.001 * i) for i, value in enumerate(steady)], 3) > MOST_GROWTH


def test_a_server_that_has_run_for_long(long_server, workflows, trials, capsys):
    paths = workflows.API_GRAPHS
    graphs = {path.stem: workflows.shortened(workflows.read(path), learning=2, sampling=2) for path in paths}
    rounds = -(-trials(2 * len(paths), 500) // len(paths))
    seen: dict[str, list[str]] = {name: [] for name in graphs}
    memory: list[int] = []
    for done in range(rounds):
        for name, graph in graphs.items():
            seen[name].append(run_once(long_server, workflows, graph))
            memory.append(resident(long_server))
        if done:
            middle, growth = statistics.median(memory[-len(graphs):]) / 2**20, growth_of(memory, len(graphs))
            with capsys.disabled():
                print(f"\n{len(memory)} runs, {middle:.1f} MiB, growth {100 * growth:+.2f} %", end="", flush=True)
    drift = {name: len(set(digests)) - 1 for name, digests in seen.items() if len(set(digests)) > 1}
    growth = growth_of(memory, len(graphs))
    with capsys.disabled():
        print(f"\ntrials {len(memory)}, growth {100 * growth:+.2f} %, drift {drift or 'none'}", flush=True)
    assert not drift
    assert rounds < 5 or growth <= MOST_GROWTH      # few rounds are all warming up
