"""Summary of the continual benchmark: all figures with intervals, and what differs from the default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...core.errors import ConceptError
from ...core.evaluation.metrics import task_forgetting_rate
from . import bootstrap
from .judges import ENCODER
from .tables import (
    ALONE,
    COMBINED,
    CONFUSED,
    FORGOTTEN,
    HIGHER_IS_BETTER,
    LOST,
    PAIRS,
    Table,
    columns_of,
    common,
    spreads,
    table_of,
)

SEED = 0      # of the resampling, the same for every figure
KINDS = {"objects": "object", "styles": "style"}
# below this share right after learning a concept was not learned, so its retained share is meaningless
LEARNED = 0.2
PLAIN = ("base_change", "a_mmd", "f_mmd", "bytes_per_concept", "trained_share")
# claims of the papers: (method, method, figure); the first should be better. Two ablations show on what a
# claim depends: the strength of C-LoRA's penalty, and L2DM's replay.
FORGET_LESS = ("clora", "clora+forget=1000", "cns", "l2dm", "l2dm+alpha=0")
CLAIMS = (("cidm", "lora_m", ALONE),
          *((name, "finetune", figure) for name in FORGET_LESS for figure in (FORGOTTEN, LOST)))


def _generator() -> np.random.Generator:
    return np.random.default_rng(SEED)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _known(value: float) -> float | None:
    """None for what is not a number, which JSON cannot hold."""
    return value if np.isfinite(value) else None


def _kind(table: Table, levels: Mapping, kind: str) -> Table:
    """The columns of one kind of concept."""
    kinds = dict(zip(levels["concepts"], levels["kinds"], strict=True))
    return table.only(columns=[column for column in table.columns if kinds[column] == kind])


def _tables(runs: Sequence[Mapping], levels: Mapping, judge: str) -> dict[str, Table]:
    """Figure -> its table; `objects` and `styles` are parts of `alone`."""
    found = {figure: table_of(runs, levels, figure, judge) for figure in HIGHER_IS_BETTER}
    tables = {figure: table for figure, table in found.items() if table is not None}
    for name, kind in KINDS.items():
        part = _kind(tables[ALONE], levels, kind) if ALONE in tables else None
        if part is not None and part.columns:
            tables[name] = part
    return tables


def _judge_row(tables: Mapping[str, Table]) -> dict:
    """The figures of one judge with their intervals."""
    row: dict = {}
    for figure, table in tables.items():
        entry: dict = bootstrap.interval(table.values, _generator()).to_json()
        if figure in KINDS:
            row[ALONE] |= {figure: entry["mean"], f"{figure}_interval": [entry["low"], entry["high"]]}
            continue
        row[figure] = {**entry, "spread": spreads(table)}
    return row


def compared(left: Mapping[str, Table], right: Mapping[str, Table]) -> dict[str, dict]:
    """Figure -> how the left method differs from the right one, over the runs and concepts of both."""
    differences = {}
    for figure in left:
        if figure in right:
            ours, theirs = common(left[figure], right[figure])
            if not ours.runs or not ours.columns:
                continue
            between = bootstrap.difference(ours.values, theirs.values, _generator())
            better = HIGHER_IS_BETTER.get(figure, True)
            differences[figure] = {"difference": between.mean, "low": between.low, "high": between.high,
                             "runs": len(ours.runs),
                             "verdict": bootstrap.verdict(between, len(ours.runs), better)}
    return differences


def _score(run: Mapping, judge: str, what: str) -> float | None:
    """The judge's own score, not a share: of single concepts (`alone`, `just`), of `groups` or of `pairs`."""
    figures = run["judges"][judge]
    if what in ("groups", "pairs"):
        scores = [value for group in figures[what] for value in group["alignment"]]
        return _mean(scores) if scores else None
    return _mean(figures[what])


def _scores(runs: Sequence[Mapping], judge: str) -> dict[str, float]:
    names = {ALONE: "alone", COMBINED: "groups", PAIRS: "pairs"}
    found = {figure: [_score(run, judge, what) for run in runs] for figure, what in names.items()}
    return {figure: _mean([v for v in values if v is not None]) for figure, values in found.items()
            if None not in values}


