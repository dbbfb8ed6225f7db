"""The continual benchmark's picture: what every method keeps, and what it reaches alone and together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

INK, QUIET, OWN, OTHER = "#1d1d24", "#6b6b76", "#c2410c", "#9aa3b2"


def _bars(axis, rows: list[tuple[str, float, float]], title: str, default: str, mark: float | None) -> None:
    """Horizontal bars with spreads, best first; mark: a level to compare with. No rows, no axis."""
    if not rows:
        axis.set_axis_off()
        return
    names, values, spreads = zip(*rows, strict=True)
    axis.barh(range(len(rows)), values, xerr=spreads, color=[OWN if name == default else OTHER for name in names], height=0.7,
              error_kw={"lw": 1, "ecolor": INK})
    if not any(values):      # nothing but zeros: no axis around them
        axis.set_xlim(0, 0.1)
    if mark is not None:
        axis.axvline(mark, color=QUIET, lw=1, ls="--")
    axis.set_yticks(range(len(rows)), names, fontsize=8, color=INK)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9, color=INK, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _rows(summary: Mapping, figure: str, more: bool = True) -> list[tuple[str, float, float]]:
    found = []
    for name, row in summary["methods"].items():
        if figure in row:
            value = row[figure]["mean"] if isinstance(row[figure], Mapping) else row[figure]
            found.append((name, value, row["spread"][figure]))
    return sorted(found, key=lambda item: -item[1] if more else item[1])


TOLD = 0.02      # a curve that begins nearer to zero has no name beside it


def _curves(axis, cells: Sequence[Mapping], default: str) -> None:
    """Per method: what IA has become since a concept was learned, by its position in the sequence, mean over cells."""
    begins = []
    for name in sorted({cell["method"] for cell in cells if not cell["alone"]}):
        mine = [[end - just for end, just in zip(cell["image_alignment"], cell["just_learned"], strict=True)]
                for cell in cells if cell["method"] == name and not cell["alone"]]
        means = [sum(values) / len(values) for values in zip(*mine, strict=True)]
        axis.plot(range(1, len(means) + 1), means, color=OWN if name == default else OTHER, lw=2.2 if name == default else 1,
                  zorder=3 if name == default else 2)
        if abs(means[0]) > TOLD or name == default:
            begins.append((means[0], name))
    free = float("inf")
    for value, name in sorted(begins, reverse=True):      # names would lie on each other: each at least a line below the last
        free = min(value, free - 0.032)
        axis.annotate(name, (1, free), xytext=(-5, 0), textcoords="offset points", fontsize=6, va="center", ha="right",
                      color=OWN if name == default else QUIET)
    axis.set_title("Alignment since it was learned, by position", fontsize=9, color=INK, loc="left")
    axis.set_xlabel("learned as number", fontsize=8, color=QUIET)
    axis.yaxis.tick_right()
    for side in ("top", "left"):
        axis.spines[side].set_visible(False)


def draw(path: Path, cells: Sequence[Mapping], summary: Mapping) -> None:
    """Writes the PNG; figures that no method has, such as those of groups in a sequence of one task, leave their place empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    default, upper = summary["default"], summary["upper_bound"]
    figure = Figure(figsize=(12, 3 + 0.5 * len(summary["methods"])), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flatten()
    level = upper["image_alignment"]["mean"] if upper else None
    title = "Image alignment" + (" (dashed: models of their own)" if level is not None else "")
    _bars(axes[0], _rows(summary, "image_alignment"), title, default, level)
    _bars(axes[1], _rows(summary, "multi_alignment"), "Two and three in one prompt", default, None)
    _bars(axes[2], _rows(summary, "confusion", more=False), "Two of one class: share mistaken", default, None)
    _bars(axes[3], _rows(summary, "worst_retention"), "Worst concept's share kept", default, 1.0)
    _bars(axes[4], _rows(summary, "base_drift", more=False), "Drift of pictures without concepts", default, None)
    _curves(axes[5], cells, default)
    count = f"{summary['tasks']} tasks, seeds {summary['seeds']}, orders {summary['orders']}, {summary['steps']} steps per task"
    figure.suptitle(count, fontsize=9, color=QUIET, x=0.01, ha="left")
    figure.savefig(path)
