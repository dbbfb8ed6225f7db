"""`continual-concepts bench …`: figures by a command. Each returns its JSON and the lines that a person reads."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from .errors import ConceptError
from .files import write_atomically

Result = tuple[dict, list[str]]


def _write(path: Path | None, result: dict) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(result, indent=1) + "\n"))


def _least(options: Namespace, **least: int) -> None:
    for name, value in least.items():
        if getattr(options, name) < value:
            raise ConceptError(f"{name} is {getattr(options, name)}; allowed: {value} or more")


def base(options: Namespace) -> Result:
    from .demo.quality import base_quality

    result = base_quality(options.pictures)
    _write(options.file, result)
    return result, [json.dumps(result, indent=1)]


def neurons(options: Namespace) -> Result:
    """How many base neurons prompts share, and a picture of it beside the JSON."""
    from .demo.base import load_base
    from .demo.neuron_sharing import draw, neuron_sharing

    result = neuron_sharing(load_base(), draws=options.draws)
    _write(options.file, result)
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
    from .evaluation.cells import Cell
    from .methods import DEFAULT, METHODS

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
    from .demo.base import load_base
    from .demo.continual import settings_of, suite, training
    from .photo_benchmark import Bench

    backbone = load_base()
    made, untrained = suite(backbone, options.tasks)
    return Bench(backbone, made, untrained, lambda seed: training(options.steps, seed), settings_of)


def continual(options: Namespace) -> Result | None:
    """Runs the cells that have no file yet and puts all files of this length together, whoever ran them. Started by torchrun, each process
    takes its share of the cells, and the first one waits for the others and puts together."""
    from .demo.sequence import ordered
    from .evaluation.continual import run_cell
    from .evaluation.figure import draw
    from .evaluation.summary import summarise, table
    from .methods import DEFAULT
    from .photo_benchmark import STEPS, check_flags, photo_bench
    from .training.team import together

    check_flags(options)
    if options.steps is None:
        options.steps = 200 if options.data is None else STEPS
    _least(options, tasks=1, seeds=1, orders=1, steps=1)
    cells = [] if options.merge else _cells(options)
    folder = options.cells or options.file.with_suffix(".cells")
    bench = _world_bench(options) if options.data is None else photo_bench(options, folder)
    with together() as team:
        for cell in cells[team.rank::team.size]:
            settings, places = bench.settings_of(cell.method) | cell.settings(), ordered(options.tasks, cell.order)
            run_cell(bench.backbone, bench.suite, cell, places, settings, bench.training(cell.seed), folder, _telling(cell))
        team.wait()
        if not team.is_first:
            return None
    found = [_finished(path) for path in sorted(folder.glob(f"*-n{options.tasks}-o*-s*.json"))
             if not path.name.endswith(".progress.json")]
    if not found:
        raise ConceptError(f"the folder '{folder}' holds no finished cell of {options.tasks} tasks")
    result = summarise(found, DEFAULT, bench.untrained)
    _write(options.file, result)
    draw(options.file.with_suffix(".png"), found, result)
    return result, [table(result), *(f"{o['claim']}: {'holds' if o['holds'] else 'does not hold'}{', clearly' if o['clear'] else ''}"
                                     for o in result["orderings"])]


def _kept(path: Path, make: Callable[[], dict]) -> dict:
    """A part of a benchmark from its file, else made and written: a run that was cut goes on."""
    if not path.exists():
        _write(path, make())
    return json.loads(path.read_text())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _regional_quality(options: Namespace, folder: Path) -> dict:
    from .demo import regional_quality as quality
    from .demo.base import load_base

    backbone, steps = load_base(), options.learn_steps
    made = {method: quality.bank_name(method, steps) for method in quality.RANKS}
    banks = {method: quality.learned_bank(backbone, method, folder / f"{method}-{name}.safetensors", steps, _say)
             for method, name in made.items()}
    judge, found = quality.judge(backbone), {}
    for way in quality.WAYS:
        method = quality.method_of(way)
        for count in quality.GRIDS:
            path = folder / f"{way}-k{count}-p{options.pictures}-{made[method]}.json"
            row = _kept(path, lambda way=way, bank=banks[method], count=count:
                        quality.quality(backbone, bank, judge, way, count, options.pictures))
            found.setdefault(way, {})[str(count)] = row
            _say(f"{way}, {count} regions: {100 * row['hit_rate']:.0f} % right, {100 * row['missing']:.0f} % missing")
    return found


def _regional_cost(options: Namespace) -> dict:
    from . import regional_cost

    where = "the UNet alone" if options.comfyui is None else "ComfyUI"
    cost = (regional_cost.diffusers_cost(options.pixels, options.steps) if options.comfyui is None
            else regional_cost.comfyui_cost(options.comfyui, options.pixels, options.steps))
    return {"host": where, "pixels": options.pixels, **regional_cost.measure(cost, options.rounds, _say)}


def regional(options: Namespace) -> Result:
    """What regions cost and whether they keep concepts apart. A part that is not asked for stays what it was in the file."""
    _least(options, pictures=1, learn_steps=1, pixels=64, steps=2, rounds=1)
    result = json.loads(options.file.read_text()) if options.file.exists() else {}
    if options.only != "quality":
        result["cost"] = _regional_cost(options)
    if options.only != "cost":
        result["quality"] = _regional_quality(options, options.file.with_suffix(".cells"))
    _write(options.file, result)
    lines = [f"{kind} {count}: {row['over_plain']:.3f} of a plain step" for kind in ("regions", "routed", "prompt", "hooks")
             for count, row in result.get("cost", {}).get(kind, {}).items()]
    quality = result.get("quality", {})
    if quality:
        counts = next(iter(quality.values()))
        lines += [f"| right / missing, % | {' | '.join(f'K = {count}' for count in counts)} |", "|---" * (len(counts) + 1) + "|"]
    for way, rows in quality.items():
        cells = [f"{100 * row['hit_rate']:.0f} / {100 * row['missing']:.0f}" for row in rows.values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return result, lines


def _host(options: Namespace):
    """A model with random weights, of SD1.5's shape where no other is asked for, in ComfyUI where its folder is given."""
    from .training_cost import Setup

    setup = Setup(options.shape, options.pixels, options.precision, options.checkpointing)
    if options.comfyui is None:
        from .training_rivals import DiffusersHost

        return DiffusersHost(setup)
    from .hosts.comfy import standalone

    standalone.start(options.comfyui)
    from .hosts.comfy.training_cost import ComfyHost

    return ComfyHost(setup)


