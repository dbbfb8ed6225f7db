"""The command `gpu`."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ...core.errors import ConceptError
from ..report import Result, read_result, require_at_least, say, write_result

Parts = dict[str, Callable[[], dict]]


def add_commands(commands) -> None:
    parser = commands.add_parser("gpu", help="everything that needs a graphics card, within a few minutes")
    parser.set_defaults(run=gpu)
    parser.add_argument("--json", dest="file", type=Path, required=True,
                        help="where the result goes; parts that it has are not measured again")
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI")
    parser.add_argument("--minutes", type=float, default=8.0,
                        help="no part begins later than this (default %(default)s)")
    parser.add_argument("--small", action="store_true",
                        help="a rehearsal with narrow models and small pictures, also without a card")
    parser.add_argument("--steps", type=int, default=10, help="of each measurement (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3,
                        help="measurements of regions and heads (default %(default)s)")


def _parts(options: Namespace) -> Parts:
    """The parts by name, in the order in which they are measured."""
    from ..cost import standalone

    standalone.start(options.comfyui)
    from . import parts

    learning: Parts = {name: partial(parts.learning, setup, options.steps)
                       for name, setup in parts.setups(options.small).items()}
    pixels = 64 if options.small else 512
    return {"sd15": learning.pop("sd15"),
            "regions": lambda: parts.regions(pixels, options.small, options.steps + 1, options.rounds),
            "heads": lambda: parts.heads(options.rounds, options.small), **learning}


def gpu(options: Namespace) -> Result:
    """Measures all parts that the time allows, and says which are left."""
    require_at_least(options, steps=1, rounds=1)
    if not 0 < options.minutes <= 60:
        raise ConceptError(f"minutes is {options.minutes:g}; allowed: more than 0, up to 60")
    if not torch.cuda.is_available() and not options.small:
        raise ConceptError("there is no graphics card; allowed without one: --small")
    began = time.perf_counter()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    settings = {"device": device, "small": options.small, "torch": torch.__version__}
    result = _known(options.file, settings) or {**settings, "parts": {}}
    return result, measured(result, _parts(options), 60 * options.minutes - (time.perf_counter() - began),
                            options.file)


def measured(result: dict, parts: Parts, limit: float, file: Path | None) -> list[str]:
    """Runs the parts that a result lacks, and writes it after each one.

    Args:
        result: Gets `parts`, by name, with their seconds; `left`, the names of parts for which there was no
            time; and `failed`, with the reasons.
        limit: Seconds. No part begins later, and none that may take longer than the longest one so far.
        file: Where the result goes.

    Returns:
        A line for each part.
    """
    began, longest = time.perf_counter(), 0.0
    result["left"], result["failed"] = [], {}
    for name, run in parts.items():
        if name in result["parts"]:
            continue
        start = time.perf_counter()
        if start - began + longest >= limit:
            result["left"].append(name)
            continue
        try:
            row = run()
        except (RuntimeError, ConceptError) as error:      # a card's memory may be too small for one part
            result["failed"][name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            taken = time.perf_counter() - start
            result["parts"][name], longest = {**row, "seconds": taken}, max(longest, taken)
            say(f"{name}: {taken:.0f} s")
        write_result(file, result)
    write_result(file, result)
    return lines(result)


def _known(file: Path, settings: dict) -> dict | None:
    """An earlier result with the same settings; None if there is none.

    Raises:
        ConceptError: The file holds a result with other settings.
    """
    known = read_result(file)
    if not known:
        return None
    found = {name: known.get(name) for name in settings}
    if found != settings:
        differs = next(name for name in settings if found[name] != settings[name])
        raise ConceptError(f"'{file}' has a result whose {differs} is {found[differs]!r}, now it is "
                           f"{settings[differs]!r}; name another file")
    return known


def lines(result: dict) -> list[str]:
    """The readable result."""
    return [*(f"{name}: {_shown(row)}" for name, row in result["parts"].items()),
            *(f"{name} failed: {reason}" for name, reason in result["failed"].items()),
            *([f"no time was left for: {', '.join(result['left'])}"] if result["left"] else [])]


def _shown(row: dict) -> str:
    def gb(size: float | None) -> str:
        return "not known" if size is None else f"{size:.2f} GB"

    if "slots" in row:
        ours, peft = row["slots"], row["peft"]
        other = "PEFT is not installed" if peft is None else (
            f"PEFT's LoRA {peft['steps_per_second']:.2f} steps a second, peak {gb(peft['peak_gb'])}")
        return (f"{ours['steps_per_second']:.2f} steps a second, peak {gb(ours['peak_gb'])}, planned "
                f"{gb(ours['planned_gb'])}; {other}")
    if "over_plain" in row:
        return f"{row['over_plain']:.3f} of a plain step with {row['regions']} regions"
    text = "; ".join(f"{shape} " + ", ".join(f"+{more} {wide['over_plain']:.2f}{'' if wide['flash'] else '*'}"
                                             for more, wide in widths.items())
                     for shape, widths in row.items() if isinstance(widths, dict))
    return text + (" (* = without the flash kernel)" if "*" in text else "")
