"""Helpers for node inputs: lists, lines of text, and inputs generated from configuration fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from comfy_api.latest import io

from ..core.errors import ConceptError
from ..core.regional.regions import OVERLAPS
from ..core.settings import settings_of


def first(value: Any) -> Any:
    """The value of an input that arrives as a list. Nodes that accept lists of pictures get all inputs as
    lists, and as `(None,)` while another node has yet to give the value.
    """
    return value[0] if isinstance(value, list | tuple) and value else value


def valid(*checks: Callable[[], object]) -> bool | str:
    """What ComfyUI wants of `validate_inputs`: True, or the sentences of all checks that raise a
    ConceptError.

    ComfyUI gives the same answer to each input that the node's `validate_inputs` takes, so the sentences say
    which input they mean.
    """
    sentences: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except ConceptError as error:
            sentences[str(error)] = None
    return "; and ".join(sentences) or True


def fingerprint(compute: Callable[[], object]) -> str | float:
    """What ComfyUI wants of `fingerprint_inputs`: a text that differs after a change.

    It is NaN, which is never equal, while another node has yet to give the input, or where a file is gone:
    the node then runs and says what is wrong.
    """
    try:
        return str(compute())
    except (ConceptError, OSError):
        return float("nan")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Checks an input that `validate_inputs` takes; ComfyUI then no longer checks it. None: another node
    gives the value later. Raises ConceptError if it is not among the choices."""
    if value is not None and value not in choices:
        raise ConceptError(f"'{name}' is {value!r}; allowed: {', '.join(map(str, choices))}")


def lines_of(texts: Iterable[str] | None) -> list[str]:
    """The stripped, non-empty lines of several texts."""
    return [line.strip() for text in texts or () for line in text.splitlines() if line.strip()]


def setting_input(config: type, name: str, **changes: Any) -> io.Input:
    """Builds the input for a configuration field.

    Id, type, default, range, choices and tooltip come from the field (see core.settings). changes: keyword
    arguments of ComfyUI's input that override these.
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
    """Builds the inputs for some configuration fields, in order. changes: field -> overrides, see
    `setting_input`.
    """
    return [setting_input(config, name, **changes.get(name, {})) for name in names]


def overlap_input() -> io.Input:
    return io.Combo.Input("overlap", options=list(OVERLAPS), default="average", optional=True,
                          tooltip="Where regions overlap: mix them evenly, let the first lie on top, or give "
                                  "each place to the region whose centre is nearest.")


def crop_denoising_input(default: float, advice: str) -> io.Input:
    """The input `solo`. advice: the end of its tooltip."""
    return io.Float.Input("solo", display_name="crop denoising", default=default, min=0.0, max=1.0,
                          step=0.05, optional=True,
                          tooltip="Share of the first steps in which each region is denoised "
                                  f"alone, so that its concept appears. {advice}")


def isolation_input() -> io.Input:
    return io.Float.Input("isolation", default=0.0, min=0.0, max=1.0, step=0.05, optional=True,
                          tooltip="Share of the first steps in which regions do not see each other in "
                                  "self-attention. Concepts mix less, and a step is faster. 0 = off.")
