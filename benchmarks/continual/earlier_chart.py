"""The continual benchmark's chart: retention, and quality of single and combined concepts, per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

INK, QUIET, DEFAULT_COLOUR, OTHER_COLOUR = "#1d1d24", "#6b6b76", "#c2410c", "#9aa3b2"
NAMED = 0.02      # curves that begin nearer to zero are not labelled
LINE_HEIGHT = 0.032      # height of a label, in units of the curves


def _bars(axis, rows: list[tuple[str, float, float]], title: str, default: str, level: float
          | None = None) -> None:
    """Horizontal bars with spreads. level: position of a dashed reference line.

    Without rows the axis stays empty.
    """
    if not rows:
        axis.set_axis_off()
        return
    names, values, spreads = zip(*rows, strict=True)
    colours = [DEFAULT_COLOUR if name == default else OTHER_COLOUR for name in names]
    axis.barh(range(len(rows)), values, xerr=spreads, color=colours, height=0.7,
              error_kw={"lw": 1, "ecolor": INK})
    if not any(values):      # matplotlib cannot scale an axis of zeros
        axis.set_xlim(0, 0.1)
    if level is not None:
        axis.axvline(level, color=QUIET, lw=1, ls="--")
    axis.set_yticks(range(len(rows)), names, fontsize=8, color=INK)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9, color=INK, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _rows(summary: Mapping, figure: str, higher_is_better: bool = True) -> list[tuple[str, float, float]]:
    """Name, value and spread of every method with this figure, best first."""
    rows = []
    for name, row in summary["methods"].items():
        if figure in row:
            value = row[figure]["mean"] if isinstance(row[figure], Mapping) else row[figure]
            rows.append((name, value, row["spread"][figure]))
    return sorted(rows, key=lambda item: -item[1] if higher_is_better else item[1])


def _curves(axis, runs: Sequence[Mapping], default: str) -> None:
    """Per method, the mean change of image alignment since a concept was learned, by the concept's position.
    """
    begins = []
    for name in sorted({run["method"] for run in runs if not run["alone"]}):
        changes = [[end - just for end, just in zip(run["image_alignment"], run["just_learned"], strict=True)]
                   for run in runs if run["method"] == name and not run["alone"]]
        means = [sum(values) / len(values) for values in zip(*changes, strict=True)]
        is_default = name == default
        axis.plot(range(1, len(means) + 1), means, color=DEFAULT_COLOUR if is_default else OTHER_COLOUR,
                  lw=2.2 if is_default else 1, zorder=3 if is_default else 2)
        if abs(means[0]) > NAMED or is_default:
            begins.append((means[0], name))
    free = float("inf")
    for value, name in sorted(begins, reverse=True):      # labels at least a line apart do not overlap
        free = min(value, free - LINE_HEIGHT)
        axis.annotate(name, (1, free), xytext=(-5, 0), textcoords="offset points", fontsize=6, va="center",
                      ha="right", color=DEFAULT_COLOUR if name == default else QUIET)
    axis.set_title("Alignment since it was learned, by position", fontsize=9, color=INK, loc="left")
    axis.set_xlabel("position in the sequence", fontsize=8, color=QUIET)
    axis.yaxis.tick_right()
    for side in ("top", "left"):
        axis.spines[side].set_visible(False)


def draw(path: Path, runs: Sequence[Mapping], summary: Mapping) -> None:
    """Writes the PNG.

    Figures that no method has, such as groups in a sequence of one task, leave empty axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    default, upper = summary["default"], summary["upper_bound"]
    figure = Figure(figsize=(12, 3 + 0.5 * len(summary["methods"])), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flatten()
    level = upper["image_alignment"]["mean"] if upper else None
    title = "Image alignment" + (" (dashed: one model per concept)" if level is not None else "")
    _bars(axes[0], _rows(summary, "image_alignment"), title, default, level)
    _bars(axes[1], _rows(summary, "multi_alignment"), "Two and three in one prompt", default)
    _bars(axes[2], _rows(summary, "confusion", False), "Two of one class: share confused", default)
    _bars(axes[3], _rows(summary, "worst_retention"), "Worst concept's share retained", default, 1.0)
    _bars(axes[4], _rows(summary, "base_drift", False), "Change of pictures without concepts", default)
    _curves(axes[5], runs, default)
    count = (f"{summary['tasks']} tasks, seeds {summary['seeds']}, orders {summary['orders']}, "
             f"{summary['steps']} steps per task")
    figure.suptitle(count, fontsize=9, color=QUIET, x=0.01, ha="left")
    figure.savefig(path)
