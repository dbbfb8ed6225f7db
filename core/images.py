"""Small pictures that explain: a loss curve, aggregation weights, regions over attention. Drawn with Pillow, which every ComfyUI has."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

PAPER, INK, QUIET, GRID, ACCENT = (252, 252, 250), (29, 29, 36), (120, 120, 130), (226, 226, 230), (44, 86, 206)
ALIKE = (28, 138, 84)


def font(size: int):
    """Pillow's own, in pixels."""
    return ImageFont.load_default(size)


def to_tensor(image: Image.Image) -> Tensor:
    """ComfyUI's IMAGE `[1, H, W, 3]` in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).float().div(255).unsqueeze(0)


def eight_bit(pixels: Tensor) -> Tensor:
    """Pixels of any shape in -1..1 as uint8 0..255 on the CPU."""
    return ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()


def to_pil(picture: Tensor) -> Image.Image:
    """A picture `[3, H, W]` in -1..1 at 8 bits."""
    return Image.fromarray(eight_bit(picture).permute(1, 2, 0).contiguous().numpy())


def thumbnail_of(picture: Tensor) -> bytes:
    """A picture `[3, H, W]` in -1..1 as a JPEG of at most 256 pixels a side."""
    image = to_pil(picture)
    image.thumbnail((256, 256))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def colour(index: int) -> tuple[int, int, int]:
    """A colour per region or concept, far from its neighbours'."""
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb((index * 0.61803) % 1.0, 0.65, 0.86))


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values at every step."""
    sums = np.cumsum([0.0, *losses])
    return [float((sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window)) for i in range(len(losses))]


def loss_picture(losses: Sequence[float], title: str, looks: Sequence[tuple[int, float]] = (),
                 size: tuple[int, int] = (640, 320)) -> Image.Image:
    """Every step's loss, quiet, and its running mean over a tenth of the steps; looks: (step, likeness to the photos) as points of their
    own scale, from the lowest to the highest."""
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 64, 40, size[0] - 20, size[1] - 36
    draw.text((left, 10), title, INK, font(15))
    if not losses:
        return image
    low, high = 0.0, max(float(np.quantile(losses, 0.98)) * 1.1, 1e-6)

    def place(step: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * step / max(1, len(losses) - 1)
        return x, bottom - (bottom - top) * min(1.0, (value - low) / (high - low))

    for i in range(5):
        value = low + (high - low) * i / 4
        y = place(0, value)[1]
        draw.line([(left, y), (right, y)], GRID)
        draw.text((8, y - 7), f"{value:.3f}", QUIET, font(12))
    draw.text((left, bottom + 10), "step 1", QUIET, font(12))
    draw.text((right - 70, bottom + 10), f"step {len(losses)}", QUIET, font(12))
    draw.line([place(i, v) for i, v in enumerate(losses)] * (2 if len(losses) == 1 else 1), (190, 200, 226), 1)
    mean = smoothed(losses, max(1, len(losses) // 10))
    draw.line([place(i, v) for i, v in enumerate(mean)] * (2 if len(mean) == 1 else 1), ACCENT, 3)
    if looks:
        _looks(draw, [(place(step - 1, 0)[0], score) for step, score in looks], (top, right, bottom))
    return image


def _looks(draw: ImageDraw.ImageDraw, looks: Sequence[tuple[float, float]], edges: tuple[float, float, float]) -> None:
    """Points `(x, score)` joined by a line, the last, the best and the worst with their figures. What is noise stays small: the scale spans
    five points at least."""
    top, right, bottom = edges
    scores = [score for _, score in looks]
    low, high = min(scores), max(max(scores), min(scores) + 0.05)
    places = [(x, bottom - 20 - (bottom - top - 40) * (score - low) / (high - low)) for x, score in looks]
    draw.line(places * (2 if len(places) == 1 else 1), ALIKE, 2)
    for i, ((x, y), score) in enumerate(zip(places, scores, strict=True)):
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], ALIKE)
        if i in (len(scores) - 1, scores.index(max(scores)), scores.index(min(scores))):
            text = f"{100 * score:.1f}"
            draw.text((min(x, right - draw.textlength(text, font(12))), y + (6 if score == min(scores) else -20)), text, ALIKE, font(12))
    text = "likeness to the photos"
    draw.text((right - draw.textlength(text, font(13)), 12), text, ALIKE, font(13))


def weights_picture(names: Sequence[str], weights: Tensor, title: str) -> Image.Image:
    """Aggregation weights `[sites, concepts]` as a table of shades with the mean of each concept: which concept acts where."""
    sites, count = weights.shape
    cell, label, row = max(8, min(32, 640 // max(1, sites))), 150, 30
    image = Image.new("RGB", (max(360, label + cell * sites + 84), 62 + row * max(1, count)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((10, 8), title, INK, font(15))
    draw.text((label, 34), "sites, down to up", QUIET, font(12))
    draw.text((label + cell * sites + 14, 34), "mean", QUIET, font(12))
    peak = max(float(weights.abs().max()) if weights.numel() else 0.0, 1e-6)
    for j, name in enumerate(names):
        y = 54 + j * row
        draw.text((10, y + 7), f"<{name}>"[:20], INK, font(13))
        for i in range(sites):
            share = min(1.0, abs(float(weights[i, j])) / peak)
            fill = tuple(int(p + (c - p) * share) for p, c in zip((238, 238, 240), colour(j), strict=True))
            draw.rectangle([label + i * cell, y + 2, label + (i + 1) * cell - 2, y + row - 4], fill)
        draw.text((label + cell * sites + 14, y + 7), f"{float(weights[:, j].mean()):.2f}", INK, font(13))
    if not names:
        draw.text((10, 60), "the bank is empty", QUIET, font(13))
    return image


def regions_picture(masks: Tensor, maps: Tensor, labels: Sequence[str], side: int = 256) -> Image.Image:
    """Per region its attention map `[U, H, W]` in 0..1 as brightness of its colour, with the outline of its mask `[U, H, W]`."""
    count, height, width = maps.shape
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.new("RGB", ((size[0] + 8) * max(1, count) + 8, size[1] + 34), PAPER)
    draw = ImageDraw.Draw(image)
    for u in range(count):
        x = 8 + u * (size[0] + 8)
        shade = maps[u].numpy()[..., None] * np.array(colour(u)) + (1 - maps[u].numpy()[..., None]) * np.array([20, 20, 26])
        image.paste(Image.fromarray(shade.astype(np.uint8)).resize(size, Image.BILINEAR), (x, 28))
        edge = np.array(Image.fromarray((masks[u].numpy() * 255).astype(np.uint8)).resize(size, Image.BILINEAR)) > 127
        inner = edge.copy()
        inner[1:-1, 1:-1] = edge[1:-1, 1:-1] & edge[:-2, 1:-1] & edge[2:, 1:-1] & edge[1:-1, :-2] & edge[1:-1, 2:]
        border = Image.fromarray(((edge & ~inner) * 255).astype(np.uint8))
        image.paste(Image.new("RGB", size, (255, 255, 255)), (x, 28), border)
        draw.text((x, 6), labels[u][: max(8, size[0] // 8)], INK, font(13))
    return image


def outlines_picture(masks: Tensor, labels: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """What is laid over a picture to show its regions: `[H, W, 4]` in 0..1, of alpha 1 at the outlines of masks `[U, H, W]` and at
    their labels, 0 elsewhere."""
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
            _tag(draw, left, int(rows[0]), fitting(label, font(size), right - left - size), shade, size, taken)
    return torch.from_numpy(np.array(image)).float().div(255)


def _outline(mask: Tensor, thickness: int) -> Tensor:
    """The inner edge of a mask `[H, W]`, as a mask. Beyond the picture there is no region, so that its border is drawn as well."""
    inside = mask.gt(0.5).float()
    out = F.pad(1 - inside, (thickness,) * 4, value=1.0)[None, None]
    out = F.max_pool2d(F.max_pool2d(out, (2 * thickness + 1, 1), stride=1), (1, 2 * thickness + 1), stride=1)
    return inside * out[0, 0]


def _tag(draw, left: int, top: int, label: str, shade: tuple[int, int, int], size: int, taken: list) -> None:
    """A label in the upper left corner of its region; further down where an earlier one stands."""
    if not label:
        return
    width, height = int(draw.textlength(label, font(size))) + size, size + size // 2
    while any(left < r and x < left + width and top < b and t < top + height for x, t, r, b in taken):
        top += height
    taken.append((left, top, left + width, top + height))
    draw.rectangle([left, top, left + width - 1, top + height - 1], (*shade, 255))
    draw.text((left + size // 2, top + size // 6), label, (*ink_on(shade), 255), font(size))


def fitting(text: str, face, width: float) -> str:
    """As much of a text, on one line, as is at most `width` pixels wide; "..." where it is cut."""
    text = " ".join(text.split())[:300]
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..." if text else ""


def ink_on(shade: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = shade
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else (255, 255, 255)


def opened(thumbnail: bytes) -> Image.Image | None:
    """A thumbnail as a picture; None when there is none or it cannot be read, for a bank may come from anywhere."""
    try:
        with Image.open(io.BytesIO(thumbnail), formats=("JPEG", "PNG")) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly from the first to the last."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def thumbnails_picture(thumbnails: Sequence[tuple[str, bytes]], side: int = 160, columns: int = 5) -> Image.Image:
    """Cover pictures with what stands below them; a grey card where there is none or an unreadable one."""
    columns = max(1, min(columns, len(thumbnails)))
    rows = -(-max(1, len(thumbnails)) // columns)
    image = Image.new("RGB", (columns * (side + 10) + 10, rows * (side + 34) + 10), PAPER)
    draw = ImageDraw.Draw(image)
    for i, (name, thumbnail) in enumerate(thumbnails):
        x, y = 10 + (i % columns) * (side + 10), 10 + (i // columns) * (side + 34)
        draw.rectangle([x, y, x + side, y + side], GRID)
        picture = opened(thumbnail)
        if picture is not None:
            image.paste(ImageOps.fit(picture, (side, side), Image.LANCZOS), (x, y))
        draw.text((x, y + side + 6), fitting(name, font(14), side), INK, font(14))
    return image


def selection_picture(selection, sites: int, title: str, share: float) -> Image.Image:
    """Where selected neurons lie: per site and projection how many of the weight's rows (outputs) they touch, and how many entries.

    Each row of the picture is a projection, each cell a site, split into 16 bands of rows whose shade is the share of selected entries.
    """
    projections = sorted({projection for _, projection in selection.indices})
    cell, label, height = max(10, min(80, 720 // max(1, sites))), 64, 96
    width = max(640, label + cell * sites + 16)      # room for the title
    image = Image.new("RGB", (width, 62 + (height + 22) * max(1, len(projections))), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((10, 8), f"{title}: {len(selection):,} weights, {share:.2%} of the UNet", INK, font(15))
    draw.text((label, 34), "sites, down to up; bands are groups of outputs, darker = more of them selected", QUIET, font(12))
    bands = {key: _bands(selection, key) for key in selection.indices}
    peak = max([float(band.max()) for band in bands.values()], default=1.0) or 1.0
    for j, projection in enumerate(projections):
        y = 58 + j * (height + 22)
        draw.text((10, y + height // 2 - 8), projection, INK, font(13))
        for index in range(sites):
            if (index, projection) in bands:
                shade = (bands[index, projection] / peak).numpy()[:, None, None]
                pixels = (np.array([238, 238, 240]) * (1 - shade) + np.array(ACCENT) * shade).astype(np.uint8)
                image.paste(Image.fromarray(pixels).resize((cell - 3, height), Image.NEAREST), (label + index * cell, y))
    return image


def _bands(selection, key, count: int = 16) -> Tensor:
    """Share of selected entries in `count` groups of a weight's rows."""
    rows = selection.mask(key).float().mean(1)
    return torch.stack([part.mean() for part in rows.tensor_split(min(count, len(rows)))])


def upscale(pictures: Tensor, factor: int) -> Tensor:
    """Pictures `[B, 3, H, W]` in -1..1, `factor` times as large."""
    return F.interpolate(pictures, scale_factor=factor, mode="bicubic", antialias=False).clamp(-1, 1)
