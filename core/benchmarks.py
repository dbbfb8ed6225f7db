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


def base(options: Namespace) -> Result:
    from .demo.quality import base_quality

    result = base_quality(options.pictures)
    _write(options.file, result)
    return result, [json.dumps(result, indent=1)]


def _cells(options: Namespace) -> list:
    """Every method with every seed, seed s in order s modulo `orders`; the default's upper bound last."""
    from .evaluation.continual import Cell
    from .methods import DEFAULT, METHODS

    names = [name.strip() for name in options.methods.split(",") if name.strip()] or sorted(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ConceptError(f"unknown method {unknown[0]!r}; known: {', '.join(sorted(METHODS))}")
    cells = [Cell(name, options.tasks, seed % options.orders, seed) for seed in range(options.seeds) for name in names]
    return cells + ([Cell(DEFAULT, options.tasks, 0, 0, alone=True)] if options.upper else [])


def _telling(cell) -> Callable[[str], Callable]:
    """Step callbacks that say on stderr what goes on."""
    def start(name: str) -> Callable:
        def callback(info) -> None:
            if info.step == info.total:
                print(f"{cell.name}: learned <{name}>, loss {info.loss:.3f}", file=sys.stderr, flush=True)
        return callback
    return start


def continual(options: Namespace) -> Result:
    """Runs the cells that have no file yet and puts all files of this length together, whoever ran them."""
    from .demo.base import load_base
    from .demo.continual import settings_of, suite, training
    from .demo.sequence import ordered
    from .evaluation.continual import run_cell
    from .evaluation.figure import draw
    from .evaluation.summary import summarise, table
    from .methods import DEFAULT

    for name in ("tasks", "seeds", "orders", "steps"):
        if getattr(options, name) < 1:
            raise ConceptError(f"{name} is {getattr(options, name)}; allowed: 1 or more")
    folder = options.cells or options.file.with_suffix(".cells")
    backbone = load_base()
    made, untrained = suite(backbone, options.tasks)
    for cell in [] if options.merge else _cells(options):
        places = ordered(options.tasks, cell.order)
        run_cell(backbone, made, cell, places, settings_of(cell.method), training(options.steps, cell.seed), folder, _telling(cell))
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*-n{options.tasks}-o*-s*.json"))
             if not path.name.endswith(".progress.json")]
    if not found:
        raise ConceptError(f"the folder '{folder}' holds no finished cell of {options.tasks} tasks")
    result = summarise(found, DEFAULT, untrained)
    _write(options.file, result)
    draw(options.file.with_suffix(".png"), found, result)
    return result, [table(result), *(f"{o['claim']}: {'holds' if o['holds'] else 'does not hold'}{', clearly' if o['clear'] else ''}"
                                     for o in result["orderings"])]
