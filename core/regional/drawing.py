"""Parses the regions of a drawing (untrusted JSON) and draws their outlines over a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..charts import outlines_picture
from ..errors import ConceptError
from ..images import Colour, colour
from .regions import Region, region_mask

REGIONS = 32  # at most
PROMPT, NAME, WHOLE = 4_000, 100, 1_000_000  # most characters of a prompt, a name, the text
KEYS = ("name", "prompt", "box", "color", "negative", "strength", "start", "end", "feather", "on")
SHOWN = 60  # characters of a wrong value to quote in a message


@dataclass(frozen=True)
class DrawnRegion(Region):
    """A region with its display name ("" for none) and its colour as #rrggbb."""

    name: str = ""
    colour: str = ""


def parse_regions(text: str) -> list[Region]:
    """Returns the active regions of a drawing in order. Inactive regions are checked too.

    Args:
        text: JSON: a list of objects {"prompt": str, "box": [left, top, right, bottom] as fractions of the
            picture}. They may also hold "name", "color" (#rrggbb), "negative", "strength", "start", "end",
            "feather" (as in Region) and "on" (false = inactive).

    Raises:
        ConceptError: The text is not such a list. The message names the region and the allowed values.
    """
    items = _read(text)
    if not isinstance(items, list):
        raise ConceptError(f"the drawing is {_shown(items)}; "
                           "allowed: a list of regions in JSON, such as [] for none")
    if len(items) > REGIONS:
        raise ConceptError(f"the drawing has {len(items)} regions; allowed: at most {REGIONS}")
    regions = [_Item(item, number).region() for number, item in enumerate(items, 1)]
    return [region for region in regions if region is not None]


def _read(text: str) -> object:
    """The value of a JSON text. Python's parser also accepts NaN and Infinity, which are not JSON, and raises
    RecursionError on deep nesting.
    """
    if len(text) > WHOLE:
        raise ConceptError(f"the drawing has {len(text):,} characters; allowed: at most {WHOLE:,}")
    if not text.strip():
        return []
    try:
        return json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConceptError(f"the drawing is not readable JSON: {error.msg.lower()} at {where}; "
                           "allowed: a list of regions") from None
    except ConceptError:  # raised by _no_number
        raise
    except (ValueError, RecursionError):  # a number with thousands of digits, or thousands of nested lists
        raise ConceptError("the drawing has a number that is too long or nesting that is too deep; "
                           "allowed: a list of regions in JSON") from None


def _no_number(name: str) -> NoReturn:
    raise ConceptError(f"the drawing holds {name}, which is not a JSON number; "
                       "allowed: plain numbers such as 0.5")


def _shown(value: object) -> str:
    """A value as JSON, shortened for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    except RecursionError:
        text = "nested too deeply to be shown"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


class _Item:
    """One object of the list. Every message names its number, and its name where it has one."""

    def __init__(self, item: Any, number: int) -> None:
        self.item, self.number, self.which = item, number, f"region {number}"
        if not isinstance(item, dict):
            raise ConceptError(f"{self.which} of the drawing is {_shown(item)}; "
                               f"allowed: an object with {', '.join(KEYS)}")
        self.name = self.text("name", NAME)
        if self.name.strip():
            self.which += f" ({' '.join(self.name.split())})"
        unknown = [key for key in item if key not in KEYS]
        if unknown:
            raise ConceptError(f"{self.which} of the drawing has {_shown(unknown[0])}; "
                               f"allowed: {', '.join(KEYS)}")

    def region(self) -> DrawnRegion | None:
        """The region; None when it is off. An empty prompt is an error only when it is on."""
        prompt, shade, on = self.text("prompt", PROMPT, needed=True), self.shade(), self.item.get("on", True)
        if not isinstance(on, bool):
            raise self.wrong("on", on, "true or false")
        start, end = self.fraction("start", 0.0), self.fraction("end", 1.0)
        if start > end:
            raise self.wrong("start", start, f"at most its end, {end:g}")
        left, top, right, bottom = self.box()
        negative, strength = self.text("negative", PROMPT), self.fraction("strength", 1.0)
        feather = self.fraction("feather", 0.0, 0.5)
        if not on:
            return None
        if not prompt.strip():
            raise ConceptError(f"the prompt of {self.which} is empty; say what it should show")
        box = (top, left, bottom, right)
        return DrawnRegion(prompt, box, None, negative, strength, start, end, feather, self.name, shade)

    def wrong(self, key: str, value: object, allowed: str) -> ConceptError:
        return ConceptError(f"the {key} of {self.which} is {_shown(value)}; allowed: {allowed}")

    def text(self, key: str, limit: int, needed: bool = False) -> str:
        value = self.item.get(key, None if needed else "")
        if value is None and key not in self.item:
            raise ConceptError(f"{self.which} of the drawing has no {key}; every region needs one")
        if not isinstance(value, str):
            raise self.wrong(key, value, f"a text of at most {limit:,} characters")
        if len(value) > limit:
            raise ConceptError(f"the {key} of {self.which} has {len(value):,} characters; "
                               f"allowed: at most {limit:,}")
        if any("\ud800" <= sign <= "\udfff" for sign in value):  # a lone surrogate cannot be encoded
            raise self.wrong(key, value, "a text of whole characters")
        return value

    def fraction(self, key: str, default: float, most: float = 1.0) -> float:
        value = self.item.get(key, default)
        if not _is_number(value, most):
            raise self.wrong(key, value, f"a number from 0 to {most:g}")
        return float(value)

    def box(self) -> tuple[float, float, float, float]:
        """The region's left, top, right and bottom."""
        if "box" not in self.item:
            raise ConceptError(f"{self.which} of the drawing has no box; every region needs one")
        box = self.item["box"]
        allowed = "[left, top, right, bottom], numbers from 0 to 1 with left < right and top < bottom"
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value, 1.0) for value in box)):
            raise self.wrong("box", box, allowed)
        left, top, right, bottom = map(float, box)
        if not (left < right and top < bottom):
            raise self.wrong("box", box, allowed)
        return left, top, right, bottom

    def shade(self) -> str:
        """The displayed colour: the region's own, else the one for its number."""
        if "color" not in self.item:
            return "#" + "".join(f"{part:02x}" for part in colour(self.number - 1))
        value = self.item["color"]
        if not (isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value)):
            raise self.wrong("color", value, "#rrggbb, such as #4c76db")
        return value.lower()


def _is_number(value: object, most: float) -> bool:
    """Whether the value is a number in 0..most. Excludes booleans and NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most


def with_outlines(images: Tensor, regions: Sequence[Region]) -> Tensor:
    """Pictures `[B, H, W, C]` in 0..1 with each region's outline and label. Further channels do not change.
    """
    if not regions:
        return images
    height, width = images.shape[1:3]
    # without soft edges, so that outlines are sharp
    masks = torch.stack([region_mask(replace(region, feather=0.0), height, width) for region in regions])
    labels, colours = zip(*(_shown_as(index, region) for index, region in enumerate(regions)), strict=True)
    layer = outlines_picture(masks, labels, colours).to(images)
    ink, alpha = layer[..., :3], layer[..., 3:]
    return torch.cat([images[..., :3] * (1 - alpha) + ink * alpha, images[..., 3:]], -1)


def _shown_as(index: int, region: Region) -> tuple[str, Colour]:
    """A region's label and colour: from its drawing, else its prompt and the colour for its number."""
    if isinstance(region, DrawnRegion):
        red, green, blue = (int(region.colour[i:i + 2], 16) for i in (1, 3, 5))
        return region.name.strip() or region.prompt, (red, green, blue)
    return region.prompt, colour(index)
