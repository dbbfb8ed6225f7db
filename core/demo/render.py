"""Draws scenes.

A scene is drawn at three times its size as a map of *roles* (body, second, pattern, ...), coloured by its
drawing style, and averaged down. The role map is independent of the style, so one drawing can become a photo,
an ink drawing or a neon sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 3
# The side at which lines are one pixel wide and tiles measure `Style.tile`. Larger pictures show the same
# scene, only sharper.
PICTURE_SIZE = 64
# HEAD has the body's colour without markings, so that body and markings can be distinguished.
ROLES = ("empty", "body", "head", "second", "pattern", "accessory", "light", "dark")
EMPTY, BODY, HEAD, SECOND, PATTERN, ACCESSORY, LIGHT, DARK = range(len(ROLES))

# Parts of every kind in a unit box (x right, y down, feet at y = 1), painted in order: (role, shape,
# numbers).
# ellipse and box: left, top, right, bottom; polygon: x, y, x, y, ...; line: x, y, x, y, width.
# fmt: off
PARTS: dict[str, tuple] = {
    "dog": (
        (HEAD, "line", (-0.7, 0.0, -0.98, -0.5, 0.16)),
        (BODY, "box", (-0.68, 0.3, -0.42, 1.0)), (BODY, "box", (0.18, 0.3, 0.44, 1.0)),
        (BODY, "ellipse", (-0.85, -0.15, 0.6, 0.7)), (HEAD, "ellipse", (0.1, -0.9, 0.85, -0.05)),
        (LIGHT, "ellipse", (0.55, -0.5, 1.0, -0.12)), (DARK, "ellipse", (0.84, -0.5, 1.02, -0.34)),
        (SECOND, "ellipse", (0.02, -0.88, 0.36, -0.05)), (DARK, "ellipse", (0.5, -0.68, 0.64, -0.5)),
    ),
    "cat": (
        (SECOND, "line", (0.4, 0.8, 0.8, 0.5, 0.16)), (SECOND, "line", (0.8, 0.5, 0.75, 0.0, 0.16)),
        (BODY, "ellipse", (-0.52, -0.1, 0.52, 1.0)),
        (SECOND, "polygon", (-0.55, -1.0, -0.55, -0.4, -0.1, -0.7)),
        (SECOND, "polygon", (0.55, -1.0, 0.55, -0.4, 0.1, -0.7)), (HEAD, "ellipse", (-0.6, -0.8, 0.6, 0.15)),
        (DARK, "ellipse", (-0.36, -0.5, -0.18, -0.28)), (DARK, "ellipse", (0.18, -0.5, 0.36, -0.28)),
        (LIGHT, "ellipse", (-0.22, -0.25, 0.22, 0.06)),
        (DARK, "polygon", (-0.09, -0.2, 0.09, -0.2, 0.0, -0.08)),
    ),
    "duck toy": (
        (BODY, "polygon", (-1.0, -0.05, -0.6, 0.75, -0.3, 0.3)),
        (BODY, "ellipse", (-0.9, 0.05, 0.75, 1.0)), (HEAD, "ellipse", (0.0, -0.85, 0.72, 0.1)),
        (SECOND, "polygon", (0.62, -0.5, 1.05, -0.3, 0.62, -0.12)),
        (SECOND, "ellipse", (-0.6, 0.25, 0.15, 0.72)), (DARK, "ellipse", (0.38, -0.58, 0.54, -0.4)),
    ),
    "teddy bear": (
        (SECOND, "ellipse", (-0.72, -1.0, -0.25, -0.5)), (SECOND, "ellipse", (0.25, -1.0, 0.72, -0.5)),
        (BODY, "ellipse", (-0.95, -0.05, -0.35, 0.45)), (BODY, "ellipse", (0.35, -0.05, 0.95, 0.45)),
        (BODY, "ellipse", (-0.7, 0.6, -0.1, 1.02)), (BODY, "ellipse", (0.1, 0.6, 0.7, 1.02)),
        (BODY, "ellipse", (-0.55, -0.1, 0.55, 0.9)), (HEAD, "ellipse", (-0.58, -0.88, 0.58, 0.08)),
        (LIGHT, "ellipse", (-0.28, -0.42, 0.28, 0.0)), (DARK, "ellipse", (-0.1, -0.38, 0.1, -0.22)),
        (DARK, "ellipse", (-0.34, -0.6, -0.19, -0.44)), (DARK, "ellipse", (0.19, -0.6, 0.34, -0.44)),
    ),
    "backpack": (
        (SECOND, "ellipse", (-0.3, -1.05, 0.3, -0.5)), (EMPTY, "ellipse", (-0.16, -0.92, 0.16, -0.5)),
        (SECOND, "box", (-0.92, -0.2, -0.66, 0.8)), (SECOND, "box", (0.66, -0.2, 0.92, 0.8)),
        (HEAD, "ellipse", (-0.75, -0.85, 0.75, 0.35)), (BODY, "box", (-0.75, -0.15, 0.75, 1.0)),
        (SECOND, "box", (-0.48, 0.3, 0.48, 0.86)), (LIGHT, "box", (-0.4, -0.12, 0.4, 0.0)),
        (LIGHT, "box", (-0.1, 0.3, 0.1, 0.5)),
    ),
    "fish": (
        (SECOND, "polygon", (-0.55, 0.1, -1.05, -0.45, -1.05, 0.65)),
        (SECOND, "polygon", (-0.3, -0.3, 0.1, -0.85, 0.35, -0.3)),
        (SECOND, "polygon", (-0.2, 0.5, 0.05, 0.95, 0.25, 0.5)),
        (HEAD, "ellipse", (-0.75, -0.5, 1.0, 0.7)), (BODY, "ellipse", (-0.75, -0.5, 0.55, 0.7)),
        (LIGHT, "ellipse", (0.48, -0.25, 0.78, 0.07)), (DARK, "ellipse", (0.58, -0.17, 0.74, 0.0)),
    ),
    "car": (
        (HEAD, "polygon", (-0.65, 0.15, -0.42, -0.5, 0.35, -0.5, 0.65, 0.15)),
        (BODY, "box", (-1.0, 0.05, 1.0, 0.7)),
        (LIGHT, "polygon", (-0.5, 0.08, -0.34, -0.36, -0.06, -0.36, -0.06, 0.08)),
        (LIGHT, "polygon", (0.06, 0.08, 0.06, -0.36, 0.28, -0.36, 0.47, 0.08)),
        (DARK, "ellipse", (-0.8, 0.4, -0.24, 0.98)), (DARK, "ellipse", (0.24, 0.4, 0.8, 0.98)),
        (SECOND, "ellipse", (-0.7, 0.5, -0.34, 0.88)), (SECOND, "ellipse", (0.34, 0.5, 0.7, 0.88)),
        (LIGHT, "box", (0.86, 0.2, 1.0, 0.38)),
    ),
    "robot": (
        (SECOND, "box", (-0.05, -1.05, 0.05, -0.8)), (SECOND, "box", (-0.9, -0.05, -0.55, 0.55)),
        (SECOND, "box", (0.55, -0.05, 0.9, 0.55)),
        (SECOND, "box", (-0.4, 0.6, -0.12, 1.0)), (SECOND, "box", (0.12, 0.6, 0.4, 1.0)),
        (HEAD, "box", (-0.52, -0.85, 0.52, -0.18)), (BODY, "box", (-0.58, -0.1, 0.58, 0.68)),
        (LIGHT, "ellipse", (-0.36, -0.7, -0.06, -0.4)), (LIGHT, "ellipse", (0.06, -0.7, 0.36, -0.4)),
        (DARK, "ellipse", (-0.27, -0.62, -0.15, -0.48)), (DARK, "ellipse", (0.15, -0.62, 0.27, -0.48)),
        (DARK, "box", (-0.25, -0.32, 0.25, -0.25)),
    ),
}
# Positions of hat and scarf: x, y, half width.
HAT_AT = {"dog": (0.46, -0.82, 0.34), "cat": (0.0, -0.72, 0.36), "duck toy": (0.36, -0.78, 0.32),
          "teddy bear": (0.0, -0.82, 0.36),
          "backpack": (0.0, -0.82, 0.42), "fish": (0.4, -0.42, 0.3), "car": (-0.04, -0.48, 0.34),
          "robot": (0.0, -0.84, 0.4)}
SCARF_AT = {"dog": (0.3, -0.08, 0.36), "cat": (0.0, 0.12, 0.44), "duck toy": (0.28, 0.1, 0.36),
            "teddy bear": (0.0, 0.04, 0.42), "robot": (0.0, -0.14, 0.44)}
# fmt: on


@dataclass(frozen=True)
class Style:
    """Colours of a role map. `paper` and `line` are RGB in 0..255, or None to keep the scene's colours.

    fill: share of the object's colour over the paper, 0..1; line_from_role: lines take the colour of the part
    they outline.
    """

    name: str
    phrase: str
    paper: tuple[int, int, int] | None = None
    line: tuple[int, int, int] | None = None
    fill: float = 1.0
    line_from_role: bool = False
    tile: int = 1
    shaded: bool = False


def _paint(draw: ImageDraw.ImageDraw, parts, to_canvas, scale: float) -> None:
    for role, shape, numbers in parts:
        if shape == "line":
            x0, y0, x1, y1, width = numbers
            draw.line([to_canvas(x0, y0), to_canvas(x1, y1)], fill=role, width=max(1, round(width * scale)))
            continue
        points = [to_canvas(numbers[i], numbers[i + 1]) for i in range(0, len(numbers), 2)]
        if shape == "polygon":
            draw.polygon(points, fill=role)
            continue
        (xa, ya), (xb, yb) = points
        corners = [min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)]
        (draw.ellipse if shape == "ellipse" else draw.rectangle)(corners, fill=role)


def _accessory_parts(kind: str, accessory: str) -> tuple:
    if accessory == "hat":
        x, y, w = HAT_AT[kind]
        return ((ACCESSORY, "box", (x - w, y - 0.08, x + w, y + 0.08)),
                (ACCESSORY, "box", (x - 0.6 * w, y - 0.42, x + 0.6 * w, y)))
    if accessory == "scarf":
        x, y, w = SCARF_AT[kind]
        return ((ACCESSORY, "ellipse", (x - w, y - 0.13, x + w, y + 0.13)),
                (ACCESSORY, "box", (x - 0.55 * w, y, x - 0.1 * w, y + 0.5)))
    return ()


def _pattern(thing, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Mask of the pattern. u, v are object coordinates, so that markings move with the object."""
    step = 0.36 * thing.pattern_scale
    if thing.pattern == "striped":
        return (u / step) % 1.0 < 0.45
    if thing.pattern == "checked":
        return ((u / step) % 1.0 < 0.5) ^ ((v / step) % 1.0 < 0.5)
    if thing.pattern == "spotted":
        row = np.floor(v / step)
        du, dv = (u / step + 0.5 * (row % 2)) % 1.0 - 0.5, (v / step) % 1.0 - 0.5
        return du * du + dv * dv < 0.105
    return np.zeros_like(u, dtype=bool)


