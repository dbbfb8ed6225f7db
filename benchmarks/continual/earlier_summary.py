"""Summary of the continual benchmark: mean and spread per method, the table, and the claims of the papers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ...core.errors import ConceptError

DEFAULT = "bound"      # the default method of the version that made these runs
PLAIN = ("multi_alignment", "multi_present", "pair_alignment", "confusion", "base_drift", "a_mmd", "f_mmd",
         "trained_share", "bytes_per_concept", "seconds_per_concept")
PER_CONCEPT = ("image_alignment", "text_alignment", "just_learned", "forgetting")
# below this image alignment a concept was not learned, so its retained share is meaningless
LEARNED = 0.2
# claims of the papers to check against the table: (better, worse, figure, whether higher is better)
ORDERINGS = (
    ("cidm", "lora_m", "image_alignment", True),
    ("clora", "finetune", "forgetting", False),
    ("cns", "finetune", "image_alignment", True),
    ("l2dm", "finetune", "image_alignment", True),
)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def run_figures(run: Mapping, upper: Mapping[str, float] | None = None) -> dict[str, float]:
    """One number per figure of a run.

    `retention` is the mean alignment at the end / the mean alignment right after learning. `worst_retention`
    is the smallest such share among the learned concepts. `plasticity` compares how well late and early
    concepts are learned: the mean of alignment / upper right after learning, second half of the sequence /
    first half.

    Args:
        run: The JSON of a finished run.
        upper: Concept -> alignment of the concept learned alone; without it there is no plasticity.
    """
    figures = {name: _mean(run[name]) for name in PER_CONCEPT}
    figures |= {name: run[name] for name in PLAIN if name in run}
    figures["retention"] = _mean(run["image_alignment"]) / _mean(run["just_learned"])
    learned = [share for share, just in zip(run["retention"], run["just_learned"], strict=True)
               if just >= LEARNED]
    figures["worst_retention"] = min(learned or run["retention"])
    if upper is not None and len(run["concepts"]) > 1:
        shares = [just / upper[name] for just, name in zip(run["just_learned"], run["concepts"], strict=True)]
        half = len(shares) // 2
        figures["plasticity"] = _mean(shares[-half:]) / _mean(shares[:half])
    return figures


def upper_levels(runs: Sequence[Mapping]) -> dict[str, float]:
    """Concept -> mean image alignment of the concept learned alone."""
    levels: dict[str, list[float]] = {}
    for run in runs:
        for name, alignment in zip(run["concepts"], run["just_learned"], strict=True):
            levels.setdefault(name, []).append(alignment)
    return {name: _mean(values) for name, values in levels.items()}


def method_row(runs: Sequence[Mapping], upper: Mapping[str, float] | None) -> dict:
    """Means over a method's runs, of the figures that all runs have.

    `cells` is the number of runs. `spread` is the standard deviation over seeds and orders, 0 for a single
    run. For seconds the smallest value is used, because other load on the machine only increases them.
    """
    figures = [run_figures(run, upper) for run in runs]
    row: dict = {"cells": len(runs)}
    spread = {}
    for name in (name for name in figures[0] if all(name in f for f in figures)):
        values = [f[name] for f in figures]
        spread[name] = statistics.stdev(values) if len(values) > 1 else 0.0
        has_spread = name in ("image_alignment", "text_alignment")
        row[name] = {"mean": _mean(values), "std": spread[name]} if has_spread else _mean(values)
    row["seconds_per_concept"] = min(run["seconds_per_concept"] for run in runs)
    return {**row, "spread": spread}


def _value(row: Mapping, name: str) -> float:
    return row[name]["mean"] if isinstance(row[name], Mapping) else row[name]


def orderings(methods: Mapping[str, Mapping]) -> list[dict]:
    """The papers' claims, and whether our results confirm them.

    `clear` means that the difference exceeds the sum of both spreads, with at least two runs of each method.
    """
    claims = []
    for better, worse, name, higher_is_better in ORDERINGS:
        if better in methods and worse in methods:
            difference = _value(methods[better], name) - _value(methods[worse], name)
            margin = methods[better]["spread"][name] + methods[worse]["spread"][name]
            gain = difference if higher_is_better else -difference
            has_spread = min(methods[better]["cells"], methods[worse]["cells"]) > 1
            claim = f"{better} {'above' if higher_is_better else 'below'} {worse} in {name}"
            clear = has_spread and gain > margin
            claims.append({"claim": claim, "difference": difference, "holds": gain > 0, "clear": clear})
    return claims


def summarise(runs: Sequence[Mapping], default: str, untrained: Mapping) -> dict:
    """The benchmark's JSON from all runs with one number of tasks.

    Raises:
        ConceptError: There are no runs, or runs have different steps.
    """
    steps = sorted({run["steps"] for run in runs})
    if len(steps) != 1:
        raise ConceptError(f"the runs have steps {', '.join(map(str, steps))}; allowed: one number for all"
                           if steps
                           else "there is no run to summarise; allowed: 1 or more")
    alone = [run for run in runs if run["alone"]]
    upper = upper_levels(alone) or None
    names = sorted({run["method"] for run in runs if not run["alone"]})
    methods = {name: method_row([r for r in runs if r["method"] == name and not r["alone"]], upper)
               for name in names}
    return {
        "tasks": runs[0]["tasks"],
        "seeds": sorted({run["seed"] for run in runs}),
        "orders": sorted({run["order"] for run in runs}),
        "steps": steps[0],
        "default": default,
        "methods": methods,
        "upper_bound": method_row(alone, upper) if alone else {},
        "untrained": dict(untrained),
        "orderings": orderings(methods),
    }


# figure, title, factor, digits
COLUMNS = (("image_alignment", "IA", 100, 1), ("text_alignment", "TA", 100, 1),
           ("worst_retention", "retained, worst", 100, 0), ("forgetting", "forgotten", 100, 1),
           ("multi_alignment", "combined", 100, 1), ("confusion", "confused", 100, 0),
           ("base_drift", "base change", 100, 1), ("plasticity", "plasticity", 1, 2),
           ("bytes_per_concept", "kB", 1e-3, 0), ("seconds_per_concept", "s", 1, 0))


def table(summary: Mapping) -> str:
    """The table as Markdown, best image alignment first.

    Figures are mean ± spread; alignments and shares are times 100.
    """
    rows = sorted(summary["methods"].items(), key=lambda item: -_value(item[1], "image_alignment"))
    if summary["upper_bound"]:
        rows = [("*one model per concept*", summary["upper_bound"]), *rows]
    titles = " | ".join(title for _, title, _, _ in COLUMNS)
    lines = [f"| method | {titles} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows:
        entries = []
        for figure, _, factor, digits in COLUMNS:
            if figure not in row:
                entries.append("")
                continue
            spread = f" ± {row['spread'][figure] * factor:.{digits}f}" if row["cells"] > 1 else ""
            entries.append(f"{_value(row, figure) * factor:.{digits}f}{spread}")
        title = f"**{name}**" if name == summary["default"] else name
        lines.append(f"| {title} | {' | '.join(entries)} |")
    return "\n".join(lines)
