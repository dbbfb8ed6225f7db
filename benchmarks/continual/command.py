"""The commands `continual` and `neurons`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from ...core.cli.parser import add_base
from ...core.errors import ConceptError
from ..report import Result, require_at_least, write_result


def add_commands(commands) -> None:
    """Adds the two commands to a parser's commands."""
    _add_continual(commands)
    parser = commands.add_parser("neurons", help="how many base neurons do prompts share?")
    parser.add_argument("--json", dest="file", type=Path, required=True, help="where the result goes; a picture is drawn beside it")
    parser.add_argument("--draws", type=int, default=16, help="gradients per prompt (default %(default)s)")
    parser.set_defaults(run=neurons)


def _add_continual(commands) -> None:
    parser = commands.add_parser("continual", help="every method on one sequence of tasks")
    parser.add_argument("--json", dest="file", type=Path, required=True, help="where the result goes; a picture is drawn beside it")
    parser.add_argument("--cells", type=Path, help="folder of the parts that are done (default: beside the result); a cut run goes on")
    parser.add_argument("--methods", default="", help="comma separated (default: all); name+rank=8: with a setting, a row of its own")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", type=int, default=3, help="seed s learns in order s modulo this")
    parser.add_argument("--steps", type=int, help="per task (default 200, with --data 800)")
    parser.add_argument("--upper", action="store_true", help="also one model per concept")
    parser.add_argument("--merge", action="store_true", help="run nothing, only put together what is done")
    add_base(parser)
    parser.add_argument("--data", type=Path, help="folder with tasks.json and photos, such as CIFC's (default: the embedded world)")
    parser.add_argument("--clip", type=Path, help="with --data: folder of CLIP ViT-B/32 in transformers' layout, to measure with")
    parser.add_argument("--dino", type=Path, help="with --data: folder of DINO ViT-S/16, to compare objects with instead of CLIP")
    parser.add_argument("--resolution", type=int, help="with --data: side of the pictures in pixels (default 512)")
    parser.add_argument("--pictures", type=int, help="with --data: per concept and look (default 100; the papers: 1000)")
    parser.set_defaults(run=continual)


def neurons(options: Namespace) -> Result:
    """How many base neurons prompts share, and a picture of it beside the JSON."""
    from ...core.demo.base import load_base
    from .neuron_sharing import draw, neuron_sharing

    result = neuron_sharing(load_base(), draws=options.draws)
    write_result(options.file, result)
    draw(options.file.with_suffix(".png"), result)
    shares, half, same, last = result["shares"], result["general"], result["same_prompt"], result["prompts"][-1]
    lines = [f"{name}: {100 * shares[name][-1]:.0f} % shared by all {last} prompts, {100 * half[name][-1]:.0f} % by half of them, "
             f"{100 * same[name]:.0f} % by another picture of the same prompt" for name in shares]
    return result, [*lines, f"CNS tells of about {100 * result['paper']:.0f} %"]


def _finished(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConceptError(f"'{path}' is not a readable cell ({error}); delete it and it is run again") from error
    if not isinstance(found, dict) or "method" not in found:
        raise ConceptError(f"'{path}' is JSON but not a finished cell; move it out of the folder")
    return found


def _cells(options: Namespace) -> list:
    """Every method with every seed, seed s in order s modulo `orders`; the default's upper bound last."""
    from ...core.methods import DEFAULT, METHODS
    from .runs import Cell

    rows = [tuple(name.strip().partition("+")[::2]) for name in options.methods.split(",") if name.strip()]
    rows = rows or [(name, "") for name in sorted(METHODS)]
    unknown = [name for name, _ in rows if name not in METHODS]
    if unknown:
        raise ConceptError(f"unknown method {unknown[0]!r}; known: {', '.join(sorted(METHODS))}")
    cells = [Cell(name, options.tasks, seed % options.orders, seed, variant=variant) for seed in range(options.seeds)
             for name, variant in rows]
    return cells + ([Cell(DEFAULT, options.tasks, 0, 0, alone=True)] if options.upper else [])


def _telling(cell) -> Callable[[str], Callable]:
    """Step callbacks that say on stderr what goes on."""
    def start(name: str) -> Callable:
        def callback(info) -> None:
            if info.step == info.total:
                print(f"{cell.name}: learned <{name}>, loss {info.loss:.3f}", file=sys.stderr, flush=True)
        return callback
    return start


def _world_bench(options: Namespace):
    """The embedded base with its own world's pictures and the settings that fit it."""
    from ...core.demo.base import load_base
    from .embedded import settings_of, suite, training
    from .photo_suite import Bench

    backbone = load_base()
    made, untrained = suite(backbone, options.tasks)
    return Bench(backbone, made, untrained, lambda seed: training(options.steps, seed), settings_of)


def continual(options: Namespace) -> Result | None:
    """Runs the cells that have no file yet and puts all files of this length together, whoever ran them. Started by torchrun, each process
    takes its share of the cells, and the first one waits for the others and puts together."""
    from ...core.methods import DEFAULT
    from ...core.training.process_group import process_group
    from .concepts import ordered
    from .figure import draw
    from .photo_suite import STEPS, check_flags, photo_bench
    from .sequence_run import run_cell
    from .summary import summarise, table

    check_flags(options)
    if options.steps is None:
        options.steps = 200 if options.data is None else STEPS
    require_at_least(options, tasks=1, seeds=1, orders=1, steps=1)
    cells = [] if options.merge else _cells(options)
    folder = options.cells or options.file.with_suffix(".cells")
    bench = _world_bench(options) if options.data is None else photo_bench(options, folder)
    with process_group() as group:
        for cell in cells[group.rank::group.size]:
            settings, places = bench.settings_of(cell.method) | cell.settings(), ordered(options.tasks, cell.order)
            run_cell(bench.backbone, bench.suite, cell, places, settings, bench.training(cell.seed), folder, _telling(cell))
        group.wait()
        if not group.is_first:
            return None
    found = [_finished(path) for path in sorted(folder.glob(f"*-n{options.tasks}-o*-s*.json"))
             if not path.name.endswith(".progress.json")]
    if not found:
        raise ConceptError(f"the folder '{folder}' holds no finished cell of {options.tasks} tasks")
    result = summarise(found, DEFAULT, bench.untrained)
    write_result(options.file, result)
    draw(options.file.with_suffix(".png"), found, result)
    return result, [table(result), *(f"{o['claim']}: {'holds' if o['holds'] else 'does not hold'}{', clearly' if o['clear'] else ''}"
                                     for o in result["orderings"])]