def role_map(placed, size: int) -> np.ndarray:
    """Roles of one placed object, `[size, size]` uint8."""
    thing, scale = placed.thing, placed.size * size / 2
    cx, cy, sign = placed.x * size, placed.y * size, -1.0 if placed.flip else 1.0

    def to_canvas(x: float, y: float) -> tuple[float, float]:
        return cx + sign * x * scale, cy + y * scale

    canvas = Image.new("L", (size, size), EMPTY)
    draw = ImageDraw.Draw(canvas)
    _paint(draw, PARTS[thing.kind], to_canvas, scale)
    roles = np.array(canvas)
    if thing.pattern != "plain":
        rows, columns = np.mgrid[0:size, 0:size]
        marked = _pattern(thing, sign * (columns - cx) / scale, (rows - cy) / scale)
        roles[marked & (roles == BODY)] = PATTERN
    extra = _accessory_parts(thing.kind, thing.accessory)
    if extra:
        canvas = Image.fromarray(roles)
        _paint(ImageDraw.Draw(canvas), extra, to_canvas, scale)
        roles = np.array(canvas)
    return roles


def _edges(ids: np.ndarray, width: int) -> np.ndarray:
    edge = np.zeros(ids.shape, dtype=bool)
    for shift in range(1, width + 1):
        edge[shift:] |= ids[shift:] != ids[:-shift]
        edge[:, shift:] |= ids[:, shift:] != ids[:, :-shift]
    return edge


