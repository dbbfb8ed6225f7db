"""The commands `continual` and `tune`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from ...core.cli.arguments import add_base
from ...core.errors import ConceptError
from ..report import Result, add_embedded_base, numbers, require_at_least, say, write_result
from . import single_commands
from .runs import BASE, Run
from .single_commands import DRAWN, RUNS, methods_of, rows_of

USUAL = 3      # seeds and orders on photos


def add_commands(commands) -> None:
    """Adds the commands to a parser's subcommands."""
    _add_continual(commands)
    parser = commands.add_parser("tune", help="choose the settings of every method on a suite of their own")
    parser.add_argument("--json", dest="file", type=Path, help="where the result goes (default: the "
                        "committed file, from which `continual` reads its settings)")
    parser.add_argument("--runs", type=Path, help=RUNS)
    parser.add_argument("--methods", default="", help="comma separated (default: all)")
    add_embedded_base(parser, BASE)
    parser.set_defaults(run=tune)
    single_commands.add_commands(commands)


def _add_continual(commands) -> None:
    parser = commands.add_parser("continual", help="every method on one sequence of tasks")
    add = parser.add_argument
    add("--json", dest="file", type=Path, required=True, help=DRAWN)
    add("--runs", "--cells", dest="runs", type=Path, help=RUNS)
    add("--methods", default="",
        help="comma separated (default: all); name+key=value overrides a setting and is a row of its own")
    add("--tasks", type=int, default=10, help="number of concepts (default %(default)s)")
    add("--seed", help="seeds, comma separated, each with every order of --order (default: five seeds in one "
                       "order and two further orders at one seed for the methods that are compared by name, "
                       "three runs for the others)")
    add("--order", help="orders, comma separated: 0 as listed, 1 reversed, others shuffled (default 0)")
    add("--seeds", type=int, help="number of seeds, from 0 on")
    add("--orders", type=int, help="with --seeds: number of orders; seed s learns in order s modulo this "
                                   "number (default 3)")
    add("--steps", type=int, help="per task (default: as tuned, else 200; with --data 800)")
    add("--upper", action="store_true",
        help="also learn each concept into a bank of its own with the default method, as one more row")
    add("--merge", action="store_true", help="run nothing, only summarise the finished runs")
    add("--write", type=Path, nargs="+", default=[], metavar="FILE",
        help="documents whose sections <!-- continual:NAME --> are filled from the result")
    add_base(parser, BASE)
    add("--data", type=Path,
        help="folder with tasks.json and photos, such as CIFC's (default: drawn pictures)")
    add("--clip", type=Path,
        help="with --data: folder of CLIP ViT-B/32 in transformers' layout, for measuring (default: the "
             "encoder for photos, which measures no text alignment)")
    add("--dino", type=Path,
        help="with --data: folder of DINO ViT-S/16, which compares objects instead of CLIP")
    add("--resolution", type=int, help="with --data: side of the pictures in pixels (default 512)")
    add("--pictures", type=int,
        help="with --data: per concept and evaluation (default 100; the papers: 1000)")
    parser.set_defaults(run=continual)


def _runs(options: Namespace) -> list[Run]:
    """The runs that are asked for, or the default plan; see the flags."""
    from ...core.methods import DEFAULT
    from .plan import planned

    rows, tasks = rows_of(options.methods), options.tasks
    by_number = options.seed is not None or options.order is not None
    by_count = options.seeds is not None or options.orders is not None
    if by_number and by_count:
        raise ConceptError("--seed and --order name runs, --seeds and --orders count them; give one kind")
    if by_number:
        orders, seeds = numbers(options.order or "0", "order"), numbers(options.seed or "0", "seed")
        runs = [Run(name, tasks, order, seed, overrides=overrides)
                for order in orders for seed in seeds for name, overrides in rows]
    elif by_count or options.data is not None:
        seeds, orders = (USUAL if count is None else count for count in (options.seeds, options.orders))
        require_at_least(Namespace(seeds=seeds, orders=orders), seeds=1, orders=1)
        runs = [Run(name, tasks, seed % orders, seed, overrides=overrides)
                for seed in range(seeds) for name, overrides in rows]
    else:
        runs = planned(rows, tasks)
    return runs + ([Run(DEFAULT, tasks, runs[0].order, runs[0].seed, alone=True)] if options.upper else [])


