"""The continual benchmark's chart: alone against combined, and what is confused, retained and changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .markdown import intervals_of, performed, ranked
from .plan import NAMED
from .tables import ALONE, COMBINED, CONFUSED

INK, QUIET, FAINT = "#1d1d24", "#6b6b76", "#c9ced8"
DEFAULT_COLOUR, NAMED_COLOUR, OTHER_COLOUR = "#c2410c", "#28507a", "#9aa3b2"
FRONT_COLOUR = "#e8b08c"
NARROWEST, EDGE = 10.0, 0.5      # of an axis in percent: its width, and what it shows beyond 0 and 100
LETTER, LINE = 5.4, 11.0      # width of a letter and height of a line of a label, in points
# offsets of a label from its point, in points, and its alignment; the first one that is free is taken
PLACES = ((7, 6, "left"), (7, -6, "left"), (-7, 6, "right"), (-7, -6, "right"), (0, 13, "center"),
          (0, -13, "center"), (14, 18, "left"), (14, -18, "left"), (-14, 18, "right"), (-14, -18, "right"),
          (22, 30, "left"), (22, -30, "left"), (-22, 30, "right"), (-22, -30, "right"))
Point = tuple[float, float]
Box = tuple[float, float, float, float]


def pareto_front(points: Mapping[str, Point]) -> list[str]:
    """The names of the points that no other point beats in both directions, by the first coordinate."""
    front = [name for name, (x, y) in points.items()
             if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())]
    return sorted(front, key=lambda name: points[name])


def _colour(name: str, default: str) -> str:
    return DEFAULT_COLOUR if name == default else NAMED_COLOUR if name in NAMED else OTHER_COLOUR


def _apart(one: Box, other: Box) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def _label_box(point: Point, place: tuple[float, float, str], text: str) -> Box:
    x, y, width = point[0] + place[0], point[1] + place[1], LETTER * len(text)
    left = {"left": x, "right": x - width, "center": x - width / 2}[place[2]]
    return left, y - LINE / 2, left + width, y + LINE / 2


def _place_labels(axis, points: Mapping[str, Point], default: str) -> None:
    """Writes each name beside its point, where it covers neither a point nor another name."""
    to_points = 72.0 / axis.figure.dpi
    at = {name: tuple(axis.transData.transform(point) * to_points) for name, point in points.items()}
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in at.values()]
    order = sorted(points, key=lambda name: (name != default, name not in NAMED, -sum(points[name])))
    for name in order:
        boxes = [_label_box(at[name], place, name) for place in PLACES]
        free = [i for i, box in enumerate(boxes) if all(_apart(box, other) for other in taken)]
        chosen = free[0] if free else 0
        taken.append(boxes[chosen])
        dx, dy, side = PLACES[chosen]
        far = abs(dy) > 13
        axis.annotate(name, points[name], xytext=(dx, dy), textcoords="offset points", ha=side, va="center",
                      fontsize=9 if name == default else 8, color=_colour(name, default),
                      fontweight="bold" if name == default else "normal", zorder=5,
                      arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.7} if far else None)


def _bare(axis) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(colors=QUIET, labelsize=8, length=3)


def _error(entry: Mapping) -> list[list[float]]:
    """Distances to the ends of an interval in percent, as matplotlib takes them."""
    return [[100 * max(0.0, entry["mean"] - entry["low"])], [100 * max(0.0, entry["high"] - entry["mean"])]]


def _points(result: Mapping) -> dict[str, Point]:
    """Method -> its alone and combined in percent, for methods that have both."""
    return {name: (100 * row[ALONE]["mean"], 100 * row[COMBINED]["mean"])
            for name, row in ((name, result["methods"][name]) for name in ranked(result))
            if "mean" in row.get(ALONE, {}) and "mean" in row.get(COMBINED, {})}


def _scatter(axis, result: Mapping, points: Mapping[str, Point]) -> None:
    _bare(axis)
    axis.set_title("How well concepts are shown, alone and combined", fontsize=10, color=INK, loc="left")
    axis.set_xlabel("alone: % of the way from class noun to real pictures", fontsize=8.5, color=QUIET)
    axis.set_ylabel("combined: two and three concepts in one prompt", fontsize=8.5, color=QUIET)
    if not points:
        return
    front = pareto_front(points)
    lowest = [min(values) for values in zip(*points.values(), strict=True)]
    corners = [(lowest[0], points[front[0]][1]), *(points[name] for name in front),
               (points[front[-1]][0], lowest[1])]
    axis.step([x for x, _ in corners], [y for _, y in corners], where="pre", color=FRONT_COLOUR, lw=1.4,
              zorder=1, label="Pareto front")
    for name, (x, y) in points.items():
        row, colour = result["methods"][name], _colour(name, result["default"])
        axis.errorbar(x, y, xerr=_error(row[ALONE]), yerr=_error(row[COMBINED]), color=colour, elinewidth=0.9,
                      alpha=0.55, zorder=2)
        axis.plot(x, y, "o", ms=8 if name == result["default"] else 5.5, color=colour, zorder=4,
                  mec="white", mew=0.7)
    axis.margins(0.12)
    axis.legend(fontsize=8, frameon=False, loc="upper left", labelcolor=QUIET)


def limits(low: float, high: float) -> tuple[float, float]:
    """The limits of an axis in percent: at least `NARROWEST` wide, or rounding errors of equal figures would
    fill it. What is added lies between 0 and 100, if the figures do.
    """
    missing = NARROWEST - (high - low)
    if missing <= 0:
        return low, high
    start = low - missing / 2
    if low >= -EDGE and high <= 100 + EDGE:
        start = min(max(start, -EDGE), 100 + EDGE - NARROWEST)
    return start, start + NARROWEST


def _dots(axis, result: Mapping, names: Sequence[str], figure: str, title: str) -> None:
    """A row of dots, one per method, with intervals where the figure has them."""
    _bare(axis)
    axis.set_title(title, fontsize=9.5, color=INK, loc="left")
    for i, name in enumerate(names):
        entry = result["methods"][name].get(figure)
        entry = {"mean": entry} if isinstance(entry, int | float) else entry
        if not entry or "mean" not in entry or entry["mean"] != entry["mean"]:
            continue
        colour = _colour(name, result["default"])
        axis.plot(100 * entry["mean"], i, "o", ms=5.5, color=colour, zorder=3)
        if "low" in entry:
            axis.plot([100 * entry["low"], 100 * entry["high"]], [i, i], color=colour, lw=1.4, alpha=0.5)
    axis.grid(axis="y", color="#eceef2", lw=0.8)
    axis.set_axisbelow(True)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.margins(x=0.1)
    axis.set_xlim(*limits(*axis.get_xlim()))
    axis.locator_params(axis="x", nbins=4, integer=True)


def draw(path: Path, result: Mapping) -> None:
    """Writes the PNG from the benchmark's result. Figures that no method has leave empty axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, points = ranked(result), _points(result)
    figure = Figure(figsize=(14, max(5.6, 1.6 + 0.27 * len(names))), dpi=110, layout="constrained",
                    facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left, confused, retained, changed = figure.subplots(1, 4, width_ratios=(3.4, 1, 0.8, 0.8))
    _scatter(left, result, points)
    _dots(confused, result, names, CONFUSED, "Confused, %")
    floor = result["floor"].get(CONFUSED)
    if floor:
        confused.axvline(100 * floor["mean"], color=QUIET, lw=0.9, ls=":")
    _dots(retained, result, names, "retained", "Retained, %")
    _dots(changed, result, names, "base_change", "Base change, %")
    for axis in (retained, changed):
        axis.sharey(confused)
        axis.tick_params(labelleft=False)
    confused.set_yticks(range(len(names)), names, fontsize=8)
    for label, name in zip(confused.get_yticklabels(), names, strict=True):
        label.set_color(_colour(name, result["default"]))
    lines = f" Lines are {intervals_of(result)}." if names else ""
    figure.suptitle(f"{performed(result)}{lines} Dotted: class nouns of the base.", fontsize=8.5,
                    color=QUIET, x=0.01, ha="left")
    canvas.draw()      # fixes the axes, so that labels can be placed
    _place_labels(left, points, result["default"])
    figure.savefig(path)