def _background(scene, size: int) -> np.ndarray:
    canvas = Image.new("RGB", (size, size), scene.background_colour)
    draw, at = ImageDraw.Draw(canvas), lambda fraction: round(fraction * size)
    if scene.background == "beach":
        draw.rectangle([0, 0, size, at(0.45)], fill=(150, 205, 240))
        draw.rectangle([0, at(0.45), size, at(0.62)], fill=(45, 120, 190))
        draw.rectangle([0, at(0.62), size, size], fill=(236, 214, 160))
    elif scene.background == "meadow":
        draw.rectangle([0, 0, size, at(0.55)], fill=(165, 215, 245))
        draw.rectangle([0, at(0.55), size, size], fill=(110, 180, 80))
    elif scene.background == "snow":
        draw.rectangle([0, 0, size, at(0.55)], fill=(190, 205, 225))
        draw.polygon(
            [(at(0.0), at(0.6)), (at(0.25), at(0.25)), (at(0.5), at(0.6)), (at(0.75), at(0.32)),
             (size, at(0.6))], fill=(150, 165, 190)
        )
        draw.rectangle([0, at(0.57), size, size], fill=(246, 249, 253))
    elif scene.background == "night":
        draw.rectangle([0, 0, size, size], fill=(22, 26, 66))
        draw.ellipse([at(0.76), at(0.06), at(0.93), at(0.23)], fill=(245, 240, 200))
        draw.rectangle([0, at(0.72), size, size], fill=(40, 56, 70))
    elif scene.background == "room":
        draw.rectangle([0, 0, size, at(0.68)], fill=(222, 200, 178))
        draw.rectangle([at(0.08), at(0.1), at(0.36), at(0.4)], fill=(200, 228, 246))
        draw.rectangle([0, at(0.68), size, size], fill=(150, 98, 62))
    return np.asarray(canvas, dtype=np.float32)