def bleed_of(row: Mapping, levels: Mapping, judge: str, concepts: Sequence[str]) -> dict:
    """How much pictures show what was not asked for, beyond real pictures of what was asked.

    Args:
        row: A run, or the floor of the levels.
        levels: Holds the ceiling.
        judge: Whose scores.
        concepts: The concepts of the row's matrix, in its order.

    Returns:
        `alone`, `together`: scores `[asked, shown]` of pictures of one concept and of several, in the order
        of the levels' concepts; None where a concept was not learned, or two were never named together.
        `alone_excess`, `together_excess`: mean excess over the ceiling of all entries off the diagonal, of
        pictures of one concept and of several; None where there are none.
    """
    figures, real = row["judges"][judge], levels["ceiling"]["judges"][judge]
    order, places = levels["concepts"], {name: i for i, name in enumerate(concepts)}
    matrix = [[figures["bleed"][places[asked]][places[shown]] if {asked, shown} <= places.keys() else None
               for shown in order] for asked in order]
    excess = [matrix[i][j] - real["bleed"][i][j] for i in range(len(order)) for j in range(len(order))
              if i != j and matrix[i][j] is not None]
    ceilings = {tuple(group["concepts"]): group["bleed"] for group in (*real["groups"], *real["pairs"])}
    together = [value - ceilings[tuple(group["concepts"])][i][j]
                for group in (*figures["groups"], *figures["pairs"]) if tuple(group["concepts"]) in ceilings
                for i, line in enumerate(group["bleed"]) for j, value in enumerate(line) if i != j]
    return {"alone": matrix, "together": _together(figures, order),
            "alone_excess": _mean(excess) if excess else None,
            "together_excess": _mean(together) if together else None}


def _together(figures: Mapping, order: Sequence[str]) -> list[list[float | None]]:
    """Mean scores `[asked, shown]` over all groups and pairs that name both concepts."""
    scores: dict[tuple[str, str], list[float]] = {}
    for group in (*figures["groups"], *figures["pairs"]):
        for asked, line in zip(group["concepts"], group["bleed"], strict=True):
            for shown, value in zip(group["concepts"], line, strict=True):
                scores.setdefault((asked, shown), []).append(value)
    return [[_mean(scores[asked, shown]) if (asked, shown) in scores else None for shown in order]
            for asked in order]


def _bleed(runs: Sequence[Mapping], levels: Mapping, judge: str) -> dict:
    found = [bleed_of(run, levels, judge, run["concepts"]) for run in runs]
    row: dict = {}
    for name in ("alone", "together"):
        mean = np.array([f[name] for f in found], dtype=float).mean(0)      # None becomes not a number
        row[name] = [[_known(float(value)) for value in line] for line in mean]
    for name in ("alone_excess", "together_excess"):
        values = [f[name] for f in found]
        row[name] = None if None in values else _mean(values)
    return row


def _retained(run: Mapping, levels: Mapping) -> tuple[float, float]:
    """What is left at the end of the concepts' shares right after learning: of all, and of the worst one."""
    end = columns_of(run, levels, ALONE)
    lost = columns_of(run, levels, FORGOTTEN)
    just = {name: end[name] + lost[name] for name in end}
    learned = [end[name] / just[name] for name in end if just[name] >= LEARNED]
    total = sum(just.values())
    return sum(end.values()) / total if total > 0 else float("nan"), min(learned, default=float("nan"))


def _text_alignment(rows: Sequence[Mapping]) -> float | None:
    """Mean over rows and concepts; None if the encoder reads no texts."""
    if not all(row["text_alignment"] for row in rows):
        return None
    return _mean([_mean(row["text_alignment"]) for row in rows])


def _tfr(run: Mapping) -> float:
    just, end = (run["judges"][ENCODER][what] for what in ("just", "alone"))
    return task_forgetting_rate([[0.0] * i + [value] for i, value in enumerate(just[:-1])] + [end])


def _same(runs: Sequence[Mapping], method: str) -> None:
    """Raises ConceptError if the runs of a method have different steps or settings."""
    for key in ("steps", "settings"):
        found = {str(run[key]): run[key] for run in runs}
        if len(found) > 1:
            raise ConceptError(f"the runs of '{method}' have the {key} {' and '.join(sorted(found))}; "
                               "allowed: the same for all")


def figures_of(runs: Sequence[Mapping], levels: Mapping) -> dict:
    """The figures of some runs of one method: those of the metric encoder, and means over the runs."""
    retained = [_retained(run, levels) for run in runs]
    row: dict = {"runs": [[run["order"], run["seed"]] for run in runs],
                 **_judge_row(_tables(runs, levels, ENCODER))}
    for figure, score in _scores(runs, ENCODER).items():
        row.setdefault(figure, {})["cosine"] = score
    row |= {"retained": _known(_mean([whole for whole, _ in retained])),
            "retained_worst": _known(_mean([worst for _, worst in retained])),
            "tfr": _mean([_tfr(run) for run in runs]),
            "text_alignment": _text_alignment(runs)}
    return row | {name: _mean([run[name] for run in runs]) for name in PLAIN}


def method_row(runs: Sequence[Mapping], levels: Mapping, trials: int) -> dict:
    """All figures of a method's runs. Of the seconds the smallest count, because other load adds to them."""
    row = figures_of(runs, levels)
    row["seconds_per_concept"] = min(run["seconds_per_concept"] for run in runs)
    row["tuned"] = {"trials": trials, "steps": runs[0]["steps"], "settings": runs[0]["settings"]}
    row["bleed"] = _bleed(runs, levels, ENCODER)
    row["judges"] = {judge: {**_judge_row(_tables(runs, levels, judge)), "score": _scores(runs, judge),
                             "bleed": _bleed(runs, levels, judge)}
                     for judge in runs[0]["judges"] if judge != ENCODER}
    return row


