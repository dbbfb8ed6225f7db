"""Cells of the continual benchmark put together: per method mean and spread, the table, the expected orderings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ...core.errors import ConceptError

PLAIN = ("multi_alignment", "multi_present", "pair_alignment", "confusion", "base_drift", "a_mmd", "f_mmd", "trained_share",
         "bytes_per_concept", "seconds_per_concept")
PER_CONCEPT = ("image_alignment", "text_alignment", "just_learned", "forgetting")
LEARNED = 0.2      # IA below which a concept was not learned at all: what is kept of next to nothing is no figure
# Claims of the papers that the table can bear out or not: (better, worse, figure, whether more is better).
ORDERINGS = (
    ("cidm", "lora_m", "image_alignment", True),
    ("clora", "finetune", "forgetting", False),
    ("cns", "finetune", "image_alignment", True),
    ("l2dm", "finetune", "image_alignment", True),
)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def cell_figures(cell: Mapping, upper: Mapping[str, float] | None = None) -> dict[str, float]:
    """One number per figure. retention: mean IA at the end over mean IA just after learning, the worst one over concepts that were learned;
    upper: concept -> IA of a model of its own; plasticity is how near to it late concepts come against early
    ones: mean of IA / upper just after learning, last half of the sequence over first half."""
    found = {name: _mean(cell[name]) for name in PER_CONCEPT} | {name: cell[name] for name in PLAIN if name in cell}
    found["retention"] = _mean(cell["image_alignment"]) / _mean(cell["just_learned"])
    kept = [share for share, ia in zip(cell["retention"], cell["just_learned"], strict=True) if ia >= LEARNED]
    found["worst_retention"] = min(kept or cell["retention"])
    if upper is not None and len(cell["concepts"]) > 1:
        shares = [ia / upper[name] for ia, name in zip(cell["just_learned"], cell["concepts"], strict=True)]
        half = len(shares) // 2
        found["plasticity"] = _mean(shares[-half:]) / _mean(shares[:half])
    return found


def upper_levels(cells: Sequence[Mapping]) -> dict[str, float]:
    """Concept -> mean IA of models of their own."""
    levels: dict[str, list[float]] = {}
    for cell in cells:
        for name, ia in zip(cell["concepts"], cell["just_learned"], strict=True):
            levels.setdefault(name, []).append(ia)
    return {name: _mean(values) for name, values in levels.items()}


def method_row(cells: Sequence[Mapping], upper: Mapping[str, float] | None) -> dict:
    """Mean over a method's cells of the figures that all of them have; `spread` is the standard deviation over seeds and orders, 0 for a
    single cell. Of the seconds the least: what else runs on a machine only adds to them."""
    figures = [cell_figures(cell, upper) for cell in cells]
    row: dict = {"cells": len(cells)}
    spread = {}
    for name in (name for name in figures[0] if all(name in f for f in figures)):
        values = [f[name] for f in figures]
        spread[name] = statistics.stdev(values) if len(values) > 1 else 0.0
        row[name] = {"mean": _mean(values), "std": spread[name]} if name in ("image_alignment", "text_alignment") else _mean(values)
    row["seconds_per_concept"] = min(cell["seconds_per_concept"] for cell in cells)
    return {**row, "spread": spread}


def _value(row: Mapping, name: str) -> float:
    return row[name]["mean"] if isinstance(row[name], Mapping) else row[name]


def orderings(methods: Mapping[str, Mapping]) -> list[dict]:
    """What the papers claim, and whether it holds here; `clear`: by more than both spreads together, each of two cells or more."""
    found = []
    for better, worse, name, more in ORDERINGS:
        if better in methods and worse in methods:
            difference = _value(methods[better], name) - _value(methods[worse], name)
            margin = methods[better]["spread"][name] + methods[worse]["spread"][name]
            gain = difference if more else -difference
            known = min(methods[better]["cells"], methods[worse]["cells"]) > 1
            claim = f"{better} {'above' if more else 'below'} {worse} in {name}"
            found.append({"claim": claim, "difference": difference, "holds": gain > 0, "clear": known and gain > margin})
    return found


def summarise(cells: Sequence[Mapping], default: str, untrained: Mapping) -> dict:
    """The benchmark's JSON from all cells of one sequence length; ConceptError for none and for cells of different steps."""
    steps = sorted({cell["steps"] for cell in cells})
    if len(steps) != 1:
        raise ConceptError(f"the cells have steps {', '.join(map(str, steps))}; allowed: one number for all" if steps
                           else "there is no cell to put together; allowed: 1 or more")
    alone = [cell for cell in cells if cell["alone"]]
    upper = upper_levels(alone) or None
    names = sorted({cell["method"] for cell in cells if not cell["alone"]})
    methods = {name: method_row([c for c in cells if c["method"] == name and not c["alone"]], upper) for name in names}
    return {
        "tasks": cells[0]["tasks"],
        "seeds": sorted({cell["seed"] for cell in cells}),
        "orders": sorted({cell["order"] for cell in cells}),
        "steps": steps[0],
        "default": default,
        "methods": methods,
        "upper_bound": method_row(alone, upper) if alone else {},
        "untrained": dict(untrained),
        "orderings": orderings(methods),
    }


COLUMNS = (("image_alignment", "IA", 100, 1), ("text_alignment", "TA", 100, 1), ("worst_retention", "kept, worst", 100, 0),
           ("forgetting", "forgotten", 100, 1), ("multi_alignment", "together", 100, 1), ("confusion", "mistaken", 100, 0),
           ("base_drift", "drift", 100, 1), ("plasticity", "plasticity", 1, 2), ("bytes_per_concept", "kB", 1e-3, 0),
           ("seconds_per_concept", "s", 1, 0))


def table(summary: Mapping) -> str:
    """Markdown, best image alignment first; figures are mean ± spread, alignments and shares times 100."""
    rows = sorted(summary["methods"].items(), key=lambda item: -_value(item[1], "image_alignment"))
    if summary["upper_bound"]:
        rows = [("*one model per concept*", summary["upper_bound"]), *rows]
    lines = ["| method | " + " | ".join(title for _, title, _, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows:
        cells = []
        for figure, _, factor, digits in COLUMNS:
            if figure not in row:
                cells.append("")
                continue
            spread = row["spread"][figure] * factor
            cells.append(f"{_value(row, figure) * factor:.{digits}f}" + (f" ± {spread:.{digits}f}" if row["cells"] > 1 else ""))
        title = f"**{name}**" if name == summary["default"] else name
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
