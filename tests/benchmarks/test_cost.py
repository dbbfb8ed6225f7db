"""The benchmarks `training`, `aggregation` and `bank`: their figures on a tiny base."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.cost import command
from continual_concepts.benchmarks.cost import memory as memory_cost
from continual_concepts.benchmarks.cost import scale as scale_cost
from continual_concepts.benchmarks.cost import training as training_cost
from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.conditioning.routing import aggregate


class ToyHost:
    """A tiny base; its rival takes ten seconds a step and two GiB."""

    def __init__(self, backbone) -> None:
        self.backbone, self.setup = backbone, training_cost.Setup(pixels=64)

    @property
    def weights(self):
        return self.backbone.loaded_weights(True)[0]

    def training(self):
        return nullcontext()

    def release(self):
        self.backbone = None

    def rivals(self):
        return {"core": lambda steps: {"seconds": [10.0, 12.0], "peak_gb": 2.0}}


@pytest.fixture(autouse=True)
def narrow(slim_backbone, monkeypatch):
    monkeypatch.setattr("continual_concepts.benchmarks.cost.synthetic.WIDTH",
                        slim_backbone.layout.sites[0].context_width)


@pytest.fixture
def host(slim_backbone):
    return ToyHost(slim_backbone)


def test_training_figures(host, monkeypatch):
    monkeypatch.setattr(training_cost, "CONCEPTS", (1, 3))
    lines, names = [], ("slots", "cidm", "cidm, one copy")
    found = training_cost.measure(host, 2, 1, lines.append, names)
    json.dumps(found)
    row = found["rows"]["cidm"]
    assert set(found["rows"]) == set(names) and set(row["concepts"]) == {"1", "3"}
    assert row["faster_than_core"] == pytest.approx(10.0 / row["step_seconds"])
    assert all(row["step_over_unet"] > row["step_over_forwards"] > 1 for row in found["rows"].values())
    grown = {"concepts", "hundred_over_one", "peak_hundred_over_one"}
    assert found["rows"]["cidm, one copy"].keys() == row.keys() - grown
    assert found["core"] == {"step_seconds": 10.0, "peak_gb": 2.0}
    assert found["step_seconds"] == found["rows"]["slots"]["step_seconds"]
    assert "hundred_over_one" in row and "hundred_over_one" not in found["rows"]["cidm, one copy"]
    assert len(lines) == len(names) + 1


@pytest.mark.slow
def test_planned_and_measured_memory(tiny_backbone):
    host, lines = ToyHost(tiny_backbone), []
    found = memory_cost.measure(host, 1, lines.append)
    rows = found["rows"]
    assert list(rows) == list(memory_cost.MEASURES) and len(lines) == 3
    assert found["batch"] == 2 and found["weights"] == host.backbone.parameter_count
    planned = [row["planned_gb"] for row in rows.values()]
    assert planned[0] > planned[1] > planned[2] > host.weights / 2**30
    assert all(row["measured_gb"] is None or row["measured_gb"] > host.weights / 2**30
               for row in rows.values())
    assert len(memory_cost.table({"toy": found})) in (2, 5)


def test_the_document_has_the_measured_table():
    root = Path(__file__).resolve().parents[2]
    result = json.loads((root / "benchmarks" / "results" / "memory.json").read_text())
    assert "\n".join(memory_cost.table(result)) in (root / "docs" / "cost.md").read_text()
    assert len(result) == 3
    shares, missing = [], []
    for shape in result.values():
        for row in shape["rows"].values():
            assert row["planned_over_measured"] == pytest.approx(1, abs=0.15)
            taken = row["activations_gb"] + row["measured_gb"] - row["planned_gb"]
            shares.append(round(100 * row["activations_gb"] / taken))
            missing.append(round(taken - row["activations_gb"], 2))
    text = " ".join((root / "docs" / "cost.md").read_text().split())
    assert f"the plan has {min(shares)} to {max(shares)} %: up to {max(missing):.2f} GB are missing" in text


def test_ratios_are_of_neighbours(host, monkeypatch):
    """A machine that slows down from round to round changes no ratio; the first round is left out."""
    now = iter(range(10**6))
    monkeypatch.setattr(training_cost, "_clock", lambda run: (run(), float(2 ** (next(now) // 3)))[1])
    one, two = (training_cost.random_bank(host.backbone.layout, "bound", count) for count in (1, 2))
    found = training_cost.step_times(host, "bound", one, 3)
    assert [times.text for times in found] == [2.0, 4.0, 8.0]
    assert training_cost._row(found, 1.0)["step_over_forwards"] == 0.5
    monkeypatch.setattr(training_cost, "_clock", lambda run: (run(), float(3 ** (next(now) // 2)))[1])
    now = iter(range(10**6))
    row = training_cost._grown(training_cost.growth(host, "bound", [one, two], 3), [1.0, 1.5])
    assert row["hundred_over_one"] == 1 and row["peak_hundred_over_one"] == 1.5
    assert row["concepts"]["100"]["step_seconds"] == 3


def test_optimiser_steps_of_other_trainers_are_counted():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def train() -> None:
        for _ in range(3):
            weight.grad = torch.ones(1)
            optimizer.step()

    assert len(training_cost.optimizer_steps(train)["seconds"]) == 2
    train()      # no longer counted


def test_aggregation_figures(slim_backbone):
    found = scale_cost.aggregation(slim_backbone, 4, 1)
    assert set(found["apply_seconds"]) == {"sharp", "paper", "released", "equal"}
    assert found["sampling_over_plain"] > 0
    json.dumps(found)


def test_the_stacked_sum_is_the_naive_one(slim_backbone):
    bank = training_cost.random_bank(slim_backbone.layout, "cidm", 5)
    deltas = aggregate(slim_backbone, bank, bank.parse("a dog"), "equal").deltas
    for key, delta in deltas.items():
        naive = sum(concept.deltas[key].dense() for concept in bank) / 5
        assert torch.allclose(delta.dense(), naive, atol=1e-4)


def test_bank_figures(slim_backbone, tmp_path):
    found = scale_cost.bank(slim_backbone, 20, tmp_path, 1)
    opened = open_bank(tmp_path / "bank-20.safetensors")
    assert opened.names == [f"old{i}" for i in range(20)]
    assert opened["old19"].deltas.keys() == opened["old3"].deltas.keys()
    assert found["concept_mb"] == pytest.approx((tmp_path / "bank-20.safetensors").stat().st_size / 20e6)
    assert 0 < found["open_seconds"] < 5 and found["concepts"] == 20


@pytest.mark.parametrize(("name", "flag", "value"),
                         [("training", "steps", 1), ("aggregation", "concepts", 1), ("bank", "rounds", 0)])
def test_bad_flags_are_named(name, flag, value, tmp_path, capsys):
    assert main([name, "--json", str(tmp_path / "x.json"), f"--{flag}", str(value)]) == 1
    assert f"{flag} is {value}; allowed" in capsys.readouterr().err


def test_the_commands_write_and_print(host, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_host", lambda options: host)
    monkeypatch.setattr(training_cost, "CONCEPTS", (1, 2))
    monkeypatch.setattr(training_cost, "ROWS", {"bound": training_cost.ROWS["bound"]})
    monkeypatch.setattr(training_cost, "profile", lambda host, row: f"{row}, one step")
    monkeypatch.setattr(scale_cost, "_sampling_ratio", lambda *_: 1.0)
    common = {"comfyui": None, "pixels": 64, "precision": "float32", "rounds": 1}
    cases = (("aggregation", {"concepts": 3}, "from prompt to weights"), ("bank", {"concepts": 3}, "MB"),
              ("training", {"steps": 2, "profile": tmp_path / "profile.txt", "rows": None, "alone": False},
               "times as fast as core"))
    for name, flags, word in cases:
        file = tmp_path / f"{name}.json"
        result, lines = getattr(command, name)(Namespace(file=file, **common, **flags))
        assert json.loads(file.read_text()) == json.loads(json.dumps(result))
        assert any(word in line for line in lines)
    assert (tmp_path / "profile.txt").read_text() == "bound, one step\ncidm, one step"


def test_a_profile_is_a_table_of_one_step(host):
    first, *table = training_cost.profile(host, "bound").splitlines()
    assert first == "bound, one step" and any("aten::" in line for line in table)
