"""Many individuals of one class in one bank: is each one drawn, alone and beside every other one?"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch

from ...core.bank.format import open_bank
from ...core.demo import scenes
from ...core.demo.bases import EMBEDDED
from ...core.demo.scenes import SceneConcept
from ...core.errors import ConceptError
from ...core.sampling.sampling import sample
from ..report import write_result
from ..sheet import save_sheet
from .concepts import concepts, individual
from .embedded import embedded_benchmark
from .pictures import Sampler
from .prompt_suite import Benchmark
from .runs import Run
from .sequence_run import finished_run, perform
from .sharing import share

SEED, DRAWN_SEED = 31, 4100      # of the training and of the individuals; the benchmark uses neither
PICTURES, PAIR_PICTURES = 8, 6
SHEET_SEED = 300


def individuals(kind: str, count: int) -> list[SceneConcept]:
    """Random individuals of a class, each unlike the ones before. None of them is in `concepts(50)`."""
    if kind not in scenes.KINDS:
        raise ConceptError(f"the class is {kind!r}; allowed: {', '.join(scenes.KINDS)}")
    if count < 2:
        raise ConceptError(f"the number of individuals is {count}; allowed: 2 or more")
    known, rng = concepts(50), random.Random(DRAWN_SEED)
    sequence = list(known)
    for number in range(1, count + 1):
        sequence.append(individual(rng, f"{kind.split()[-1]}{number}", kind, sequence))
    return sequence[len(known):]


def one_class_benchmark(kind: str, count: int, base_name: str = EMBEDDED) -> Benchmark:
    """The benchmark of these individuals, with every pair of them."""
    benchmark = embedded_benchmark(individuals(kind, count), base_name=base_name)
    suite = benchmark.suite
    pairs = tuple(combinations([task.name for task in suite.tasks], 2))
    origin = {**suite.origin, "pictures": PICTURES, "group_pictures": 0}
    return replace(benchmark, suite=replace(suite, groups=(), pairs=pairs, seeds=suite.seeds[:PICTURES],
                                            pair_seeds=suite.pair_seeds[:PAIR_PICTURES], origin=origin))


def confusions(names: Sequence[str], pairs: Sequence[Mapping]) -> list[list[float | None]]:
    """Share of confused pictures of each pair, `[n][n]`, symmetric; None on the diagonal."""
    table: list[list[float | None]] = [[None] * len(names) for _ in names]
    for pair in pairs:
        i, j = (names.index(name) for name in pair["concepts"])
        table[i][j] = table[j][i] = pair["confused"]
    return table


def figures(run: Mapping) -> dict:
    """A run's figures by each judge: means over individuals and pairs, and the matrices.

    `alone` and `beside` are the judge's scores, not shares of the way from floor to ceiling.
    """
    by_judge = {}
    for judge, values in run["judges"].items():
        pairs = values["pairs"]
        beside = [score for pair in pairs for score in pair["alignment"]]
        by_judge[judge] = {
            "alone": sum(values["alone"]) / len(values["alone"]),
            "beside": sum(beside) / len(beside),
            "confused": sum(pair["confused"] for pair in pairs) / len(pairs),
            "confusions": confusions(run["concepts"], pairs),
            "bleed": values["bleed"],
        }
    return by_judge


def one_class(methods: Sequence[str], kind: str, count: int, file: Path, folder: Path, base_name: str,
              tell: Callable[[str], object] = lambda _: None) -> dict:
    """Performs the missing runs, one per method, and writes the result.

    Args:
        methods: What is compared.
        kind: The class.
        count: How many individuals.
        file: The result; pictures of each method go beside it.
        folder: Folder of the runs.
        base_name: Name of the embedded base.
        tell: Reports a finished run.
    """
    benchmark = one_class_benchmark(kind, count, base_name)
    sampler, runs = Sampler(benchmark.backbone), [Run(name, count, 0, SEED) for name in methods]

    def perform_run(run: Run) -> None:
        perform(sampler, benchmark.suite, run, range(count), *benchmark.configured(run), folder)
        tell(f"{run.name}: finished")

    share(folder, lambda: runs, perform_run)
    rows, names = {}, [task.name for task in benchmark.suite.tasks]
    for run in runs:
        finished = finished_run(folder / f"{run.name}.json")
        if finished is None:      # another process has removed it
            raise ConceptError(f"the run '{run.name}' is missing in '{folder}'; start the command again")
        rows[run.method] = {"steps": finished["steps"], "settings": finished["settings"],
                            "bytes_per_concept": finished["bytes_per_concept"],
                            "seconds_per_concept": finished["seconds_per_concept"], **figures(finished)}
        bank = folder / f"{run.name}.{count}.safetensors"
        draw_sheet(benchmark, names, bank, file.with_name(f"{file.stem}-{run.method}.png"))
    result = {"class": kind, "individuals": names, "seed": SEED, "pictures": PICTURES,
              "pair_pictures": PAIR_PICTURES, "base": benchmark.backbone.fingerprint, "methods": rows}
    write_result(file, result)
    return result


def draw_sheet(benchmark: Benchmark, names: Sequence[str], bank: Path, file: Path) -> None:
    """Three rows: a training picture of each individual, each one drawn alone, and each with the next one."""
    suite, opened = benchmark.suite, open_bank(bank)
    neighbours = zip(names, [*names[1:], names[0]], strict=True)
    prompts = [f"a photo of <{name}>" for name in names]
    prompts += [f"a photo of <{one}> and <{other}>" for one, other in neighbours]
    drawn = sample(benchmark.backbone, opened, prompts, [SHEET_SEED] * len(prompts), suite.settings)
    real = torch.stack([suite.named(name).references[0] for name in names])
    save_sheet(torch.cat([real, drawn.cpu()]), file, len(names))


def table(result: Mapping) -> str:
    """The result as text: one line per method and judge, in percent."""
    lines = [f"{'method':16} {'judge':9} {'alone':>6} {'beside':>7} {'confused':>9}"]
    for name, row in result["methods"].items():
        for judge, values in row.items():
            if isinstance(values, Mapping) and "confusions" in values:
                alone, beside, confused = (100 * values[key] for key in ("alone", "beside", "confused"))
                lines.append(f"{name:16} {judge:9} {alone:6.1f} {beside:7.1f} {confused:9.1f}")
    return "\n".join(lines)