def training(options: Namespace) -> Result:
    """What a step of learning costs, beside the passes forward that it needs and beside other trainers."""
    from . import training_cost

    _least(options, pixels=64, steps=2, rounds=1)
    names = [name.strip() for name in (options.rows or ";".join(training_cost.ROWS)).split(";")]
    unknown = [name for name in names if name not in training_cost.ROWS]
    if unknown:
        raise ConceptError(f"rows names {unknown[0]!r}; allowed: {'; '.join(training_cost.ROWS)}")
    host = _host(options)
    if options.profile is not None:
        tables = [training_cost.profile(host, row) for row in ("bound", "cidm")]
        write_atomically(options.profile, lambda temporary: temporary.write_text("\n".join(tables)))
    result = {"host": "diffusers" if options.comfyui is None else "ComfyUI",
              **training_cost.measure(host, options.steps, options.rounds, _say, names, options.alone)}
    _write(options.file, result)
    others = [name.removeprefix("faster_than_") for name in next(iter(result["rows"].values())) if name.startswith("faster_than_")]
    lines = [f"{name}: {row['step_seconds']:.2f} s a step, {row['step_over_forwards']:.2f} of its passes forward"
             + "".join(f", {row[f'faster_than_{other}']:.1f} times as fast as {other}" for other in others)
             + (f"; with 100 concepts in the bank {row['hundred_over_one']:.3f}" if "hundred_over_one" in row else "")
             for name, row in result["rows"].items()]
    return result, lines


def aggregation(options: Namespace) -> Result:
    """What many concepts cost between a prompt and a picture."""
    from . import scale_cost

    _least(options, concepts=2, rounds=1)
    result = scale_cost.aggregation(_host(options).backbone, options.concepts, options.rounds)
    _write(options.file, result)
    lines = [f"{mode}: {seconds:.2f} s from prompt to weights" for mode, seconds in result["apply_seconds"].items()]
    return result, [*lines, f"the sum alone, concept by concept: {result['naive_seconds']:.2f} s",
                    f"a pass forward with them in the weights: {result['sampling_over_plain']:.3f} of a plain one"]


def bank(options: Namespace) -> Result:
    """What many concepts cost in a file."""
    from tempfile import TemporaryDirectory

    from . import scale_cost

    _least(options, concepts=1, rounds=1)
    with TemporaryDirectory() as folder:
        result = scale_cost.bank(_host(options).backbone, options.concepts, Path(folder), options.rounds)
    _write(options.file, result)
    return result, [f"{name.removesuffix('_seconds')}: {result[name]:.3f} s" for name in result if name.endswith("_seconds")] + [
        f"one concept: {result['concept_mb']:.2f} MB"]