def level_row(levels: Mapping, which: str) -> dict:
    """The row `floor` or `ceiling`: its shares are 0 or 1 by definition, all else is measured."""
    row, share = levels[which], {"floor": 0.0, "ceiling": 1.0}[which]
    found = {}
    for judge, figures in row["judges"].items():
        scores = _scores([row], judge)
        entry = {figure: {"mean": share, "cosine" if judge == ENCODER else "score": score}
                 for figure, score in scores.items()}
        if figures["pairs"]:
            entry[CONFUSED] = {"mean": _mean([pair["confused"] for pair in figures["pairs"]])}
        entry["bleed"] = bleed_of(row, levels, judge, levels["concepts"])
        found[judge] = entry
    first = found.pop(ENCODER)
    text = {"text_alignment": _text_alignment([row])} if "text_alignment" in row else {}
    return {**first, **text, "judges": found}


def _place(run: Mapping) -> tuple[int, int]:
    return run["order"], run["seed"]


def beside_whole(ablation: Sequence[Mapping], whole: Sequence[Mapping], levels: Mapping) -> dict:
    """What an ablation's row says about the whole method, over the runs that both have.

    An ablation often has fewer runs than its method. Their means over all runs cannot be compared, because
    other seeds and orders can change a figure more than an ablation does.

    Returns:
        `same_runs`: the figures of both, absent without such runs. `against_whole`: the differences.
    """
    places = {_place(run) for run in ablation} & {_place(run) for run in whole}
    if not places:
        return {"against_whole": {}}
    ours, theirs = ([run for run in runs if _place(run) in places] for runs in (ablation, whole))
    differences = compared(_tables(ours, levels, ENCODER), _tables(theirs, levels, ENCODER))
    return {"same_runs": {"ablation": figures_of(ours, levels), "whole": figures_of(theirs, levels)},
            "against_whole": differences}


def _claims(groups: Mapping[str, Sequence[Mapping]], tables: Mapping[str, Mapping[str, Table]]) -> list[dict]:
    """The claims about methods that have been run. One that cannot be compared has `runs` alone."""
    found = []
    for better, worse, figure in CLAIMS:
        if better in groups and worse in groups:
            places = {_place(run) for run in groups[better]} & {_place(run) for run in groups[worse]}
            differences = compared(tables[better], tables[worse])
            found.append({"claim": [better, worse, figure],
                          **differences.get(figure, {"runs": len(places)})})
    return found


def summarise(runs: Sequence[Mapping], levels: Mapping, default: str,
              trials: Callable[[str], int] = lambda _: 0) -> dict:
    """The benchmark's JSON from all finished runs with one number of tasks.

    Args:
        runs: The JSON of the runs.
        levels: Floor and ceiling, see `judged.floor_and_ceiling`.
        default: The method that all others are compared with.
        trials: Method -> how many settings were tried for it.

    Raises:
        ConceptError: There are no runs, or runs of a method have different settings or steps.
    """
    groups: dict[str, list[Mapping]] = {}
    for run in sorted(runs, key=lambda run: (run["method"], run["order"], run["seed"])):
        groups.setdefault(f"{run['method']} alone" if run["alone"] else run["method"], []).append(run)
    if not groups:
        raise ConceptError("there is no run to summarise; allowed: 1 or more")
    for name, group in groups.items():
        _same(group, name)
    judges = list(runs[0]["judges"])
    tables = {judge: {name: _tables(group, levels, judge) for name, group in groups.items()}
              for judge in judges}
    methods = {name: method_row(group, levels, trials(name.partition("+")[0]))
               for name, group in groups.items()}
    for name, row in methods.items():
        for judge in judges if default in groups and name != default else ():
            target = row if judge == ENCODER else row["judges"][judge]
            target["against_default"] = compared(tables[judge][name], tables[judge][default])
        whole = name.partition("+")[0]      # an ablation is named method+setting=value
        if whole != name and whole in groups:
            row |= beside_whole(groups[name], groups[whole], levels)
    return {
        "tasks": runs[0]["tasks"], "concepts": levels["concepts"], "kinds": levels["kinds"],
        "seeds": sorted({run["seed"] for run in runs}), "orders": sorted({run["order"] for run in runs}),
        "default": default, "origin": levels["origin"],
        "intervals": {"level": bootstrap.LEVEL, "draws": bootstrap.DRAWS, "seed": SEED,
                      "fewest_runs": bootstrap.FEWEST_RUNS},
        "methods": methods, "floor": level_row(levels, "floor"), "ceiling": level_row(levels, "ceiling"),
        "claims": _claims(groups, tables[ENCODER]),
    }
