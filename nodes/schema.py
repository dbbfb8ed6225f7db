"""`Schema` and the input option `ADVANCED` for ComfyUI 0.3.64 and later. Fields that the installed version
does not support are dropped.
"""

import dataclasses
import inspect

from comfy_api.latest import io

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def Schema(**fields) -> io.Schema:  # noqa: N802 - node scanners look for a call of this name
    return io.Schema(**{key: value for key, value in fields.items() if key in _FIELDS})


# Marks an input as advanced, so that the page hides it by default. Earlier ComfyUI has no argument for it,
# but hands further options to the page, which knows this one.
ADVANCED: dict = ({"advanced": True} if "advanced" in inspect.signature(io.Float.Input).parameters
                  else {"extra_dict": {"advanced": True}})
