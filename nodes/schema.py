"""`Schema` and options of inputs for ComfyUI 0.3.64 and later. Fields that the installed version
does not support are dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from comfy_api.latest import io

from .types import EVERYDAY

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def Schema(**fields) -> io.Schema:  # noqa: N802 - node scanners look for a call of this name
    aliases = [*fields.pop("search_aliases", ()), EVERYDAY]      # the name of the extension finds all of them
    given = fields | {"search_aliases": aliases}
    return io.Schema(**{key: value for key, value in given.items() if key in _FIELDS})


def advanced(names: Collection[str], inputs: Sequence[io.Input]) -> list[io.Input]:
    """Marks the named inputs as advanced, so that the page hides them until they are asked for."""
    return [with_options(entry, advanced=True) if entry.id in names else entry for entry in inputs]


def with_options(entry: io.Input, **options) -> io.Input:
    """Adds options for the page to an input. Constructors of earlier ComfyUI take none, its inputs do."""
    entry.extra_dict = {**entry.extra_dict, **options}
    return entry
