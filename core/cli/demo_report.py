"""The demo's report picture: photos, and each method's pictures right after learning and at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from ..files import write_atomically

INK, QUIET = "#1d1d24", "#6b6b76"
COLUMNS = 5
SHOWN = 192      # height of a picture in pixels, unless the pictures themselves are larger
NAMES = {"cidm": "CIDM", "finetune": "Sequential finetuning"}


def _strip(pictures: Tensor, columns: int) -> np.ndarray:
    """The first `columns` pictures side by side with a white gap, `[H, W, 3]` uint8, enlarged."""
    from ..images import eight_bit, upscale

    factor = max(1, SHOWN // pictures.shape[-2])
    images = eight_bit(upscale(pictures[:columns], factor)).permute(0, 2, 3, 1).numpy()
    gap = np.full((images.shape[1], 6, 3), 255, dtype=np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)


def _show(axis, pictures: Tensor, columns: int, title: str = "") -> None:
    axis.imshow(_strip(pictures, columns), interpolation="antialiased")
    axis.set_axis_off()
    if title:
        axis.set_title(title, fontsize=10, color=INK, loc="left", pad=5)


def _matrix(axis, name: str, alignment: list[list[float]], concepts: list[str],
            retention: list[float]) -> None:
    size = len(concepts)
    grid = np.full((size, size), np.nan)
    for i, row in enumerate(alignment):
        grid[i, : len(row)] = row
    axis.imshow(grid, vmin=0, vmax=1, cmap="viridis")
    for i, row in enumerate(alignment):
        for j, value in enumerate(row):
            colour = "white" if value < 0.6 else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=10)
    axis.set_xticks(range(size),
                    [f"<{c}>\nretained {r:.2f}" for c, r in zip(concepts, retention, strict=True)],
                    fontsize=8)
    axis.set_yticks(range(size), [f"after <{c}>" for c in concepts], fontsize=8)
    axis.set_title(f"{name}: image alignment", fontsize=10, color=INK)
    for side in axis.spines.values():
        side.set_visible(False)


def _row(figure, cells, j: int, task, reference, records: dict) -> None:
    """One concept: its photos and the untrained base, then every method right after learning and at the end.
    """
    _show(figure.add_subplot(cells[2 * j, 0]), task.references, COLUMNS,
          f"<{task.name}>, shown to the model in task {j + 1}")
    before = f"before: \u201c{task.noun_prompts[0]}\u201d, \u2026"
    _show(figure.add_subplot(cells[2 * j + 1, 0]), reference.noun_pictures[j], COLUMNS, before)
    for m, (method, record) in enumerate(records.items()):
        name = NAMES.get(method, method)
        for row, i, when in ((2 * j, j, "just learned"),
                             (2 * j + 1, len(record.samples) - 1, "after all tasks")):
            title = f"{name}: {when}  (alignment {record.image_alignment[i][j]:.2f})"
            _show(figure.add_subplot(cells[row, 1 + m]), record.samples[i][j], COLUMNS, title)


def _bottom(figure, cell, concepts: list[str], records: dict, composition) -> None:
    """The pictures with two regions, and the matrix of every method."""
    cells = cell.subgridspec(1, 2 + len(records), width_ratios=[1.8] + [0.8] * len(records) + [0.02],
                             wspace=0.45)
    pictures = cells[0].subgridspec(2, 1, hspace=0.12)
    title = f"<{concepts[0]}> left, <{concepts[1]}> right, one pass (regions right: {composition.hits:.0%})"
    for row in range(2):
        _show(figure.add_subplot(pictures[row]), composition.pictures[4 * row :], 4, "" if row else title)
    for m, (method, record) in enumerate(records.items()):
        axis = figure.add_subplot(cells[1 + m])
        _matrix(axis, NAMES.get(method, method), record.image_alignment, concepts, record.retention)


def draw(path: Path, tasks, reference, records: dict, composition) -> None:
    """Writes the report picture. Needs matplotlib (extra `demo`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 3.2 * len(tasks) + 6.6), facecolor="white")
    FigureCanvasAgg(figure)
    heights = [3.2 * len(tasks), 5.2]
    outer = figure.add_gridspec(2, 1, height_ratios=heights, hspace=0.1, left=0.03, right=0.985, top=0.945,
                                bottom=0.05)
    figure.suptitle("Three concepts, one after another: what each method retains", fontsize=17, color=INK,
                    x=0.03, ha="left", y=0.985)
    cells = outer[0].subgridspec(2 * len(tasks), 1 + len(records), wspace=0.03, hspace=0.32)
    for j, task in enumerate(tasks):
        _row(figure, cells, j, task, reference, records)
    _bottom(figure, outer[1], [task.name for task in tasks], records, composition)
    note = "Same seeds everywhere. Alignment: mean cosine with the training pictures, by the metric encoder."
    figure.text(0.03, 0.012, note, fontsize=9, color=QUIET)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))
