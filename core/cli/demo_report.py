"""The demo's report picture: what three ways draw after they have learned the same three concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.assignment import Assignment
from ..files import write_atomically
from .demo_ways import PAIR, STYLED, TASKS, WAYS, Pictures

INK, QUIET, BEST = "#1d1d24", "#5f5f6a", "#0b7a3b"
COLUMNS = 4
SCALE = ("100% of the way: as similar to the photos as other real pictures. 0%: no more similar than any "
         "dog, or than pictures without the style.")
SHOWN = 192      # height of a picture in pixels, unless the pictures themselves are larger


def _strip(pictures: Tensor) -> np.ndarray:
    """The first pictures side by side with a white gap, `[H, W, 3]` uint8, enlarged."""
    from ..images import eight_bit, upscale

    factor = max(1, SHOWN // pictures.shape[-2])
    images = eight_bit(upscale(pictures[:COLUMNS], factor)).permute(0, 2, 3, 1).numpy()
    gap = np.full((images.shape[1], 6, 3), 255, dtype=np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)


def _show(axis, pictures: Tensor, text: str = "", best: bool = False) -> None:
    axis.imshow(_strip(pictures), interpolation="antialiased")
    axis.set_axis_off()
    axis.set_anchor("W")
    axis.text(0, -0.05, text, transform=axis.transAxes, va="top", fontsize=11,
              color=BEST if best else QUIET, weight="bold" if best else "normal")


def _say(axis, title: str, text: str = "") -> None:
    axis.set_axis_off()
    axis.text(0, 0.62, title, transform=axis.transAxes, fontsize=13, color=INK, weight="bold", va="center")
    axis.text(0, 0.42, text, transform=axis.transAxes, fontsize=11, color=QUIET, va="top", wrap=True)


def _rows(tasks: Sequence[Assignment], figures: Mapping[str, Mapping],
          pictures: Mapping[str, Pictures]) -> list[tuple]:
    """Per row: title, text, the photos or None, and per way its pictures, its figure, and that in words."""
    def row(title, text, photos, drawn, value, words):
        cells = {way: (drawn(pictures[way]), value(figures[way]), words.format(value(figures[way])))
                 for way in WAYS}
        return title, text, photos, cells

    kinds = {"object": "four of the five photos", "style": "four of the five pictures of a style"}
    alone = [row(f"<{task.name}>", kinds[task.kind], task.references, lambda drawn, i=i: drawn.alone[i],
                 lambda found, i=i: found["gap_closed"][i], "{:.0%} of the way to the photos")
             for i, task in enumerate(tasks)]
    return [
        *alone,
        row("two dogs in one prompt", f"“{PAIR}”", None, lambda drawn: drawn.pair,
            lambda found: found["pair_closed"], "{:.0%} of the way to the photos of each"),
        row("two dogs in two boxes", "one on the left, one on the right", None, lambda drawn: drawn.boxes,
            lambda found: found["boxes_right"], "{:.0%} of the boxes right"),
        row("a learned dog in a learned style", f"“{STYLED}”", None, lambda drawn: drawn.styled,
            lambda found: 0.0, ""),
        row("what is left of the first", f"<{TASKS[0]}> after one, two and three concepts, same seed", None,
            lambda drawn: torch.cat(drawn.first), lambda found: found["retained"], "{:.0%} retained"),
    ]


def draw(path: Path, tasks: Sequence[Assignment], figures: Mapping[str, Mapping],
         pictures: Mapping[str, Pictures]) -> None:
    """Writes the report picture. Needs matplotlib (extra `demo`).

    Args:
        path: A PNG file.
        tasks: The concepts.
        figures: The figures of each way, as in the report.
        pictures: What each way drew.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(tasks, figures, pictures)
    figure = Figure(figsize=(22, 1.62 * len(rows) + 1.3), facecolor="white")
    FigureCanvasAgg(figure)
    cells = figure.add_gridspec(len(rows) + 1, 1 + len(WAYS), height_ratios=[0.12] + [1] * len(rows),
                                hspace=0.3, wspace=0.04, left=0.015, right=0.99, top=0.945, bottom=0.03)
    figure.suptitle("Three concepts, learned one after another from five pictures each", fontsize=19,
                    color=INK, x=0.015, ha="left", y=0.985)
    figure.text(0.99, 0.985, SCALE, fontsize=11, color=QUIET, ha="right", va="top")
    for column, title in enumerate(("", *(way.title for way in WAYS.values()))):
        axis = figure.add_subplot(cells[0, column])
        _say(axis, title)
    for number, (title, text, photos, drawn) in enumerate(rows, start=1):
        axis = figure.add_subplot(cells[number, 0])
        if photos is None:
            _say(axis, title, text)
        else:
            _show(axis, photos, f"{title}: {text}")
        aim = max(value for _, value, _ in drawn.values())
        for column, (shown, value, words) in enumerate(drawn.values(), start=1):
            best = bool(words) and abs(value - aim) < 1e-9
            _show(figure.add_subplot(cells[number, column]), shown, words, best)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=80, format="png"))
