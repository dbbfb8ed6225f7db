"""`Schema` for every ComfyUI from 0.3.64 on, and `ADVANCED` for its inputs: what a version does not know yet
is left out."""

import dataclasses
import inspect

from comfy_api.latest import io

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def Schema(**fields) -> io.Schema:  # noqa: N802 - node scanners look for a call of this name
    return io.Schema(**{key: value for key, value in fields.items() if key in _FIELDS})


# An input that most people need not see
ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Float.Input).parameters else {}