def _reporting(run: Run) -> Callable[[str], Callable]:
    """Step callbacks that report each learned concept on stderr."""
    def start(name: str) -> Callable:
        def callback(info) -> None:
            if info.step == info.total:
                say(f"{run.name}: learned <{name}>, loss {info.loss:.3f}")
        return callback
    return start


def tune(options: Namespace) -> Result:
    """Performs the missing trials of all methods, and writes the chosen settings."""
    from .tuned import FILE
    from .tuning import tune as choose

    file = options.file or FILE
    result = choose(methods_of(options.methods), file, options.runs or file.with_suffix(".cells"), say,
                    options.base)
    return result, [f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in entry["chosen"].items())
                    for name, entry in result["methods"].items() if "chosen" in entry]


def continual(options: Namespace) -> Result | None:
    """Performs the missing runs, and summarises all finished runs with this number of tasks.

    Processes that run the same command, or the processes of torchrun, share the runs. Under torchrun the
    first one waits for the others and summarises.
    """
    from ...core.training.process_group import process_group
    from .photo_benchmark import check_flags

    check_flags(options)
    require_at_least(options, tasks=1)
    if options.steps is not None:
        require_at_least(options, steps=1)
    runs = [] if options.merge else _runs(options)
    folder = options.runs or options.file.with_suffix(".cells")
    with process_group() as group:
        if runs:
            _perform(options, runs, folder)
        group.wait()
        if not group.is_first:
            return None
    return _summarised(options, folder)


def _perform(options: Namespace, runs: Sequence[Run], folder: Path) -> None:
    """Performs the runs that have no file yet, together with other processes."""
    from .concepts import ordered
    from .embedded import ten_and_more
    from .judged import floor_and_ceiling
    from .levels import file_of, measured
    from .photo_benchmark import photo_benchmark
    from .pictures import Sampler
    from .sequence_run import perform
    from .sharing import share

    benchmark = (ten_and_more(options.tasks, options.steps, options.base) if options.data is None
                 else photo_benchmark(options))
    sampler, suite = Sampler(benchmark.backbone), benchmark.suite

    def perform_run(run: Run) -> None:
        perform(sampler, suite, run, ordered(options.tasks, run.order), *benchmark.configured(run), folder,
                _reporting(run))

    measured(file_of(folder, options.tasks), suite.origin, lambda: floor_and_ceiling(sampler, suite))
    share(folder, lambda: runs, perform_run)


def _summarised(options: Namespace, folder: Path) -> Result:
    from ...core.data.report import counted
    from ...core.methods import DEFAULT
    from . import levels, tuned
    from .chart import draw
    from .markdown import sections, write_sections
    from .sequence_run import finished_run
    from .summary import summarise

    paths = [path for path in sorted(folder.glob(f"*-n{options.tasks}-o*-s*.json"))
             if not path.name.endswith(".progress.json")]
    finished = [run for path in paths if (run := finished_run(path)) is not None]
    if not finished:
        raise ConceptError(f"the folder '{folder}' holds no finished run of {counted(options.tasks, 'task')}")
    recent = [run for run in finished if "judges" in run]
    if not recent:
        raise ConceptError(f"the folder '{folder}' holds only runs of an earlier version, which cannot be "
                           "summarised; name another folder with --runs")
    if len(recent) < len(finished):
        say(f"left out: {counted(len(finished) - len(recent), 'run')} of an earlier version")
    limits = levels.read(levels.file_of(folder, options.tasks))
    if limits is None:
        raise ConceptError(f"'{levels.file_of(folder, options.tasks)}' is missing; run the command without "
                           "--merge to measure it again")
    base = limits["origin"].get("base", "")
    result = summarise(recent, limits, DEFAULT, lambda method: tuned.trials(method, base))
    write_result(options.file, result)
    draw(options.file.with_suffix(".png"), result)
    for document in options.write:
        write_sections(document, result)
    text = sections(result)
    return result, [*text["main"].split("\n"), *text["claims"].split("\n")]
