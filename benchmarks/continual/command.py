"""The commands `continual` and `neurons`."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from ...core.cli.parser import add_base
from ...core.errors import ConceptError
from ..report import Result, require_at_least, say, write_result
from .runs import Run

DRAWN = "where the result goes; a chart is drawn beside it"


def add_commands(commands) -> None:
    """Adds the two commands to a parser's subcommands."""
    _add_continual(commands)
    parser = commands.add_parser("neurons", help="how many base neurons do prompts share?")
    parser.add_argument("--json", dest="file", type=Path, required=True, help=DRAWN)
    parser.add_argument("--draws", type=int, default=16, help="gradients per prompt (default %(default)s)")
    parser.set_defaults(run=neurons)


def _add_continual(commands) -> None:
    parser = commands.add_parser("continual", help="every method on one sequence of tasks")
    add = parser.add_argument
    add("--json", dest="file", type=Path, required=True, help=DRAWN)
    add("--runs", "--cells", dest="runs", type=Path,
        help="folder of finished runs, which are not repeated (default: "
             "the result's name with the suffix .cells)")
    add("--methods", default="",
        help="comma separated (default: all); name+key=value overrides a setting and is a row of its own")
    add("--tasks", type=int, default=10, help="number of concepts (default %(default)s)")
    add("--seeds", type=int, default=3, help="number of seeds (default %(default)s)")
    add("--orders", type=int, default=3, help="number of orders; seed s learns in order s modulo this number")
    add("--steps", type=int, help="per task (default 200, with --data 800)")
    add("--upper", action="store_true", help="also learn one model per concept, as the upper bound")
    add("--merge", action="store_true", help="run nothing, only summarise the finished runs")
    add_base(parser)
    add("--data", type=Path,
        help="folder with tasks.json and photos, such as CIFC's (default: drawn pictures)")
    add("--clip", type=Path,
        help="with --data: folder of CLIP ViT-B/32 in transformers' layout, for measuring")
    add("--dino", type=Path,
        help="with --data: folder of DINO ViT-S/16, which compares objects instead of CLIP")
    add("--resolution", type=int, help="with --data: side of the pictures in pixels (default 512)")
    add("--pictures", type=int,
        help="with --data: per concept and evaluation (default 100; the papers: 1000)")
    parser.set_defaults(run=continual)


def neurons(options: Namespace) -> Result:
    """Measures how many base neurons prompts share; writes JSON and a chart next to it."""
    from ...core.demo.base import load_base
    from .neuron_sharing import draw, neuron_sharing

    result = neuron_sharing(load_base(), draws=options.draws)
    write_result(options.file, result)
    draw(options.file.with_suffix(".png"), result)
    shares, half, same = result["shares"], result["general"], result["same_prompt"]
    last = result["prompts"][-1]
    lines = [f"{name}: {100 * shares[name][-1]:.0f} % shared by all {last} prompts, "
             f"{100 * half[name][-1]:.0f} % by half of them, "
             f"{100 * same[name]:.0f} % by another picture of the same prompt" for name in shares]
    return result, [*lines, f"CNS reports about {100 * result['paper']:.0f} %"]


def _finished(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConceptError(f"'{path}' is not a readable run ({error}); delete it to repeat it") from error
    if not isinstance(content, dict) or "method" not in content:
        raise ConceptError(f"'{path}' is JSON but not a finished run; move it out of the folder")
    return content


def _runs(options: Namespace) -> list[Run]:
    """Runs of every method with every seed; seed s uses order s modulo `orders`.

    The last run is the upper bound of the default method.
    """
    from ...core.methods import DEFAULT, METHODS

    rows = [name.strip().partition("+")[::2] for name in options.methods.split(",") if name.strip()]
    rows = rows or [(name, "") for name in sorted(METHODS)]
    unknown = [name for name, _ in rows if name not in METHODS]
    if unknown:
        raise ConceptError(f"unknown method {unknown[0]!r}; known: {', '.join(sorted(METHODS))}")
    runs = [Run(name, options.tasks, seed % options.orders, seed, overrides=overrides)
            for seed in range(options.seeds) for name, overrides in rows]
    return runs + ([Run(DEFAULT, options.tasks, 0, 0, alone=True)] if options.upper else [])


def _reporting(run: Run) -> Callable[[str], Callable]:
    """Step callbacks that report each learned concept on stderr."""
    def start(name: str) -> Callable:
        def callback(info) -> None:
            if info.step == info.total:
                say(f"{run.name}: learned <{name}>, loss {info.loss:.3f}")
        return callback
    return start


def continual(options: Namespace) -> Result | None:
    """Performs the missing runs, and summarises all finished runs with this number of tasks.

    Under torchrun, each process performs its share of the runs. The first one waits for the others and
    summarises.
    """
    from ...core.training.process_group import process_group
    from .concepts import ordered
    from .embedded import STEPS, embedded_benchmark
    from .photo_benchmark import STEPS as PHOTO_STEPS
    from .photo_benchmark import check_flags, photo_benchmark
    from .sequence_run import perform

    check_flags(options)
    if options.steps is None:
        options.steps = STEPS if options.data is None else PHOTO_STEPS
    require_at_least(options, tasks=1, seeds=1, orders=1, steps=1)
    runs = [] if options.merge else _runs(options)
    folder = options.runs or options.file.with_suffix(".cells")
    benchmark = (embedded_benchmark(options.tasks, options.steps) if options.data is None
                 else photo_benchmark(options, folder))
    with process_group() as group:
        for run in runs[group.rank::group.size]:
            settings = {**benchmark.settings_of(run.method), **run.settings()}
            places = ordered(options.tasks, run.order)
            perform(benchmark.backbone, benchmark.suite, run, places, settings, benchmark.training(run.seed),
                    folder, _reporting(run))
        group.wait()
        if not group.is_first:
            return None
    return _summarised(options, folder, benchmark.untrained)


def _summarised(options: Namespace, folder: Path, untrained: dict) -> Result:
    from ...core.methods import DEFAULT
    from .chart import draw
    from .summary import summarise, table

    finished = [_finished(path) for path in sorted(folder.glob(f"*-n{options.tasks}-o*-s*.json"))
                if not path.name.endswith(".progress.json")]
    if not finished:
        raise ConceptError(f"the folder '{folder}' holds no finished run of {options.tasks} tasks")
    result = summarise(finished, DEFAULT, untrained)
    write_result(options.file, result)
    draw(options.file.with_suffix(".png"), finished, result)
    claims = [f"{o['claim']}: {'holds' if o['holds'] else 'does not hold'}{', clearly' if o['clear'] else ''}"
              for o in result["orderings"]]
    return result, [table(result), *claims]