def _role_colours(thing) -> np.ndarray:
    dark = (30, 28, 34)
    return np.array(
        [(0, 0, 0), thing.body, thing.body, thing.second, thing.pattern_colour, thing.accessory_colour,
         (245, 240, 228), dark],
        dtype=np.float32,
    )


def _apply_style(image, background, object_ids, colours_at, style: Style, line_width: int) -> np.ndarray:
    inside = (object_ids > 0)[..., None]
    if style.paper is not None:
        paper = np.broadcast_to(np.array(style.paper, dtype=np.float32), image.shape)
        image = np.where(inside, (1 - style.fill) * paper + style.fill * image, paper)
    if style.shaded:
        fade = np.linspace(1.1, 0.82, len(image), dtype=np.float32)[:, None, None]
        image = np.where(inside, image * fade, image)
    if style.line is not None or style.line_from_role:
        line = np.array(style.line or (0, 0, 0), dtype=np.float32)
        horizon = (
            _edges(background.sum(-1).astype(np.int32), max(1, round(line_width * 2 / 3))) & ~inside[..., 0]
            if style.paper is not None
            else np.zeros(object_ids.shape, bool)
        )
        drawn = _edges(object_ids, line_width)[..., None]
        tinted = 0.25 * line + 0.75 * np.maximum(colours_at, 70.0) * 1.15
        image = np.where(drawn, tinted if style.line_from_role else line, image)
        faint = 0.5 * line + 0.5 * image if style.line is not None else image + 45.0
        image = np.where(horizon[..., None], faint, image)
    return image


def render(scene, size: int = PICTURE_SIZE, supersampling: int = SUPERSAMPLING) -> np.ndarray:
    """Renders a picture of a scene.

    Args:
        scene: what to draw; its measures are fractions of the picture.
        size: side of the picture in pixels; for mosaics a multiple of `PICTURE_SIZE`.
        supersampling: how many times larger the picture is drawn before it is averaged down.

    Returns:
        `[size, size, 3]` uint8.
    """
    large = size * supersampling
    line_width = round(large / PICTURE_SIZE)
    background = _background(scene, large)
    image, ids = background.copy(), np.zeros((large, large), dtype=np.int32)
    colours_at = np.zeros_like(image)
    for number, placed in enumerate(scene.objects):
        roles = role_map(placed, large)
        colours = _role_colours(placed.thing)[roles]
        there = roles != EMPTY
        image[there], colours_at[there] = colours[there], colours[there]
        ids[there] = roles[there] + len(ROLES) * (number + 1)
    # Lines take the colour of the adjacent object, so colours are first spread by a line's width.
    shifted = np.roll(colours_at, (line_width, line_width), (0, 1))
    spread = np.where(colours_at.any(-1, keepdims=True), colours_at, shifted)
    image = _apply_style(image, background, ids, spread, scene.style, line_width)
    small = image.reshape(size, supersampling, size, supersampling, 3).mean((1, 3))
    if scene.style.tile > 1:
        grout = size // PICTURE_SIZE
        tile = scene.style.tile * grout
        blocks = small.reshape(size // tile, tile, size // tile, tile, 3).mean((1, 3), keepdims=True)
        tiles = np.broadcast_to(blocks, (size // tile, tile, size // tile, tile, 3)).copy()
        tiles[:, :grout] *= 0.72
        tiles[:, :, :, :grout] *= 0.72
        small = tiles.reshape(size, size, 3)
    return small.clip(0, 255).round().astype(np.uint8)
