"""The command `likeness`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from ...core.errors import ConceptError
from ...core.methods import DEFAULT
from ..continual import embedded
from ..continual.concepts import tuning_concepts
from ..continual.runs import BASE
from ..report import Result, require_at_least, say, write_result
from . import curves
from .curves import SHARE, Point
from .trainers import Subject, ours, peft, subject_of

CONTROL, PEFT, COMFYUI = "lora", "peft", "ComfyUI"
MARKS = (5, 10, 15, 20, 30, 40, 60, 80, 100, 120, 160, 200)
# other trainers may take four times the steps
OTHER_MARKS = (10, 25, 50, 75, 100, 150, 200, 300, 400, 600, 800)
COMFYUI_MARKS = (25, 50, 100, 200, 400)      # learned anew for each
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)      # of other trainers; the quickest one counts
PICTURES = 12


def add_commands(commands) -> None:
    parser = commands.add_parser("likeness",
                                 help="how soon a concept is like its photos, beside other trainers")
    parser.set_defaults(run=likeness)
    parser.add_argument("--json", dest="file", type=Path, required=True, help="where the result goes")
    parser.add_argument("--base", default=BASE, help="name of the embedded base (default %(default)s)")
    parser.add_argument("--concepts", type=int, default=2, help="of the tuning suite (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 1 on (default %(default)s)")
    parser.add_argument("--comfyui", type=Path, help="folder of a ComfyUI, for its Train LoRA node")


def _learners(options: Namespace, backbone, subject: Subject
              ) -> Iterator[tuple[str, Callable[[int], list[Point]]]]:
    """Name of a trainer with its rate, and what returns its curve for a seed."""
    for method in (DEFAULT, CONTROL):
        settings = embedded.settings_of_kind(method, backbone.fingerprint, subject.task.kind)
        yield f"{method}", lambda seed, method=method, settings=settings: ours(
            backbone, subject, method, settings, MARKS[-1], seed, MARKS)
    if find_spec("peft"):
        for rate in RATES:
            yield f"{PEFT} {rate:g}", lambda seed, rate=rate: peft(
                subject, options.base, rate, OTHER_MARKS[-1], seed, OTHER_MARKS)
    if options.comfyui is not None:
        from .comfy_trainer import ComfyTrainer

        trainer = ComfyTrainer(options.base, subject)
        for rate in RATES:
            yield f"{COMFYUI} {rate:g}", lambda seed, rate=rate: trainer.curve(rate, seed, COMFYUI_MARKS)


def likeness(options: Namespace) -> Result:
    """Measures likeness while concepts are learned, and the seconds until 95 % of the default's final one."""
    require_at_least(options, concepts=1, seeds=1)
    objects = [concept for concept in tuning_concepts() if concept.kind == "object"]
    if options.concepts > len(objects):
        raise ConceptError(f"concepts is {options.concepts}; allowed: 1 to {len(objects)}")
    if options.comfyui is not None:
        from ..cost import standalone

        standalone.start(options.comfyui)
    benchmark = embedded.embedded_benchmark(objects[:options.concepts], base_name=options.base)
    suite = replace(benchmark.suite, seeds=benchmark.suite.seeds[:PICTURES])
    runs: list[dict] = []
    facts = {"base": benchmark.backbone.fingerprint, "pictures": PICTURES, "share": SHARE}
    for task in suite.tasks:
        subject = subject_of(benchmark.backbone, suite, task)
        for name, learn in _learners(options, benchmark.backbone, subject):
            for seed in range(1, options.seeds + 1):
                points = learn(seed)
                runs.append({"trainer": name, "concept": task.name, "seed": seed, "points": points})
                say(f"{task.name}, {name}, seed {seed}: {curves.final(points):.3f} after "
                    f"{points[-1].seconds:.1f} s")
                result = {**facts, "trainers": summary(runs), "runs": [_as_json(run) for run in runs]}
                write_result(options.file, result)      # a benchmark that is stopped has measured something
    return result, [_line(name, row) for name, row in result["trainers"].items()]


def _as_json(run: dict) -> dict:
    return {**run, "points": [asdict(point) for point in run["points"]]}


def summary(runs: list[dict]) -> dict[str, dict]:
    """Medians over concepts and seeds. Of a trainer with several rates, the rate counts that is quickest to
    the level of the default, else the one with the highest likeness."""
    levels = {(run["concept"], run["seed"]): SHARE * curves.final(run["points"])
              for run in runs if run["trainer"] == DEFAULT}
    rows = {}
    for name in dict.fromkeys(run["trainer"] for run in runs):
        own = [run for run in runs if run["trainer"] == name]
        times = [curves.seconds_until(run["points"], levels[run["concept"], run["seed"]]) for run in own]
        alone = [curves.seconds_until(run["points"], SHARE * curves.final(run["points"])) for run in own]
        rows[name] = {"reached": sum(time is not None for time in times), "runs": len(own),
                      "seconds_to_level": _median(times), "seconds_to_own": _median(alone),
                      "final": median(curves.final(run["points"]) for run in own),
                      "seconds": median(run["points"][-1].seconds for run in own)}
    best: dict[str, str] = {}
    for name, row in rows.items():
        trainer = name.partition(" ")[0]
        kept = rows.get(best.get(trainer, ""))
        if kept is None or _rank(row) < _rank(kept):
            best[trainer] = name
    return {trainer: {"rate": rows_name.partition(" ")[2], **rows[rows_name]}
            for trainer, rows_name in best.items()}


def _rank(row: dict) -> tuple[float, float]:
    seconds = row["seconds_to_level"]
    return (float("inf") if seconds is None else seconds, -row["final"])


def _median(times: list[float | None]) -> float | None:
    """None if most runs do not reach the level; a run that does not counts as the slowest."""
    found = median(float("inf") if time is None else time for time in times)
    return found if found < float("inf") else None


def _line(name: str, row: dict) -> str:
    rate = f" at rate {row['rate']}" if row["rate"] else ""
    level = "not reached" if row["seconds_to_level"] is None else f"{row['seconds_to_level']:.1f} s"
    own = "not reached" if row["seconds_to_own"] is None else f"{row['seconds_to_own']:.1f} s"
    return (f"{name}{rate}: {level} until 95 % of the default's final likeness, {own} until 95 % of its own; "
            f"final likeness {row['final']:.3f} after {row['seconds']:.1f} s")
