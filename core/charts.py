"""Charts: loss curves, aggregation weights, regions over attention, selected neurons.

Drawn with Pillow, which every ComfyUI installs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from .images import (
    ACCENT,
    EMPTY,
    GRID,
    INK,
    PAPER,
    QUIET,
    Colour,
    between,
    colour,
    fitting,
    font,
    ink_on,
    opened,
    wrapped,
)

SIMILAR, RAW = (84, 210, 148), (140, 152, 184)      # similarity to the photos; the loss of single steps
SIMILARITY = "similarity to the photos"
NODE = 400      # usual width of a node in pixels, at which texts must be readable


def note_picture(text: str) -> Image.Image:
    """A small picture that says why there is no other one."""
    lines = wrapped(text, font(17), NODE - 32, 3)
    image = Image.new("RGB", (NODE, 40 + 24 * len(lines)), PAPER)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((16, 18 + 24 * i), line, INK, font(17))
    return image


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Running mean of the last `window` losses at every step; of all so far if there are fewer."""
    sums = np.cumsum([0.0, *losses])
    return [float((sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window))
            for i in range(len(losses))]


def loss_picture(losses: Sequence[float], title: str, scores: Sequence[tuple[int, float]] = (),
                 size: tuple[int, int] = (520, 300), spreads: Mapping[int, float] = MappingProxyType({})
                 ) -> Image.Image:
    """The loss of every step as a thin grey line, and its running mean over a tenth of the steps.

    Args:
        losses: One per step.
        scores: (step, similarity to the photos) of previews, drawn as points on a separate scale. Those that
            are NaN, because a preview holds NaN, are left out.
        size: Width and height in pixels.
        spreads: Step -> standard error of its score, drawn as a bar through the point.
    """
    scores = [(step, score) for step, score in scores if math.isfinite(score)]
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 62, 46, size[0] - 16, size[1] - 36
    room = right - left - (font(14).getlength(SIMILARITY) + 12 if scores else 0)
    draw.text((left, 10), fitting(title, font(17), room), INK, font(17))
    low, high = 0.0, max(float(np.quantile(losses, 0.98)) * 1.1, 1e-6)

    def place(step: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * step / max(1, len(losses) - 1)
        return x, bottom - (bottom - top) * min(1.0, (value - low) / (high - low))

    def curve(values: Sequence[float], fill: Colour, width: int) -> None:
        points = [place(step, value) for step, value in enumerate(values)]
        draw.line(points * (2 if len(points) == 1 else 1), fill, width)

    for i in range(5):
        value = low + (high - low) * i / 4
        y = place(0, value)[1]
        draw.line([(left, y), (right, y)], GRID)
        draw.text((8, y - 8), f"{value:.3f}", QUIET, font(14))
    draw.text((left, bottom + 10), "step 1", QUIET, font(14))
    last = f"step {len(losses)}"
    draw.text((right - font(14).getlength(last), bottom + 10), last, QUIET, font(14))
    curve(losses, RAW, 1)
    curve(smoothed(losses, max(1, len(losses) // 10)), ACCENT, 3)
    if scores:
        _draw_scores(draw, [(place(step - 1, 0)[0], score) for step, score in scores], (top, right, bottom),
                     [spreads.get(step, 0.0) for step, _ in scores])
    return image


def _draw_scores(draw: ImageDraw.ImageDraw, scores: Sequence[tuple[float, float]],
                 edges: tuple[int, int, int], spreads: Sequence[float]) -> None:
    """Points `(x, score)` joined by a line, with bars of one standard error; the last, the best and the worst
    carry their values.

    The scale spans at least 0.05, so that noise is not exaggerated.
    """
    top, right, bottom = edges
    values = [value for _, value in scores]
    low, high = min(values), max(max(values), min(values) + 0.05)
    places = [(x, bottom - 20 - (bottom - top - 40) * (value - low) / (high - low)) for x, value in scores]
    labelled = (len(values) - 1, values.index(max(values)), values.index(min(values)))
    draw.line(places * (2 if len(places) == 1 else 1), SIMILAR, 2)
    scale = (bottom - top - 40) / (high - low)
    for i, ((x, y), value) in enumerate(zip(places, values, strict=True)):
        if spreads[i] > 0:
            ends = [min(bottom, max(top, y + sign * scale * spreads[i])) for sign in (-1, 1)]
            draw.line([(x, ends[0]), (x, ends[1])], SIMILAR, 1)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], SIMILAR)
        if i in labelled:
            text = f"{100 * value:.1f}"
            corner = (min(x, right - draw.textlength(text, font(14))),
                      y + (6 if value == min(values) else -22))
            draw.text(corner, text, SIMILAR, font(14))
    draw.text((right - draw.textlength(SIMILARITY, font(14)), 12), SIMILARITY, SIMILAR, font(14))


def weights_picture(names: Sequence[str], weights: Tensor, title: str) -> Image.Image:
    """Aggregation weights `[sites, concepts]` as a heat map, with each concept's mean."""
    sites, count = weights.shape
    cell, label, row = max(6, min(32, 320 // max(1, sites))), 130, 30
    image = Image.new("RGB", (max(NODE, label + cell * sites + 74), 66 + row * max(1, count)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((10, 8), fitting(title, font(17), image.width - 20), INK, font(17))
    draw.text((label, 36), "weight at each text attention, first to last", QUIET, font(14))
    draw.text((label + cell * sites + 14, 36), "mean", QUIET, font(14))
    peak = max(float(weights.abs().max()) if weights.numel() else 0.0, 1e-6)
    for j, name in enumerate(names):
        y = 58 + j * row
        draw.text((10, y + 6), fitting(f"<{name}>", font(15), label - 16), INK, font(15))
        for i in range(sites):
            share = min(1.0, abs(float(weights[i, j])) / peak)
            draw.rectangle([label + i * cell, y + 2, label + (i + 1) * cell - 2, y + row - 4],
                           between(EMPTY, ACCENT, share))
        draw.text((label + cell * sites + 14, y + 6), f"{float(weights[:, j].mean()):.2f}", INK, font(15))
    return image


def regions_picture(masks: Tensor, maps: Tensor, labels: Sequence[str], side: int = 256) -> Image.Image:
    """Attention maps of regions, each with the outline of its mask.

    Args:
        masks: `[U, H, W]` in 0..1.
        maps: `[U, H, W]` in 0..1, the brightness of the region's colour.
        labels: One per region.
        side: Longer side of each map in pixels.
    """
    count, height, width = maps.shape
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = max(1, min(count, 2))      # side by side in one row, texts would be too small on a node
    rows = -(-max(1, count) // columns)
    image = Image.new("RGB", ((size[0] + 8) * columns + 8, (size[1] + 34) * rows), PAPER)
    draw = ImageDraw.Draw(image)
    for u in range(count):
        x, y = 8 + u % columns * (size[0] + 8), u // columns * (size[1] + 34)
        brightness = maps[u].numpy()[..., None]
        shade = brightness * np.array(colour(u)) + (1 - brightness) * np.array([20, 20, 26])
        shown = Image.fromarray(shade.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
        image.paste(shown, (x, y + 28))
        mask = Image.fromarray((masks[u].numpy() * 255).astype(np.uint8))
        mask = mask.resize(size, Image.Resampling.BILINEAR)
        edge = np.array(mask) > 127
        inner = edge.copy()
        neighbours = edge[:-2, 1:-1] & edge[2:, 1:-1] & edge[1:-1, :-2] & edge[1:-1, 2:]
        inner[1:-1, 1:-1] = edge[1:-1, 1:-1] & neighbours
        border = Image.fromarray(((edge & ~inner) * 255).astype(np.uint8))
        image.paste(Image.new("RGB", size, (255, 255, 255)), (x, y + 28), border)
        draw.text((x, y + 4), fitting(labels[u], font(17), size[0]), INK, font(17))
    return image


def outlines_picture(masks: Tensor, labels: Sequence[str], colours: Sequence[Colour]) -> Tensor:
    """An overlay that shows regions on a picture.

    Args:
        masks: `[U, H, W]` in 0..1.
        labels, colours: One per region.

    Returns:
        `[H, W, 4]` in 0..1; alpha is 1 at outlines and labels, 0 elsewhere.
    """
    height, width = masks.shape[1:]
    size = max(9, min(height, width) // 26)
    image = Image.new("RGBA", (width, height))
    draw = ImageDraw.Draw(image)
    for mask, shade in zip(masks, colours, strict=True):
        line = Image.fromarray((_outline(mask, max(1, size // 6)).numpy() * 255).astype(np.uint8))
        image.paste((*shade, 255), (0, 0, width, height), line)
    taken: list[tuple[int, int, int, int]] = []
    for mask, label, shade in zip(masks, labels, colours, strict=True):
        rows, columns = mask.gt(0.5).any(1).nonzero(), mask.gt(0.5).any(0).nonzero()
        if len(rows):
            left, right = int(columns[0]), int(columns[-1]) + 1
            _tag(draw, left, int(rows[0]), fitting(label, font(size), right - left - size), shade, size,
                 taken)
    return torch.from_numpy(np.array(image)).float().div(255)


def _outline(mask: Tensor, thickness: int) -> Tensor:
    """The inner edge of a mask `[H, W]`, as a mask. The outline is also drawn along the picture's border."""
    inside = mask.gt(0.5).float()
    out = F.pad(1 - inside, (thickness,) * 4, value=1.0)[None, None]
    out = F.max_pool2d(F.max_pool2d(out, (2 * thickness + 1, 1), stride=1), (1, 2 * thickness + 1), stride=1)
    return inside * out[0, 0]


def _tag(draw: ImageDraw.ImageDraw, left: int, top: int, label: str, shade: Colour, size: int,
         taken: list[tuple[int, int, int, int]]) -> None:
    """A label in the upper left corner of its region, or below labels that already cover that corner."""
    if not label:
        return
    width, height = int(draw.textlength(label, font(size))) + size, size + size // 2
    while any(left < r and x < left + width and top < b and t < top + height for x, t, r, b in taken):
        top += height
    taken.append((left, top, left + width, top + height))
    draw.rectangle([left, top, left + width - 1, top + height - 1], (*shade, 255))
    draw.text((left + size // 2, top + size // 6), label, (*ink_on(shade), 255), font(size))


def thumbnails_picture(thumbnails: Sequence[tuple[str, bytes]], side: int = 160,
                       columns: int = 5) -> Image.Image:
    """Thumbnails in rows, with captions below. A card says where a thumbnail is missing or unreadable.

    Args:
        thumbnails: (caption, JPEG or PNG bytes) of each; captions have up to two lines.
        side: Side of each thumbnail in pixels.
    """
    columns = max(1, min(columns, len(thumbnails)))
    rows = -(-max(1, len(thumbnails)) // columns)
    captions = [wrapped(caption, font(18), side, 2) for caption, _ in thumbnails]
    high = side + 12 + 22 * max([1, *map(len, captions)])
    image = Image.new("RGB", (columns * (side + 10) + 10, rows * high + 10), PAPER)
    draw = ImageDraw.Draw(image)
    for i, (_, thumbnail) in enumerate(thumbnails):
        x, y = 10 + (i % columns) * (side + 10), 10 + (i // columns) * high
        draw.rectangle([x, y, x + side, y + side], GRID)
        picture = opened(thumbnail)
        if picture is not None:
            image.paste(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS), (x, y))
        else:
            draw.text((x + side / 2, y + side / 2), "no thumbnail", INK, font(18), anchor="mm")
        for number, line in enumerate(captions[i]):
            draw.text((x, y + side + 6 + 22 * number), line, INK, font(18))
    return image


class Selection(Protocol):
    """The parts of `neurons.NeuronSelection` that the chart needs."""

    @property
    def indices(self) -> Mapping[tuple[int, str], Tensor]: ...

    def __len__(self) -> int: ...

    def mask(self, key: tuple[int, str]) -> Tensor: ...


def selection_picture(selection: Selection, sites: int, title: str, share: float) -> Image.Image:
    """Shows the positions of selected neurons.

    Rows of the picture are projections and cells are sites. Each cell has 16 bands of the weight's rows. The
    brighter a band, the more of its entries are selected.

    Args:
        sites: Number of sites of the model.
        share: Share of the UNet's weights that is selected, for the title.
    """
    projections = sorted({projection for _, projection in selection.indices})
    cell, label, height = max(8, min(60, 420 // max(1, sites))), 64, 96
    width = max(520, label + cell * sites + 16)      # space for the texts
    image = Image.new("RGB", (width, 90 + (height + 22) * max(1, len(projections))), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((10, 8), fitting(title, font(17), width - 20), INK, font(17))
    draw.text((10, 32), f"{len(selection):,} weights, {share:.2%} of the UNet", INK, font(15))
    draw.text((10, 56), "left to right: text attentions, first to last. Bright bands: selected outputs",
              QUIET, font(14))
    bands = {key: _bands(selection, key) for key in selection.indices}
    peak = max([float(band.max()) for band in bands.values()], default=1.0) or 1.0
    for j, projection in enumerate(projections):
        y = 86 + j * (height + 22)
        draw.text((10, y + height // 2 - 9), projection, INK, font(15))
        for index in range(sites):
            if (index, projection) in bands:
                shade = (bands[index, projection] / peak).numpy()[:, None, None]
                pixels = (np.array(EMPTY) * (1 - shade) + np.array(ACCENT) * shade).astype(np.uint8)
                column = Image.fromarray(pixels).resize((cell - 3, height), Image.Resampling.NEAREST)
                image.paste(column, (label + index * cell, y))
    return image


def _bands(selection: Selection, key: tuple[int, str], count: int = 16) -> Tensor:
    """Share of selected entries in `count` groups of a weight's rows."""
    rows = selection.mask(key).float().mean(1)
    return torch.stack([part.mean() for part in rows.tensor_split(min(count, len(rows)))])
