"""Inputs that come from elsewhere: from lists, from lines of a text, from the fields of a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from comfy_api.latest import io

from ..core.settings import settings_of


def first(value: Any) -> Any:
    """The value of an input that arrives as a list, as all do at nodes that take lists of pictures."""
    return value[0] if isinstance(value, list) and value else value


def lines_of(texts: Iterable[str] | None) -> list[str]:
    """The lines of some texts, without empty ones and without space around them."""
    return [line.strip() for text in texts or () for line in text.splitlines() if line.strip()]


def setting_input(config: type, name: str, **changes: Any) -> io.Input:
    """The input for a field of a configuration.

    Its id, type, default, range, choices and tooltip are the field's (see core.settings); changes: what the
    node has otherwise, in the words of ComfyUI's inputs.
    """
    entry = settings_of(config)[name]
    given: dict[str, Any] = {"default": entry.default, "tooltip": entry.help}
    if entry.choices:
        return io.Combo.Input(name, **given | {"options": list(entry.choices)} | changes)
    if isinstance(entry.default, bool):
        return io.Boolean.Input(name, **given | changes)
    given |= {"min": entry.low, "max": entry.high, "step": entry.step}
    return (io.Int if isinstance(entry.default, int) else io.Float).Input(name, **given | changes)


def setting_inputs(config: type, names: Iterable[str], **changes: dict[str, Any]) -> list[io.Input]:
    """The inputs for some fields of a configuration, in order; changes: field -> as in `setting_input`."""
    return [setting_input(config, name, **changes.get(name, {})) for name in names]
