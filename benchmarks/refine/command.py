"""The command `refine`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ...core.errors import ConceptError
from ..continual.tables import share
from ..report import (
    Result,
    add_embedded_base,
    load_or_make,
    numbers,
    require_at_least,
    say,
    write_result,
)
from .variants import add_command as add_variants


def add_commands(commands) -> None:
    add_variants(commands)
    parser = commands.add_parser("refine", help="photos that are added later: what is retained and gained")
    parser.add_argument("--json", dest="file", type=Path, required=True,
                        help="where the result goes; finished parts are saved beside it")
    parser.add_argument("--concepts", default="rex,quack,mimi,blueprint,luna,crimson",
                        help="of the benchmark continual, comma separated (default %(default)s)")
    parser.add_argument("--method", default="", help="how they are learned (default: the default method)")
    parser.add_argument("--seed", default="0", help="seeds, comma separated (default %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of each learning (default %(default)s)")
    parser.add_argument("--replay", type=int, default=16,
                        help="pictures that are drawn of the concept as it was (default %(default)s)")
    add_embedded_base(parser)
    parser.set_defaults(run=refine)


def _concepts(text: str) -> list:
    from ..continual.concepts import concepts

    known = {concept.name: concept for concept in concepts()}
    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ConceptError(f"concepts names {wrong[0]!r}; allowed: {', '.join(known)}")
    return [known[name] for name in names]


def refine(options: Namespace) -> Result:
    """Performs the runs that have no file yet, and summarises all that were asked for."""
    from ...core.demo.base import load_base
    from ...core.demo.bases import file_of
    from ...core.methods import DEFAULT, get
    from ...core.training.refinement import refinable_methods
    from ..continual.embedded import SEEDS, settings_of
    from .halves import HELD_OUT, VIEWS
    from .measure import ROWS, Refinement, draw_sheet, limits, measure

    require_at_least(options, steps=1, replay=1)
    chosen, seeds = _concepts(options.concepts), numbers(options.seed, "seed")
    method = options.method or DEFAULT
    if not get(method).method.refinable:
        raise ConceptError(f"method {method!r} cannot refine a concept; methods that can: "
                           f"{', '.join(refinable_methods())}")
    backbone = load_base(file_of(options.base))
    runs: list[Refinement] = []
    parts: list[dict] = []
    folder = options.file.with_suffix(".cells") / backbone.fingerprint[:12]
    for concept in chosen:
        for seed in seeds:
            run = Refinement(backbone, concept, method, options.steps, seed, options.replay, folder)
            part = {"concept": concept.name, "kind": concept.kind, "seed": seed}
            part |= load_or_make(folder / f"{concept.name}.limits.json", lambda run=run: limits(run))
            for row in ROWS:
                part[row] = load_or_make(folder / f"{run.name_of(row)}.json",
                                         lambda run=run, row=row: measure(run, row))
                say(f"{run.name}, {row}: old {part[row]['old']:.3f}, new {part[row]['new']:.3f}")
            parts.append(part)
            runs.append(run)
    result = {"method": method, "settings": settings_of(method, backbone.fingerprint), "steps": options.steps,
              "replay": options.replay, "photos": {half: view.photos for half, view in VIEWS.items()},
              "held_out": HELD_OUT, "pictures": len(SEEDS), "base": backbone.fingerprint, "parts": parts,
              "summary": {row: _summary(parts, row) for row in ROWS}}
    write_result(options.file, result)
    draw_sheet([run for run in runs if run.seed == seeds[0]], options.file.with_suffix(".png"))
    return result, _lines(result)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _summary(parts: Sequence[dict], row: str) -> dict:
    """Means over concepts and seeds.

    old, new: cosines; retained, gained: cosines as a share of `before` (old photos) and of `at_once` (new
    photos); retained_way, gained_way: the same of the way from class noun to real photos. Shares are of
    means, because a share of one concept is unsteady where its way is short.
    """
    def mean(which: str, half: str) -> float:
        return _mean([part[which][half] for part in parts])

    def way(which: str, half: str) -> float:
        return _mean([share(part[which][half], part["floor"][half], part["ceiling"][half])
                      for part in parts])

    return {"old": mean(row, "old"), "new": mean(row, "new"),
            "retained": mean(row, "old") / mean("before", "old"),
            "gained": mean(row, "new") / mean("at_once", "new"),
            "retained_way": way(row, "old") / way("before", "old"),
            "gained_way": way(row, "new") / way("at_once", "new")}


def _lines(result: dict) -> list[str]:
    names = ("old", "new", "retained", "gained", "retained_way", "gained_way")
    lines = [f"| | {' | '.join(name.replace('_', ', of the ') for name in names)} |", "|---" * 7 + "|"]
    for row, figures in result["summary"].items():
        shown = [f"{figures[name]:.3f}" for name in names]
        lines.append(f"| {row.replace('_', ' ')} | {' | '.join(shown)} |")
    return lines
