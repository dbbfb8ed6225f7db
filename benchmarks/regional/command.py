"""The command `regional`."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from ...core.errors import ConceptError
from ..continual.runs import BASE
from ..report import Result, load_or_make, require_at_least, say, write_result


def add_commands(commands) -> None:
    parser = commands.add_parser("regional", help="what regions cost, and whether they keep concepts apart")
    parser.add_argument("--json", dest="file", type=Path, required=True,
                        help="where the result goes; finished parts are saved beside it")
    parser.add_argument("--only", choices=("cost", "pictures", "quality"),
                        help="one of the parts: cost of a step, cost of whole pictures (with --comfyui), "
                             "quality (default: all)")
    parser.add_argument("--pictures", type=int, default=16,
                        help="per way and number of regions (default %(default)s)")
    parser.add_argument("--learn-steps", type=int, default=600,
                        help="per concept of the embedded base (default %(default)s)")
    parser.add_argument("--comfyui", type=Path,
                        help="folder of a ComfyUI in which the cost is measured (default: a UNet alone)")
    parser.add_argument("--pixels", type=int, default=512,
                        help="side of the picture whose cost is measured (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4,
                        help="of each measurement of the cost; the first is left out (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2,
                        help="measurements of every way's cost (default %(default)s)")
    parser.set_defaults(run=regional)


def _quality(options: Namespace, folder: Path) -> dict:
    from ...core.demo.base import load_base
    from ...core.demo.bases import file_of
    from . import quality

    backbone, steps = load_base(file_of(BASE)), options.learn_steps
    learned = {method: quality.bank_name(method, steps) for method in quality.RANKS}
    files = {method: folder / f"{method}-{name}.safetensors" for method, name in learned.items()}
    banks = {method: quality.learned_bank(backbone, method, file, steps, say)
             for method, file in files.items()}
    judge = quality.judge(backbone)

    def run(way: str, count: int) -> dict:
        method, pictures = quality.method_of(way), options.pictures
        path = folder / f"{way}-k{count}-p{pictures}-{learned[method]}.json"
        bank = banks[method]
        row = load_or_make(path, lambda: quality.quality(backbone, bank, judge, way, count, pictures))
        right, missing = (f"{100 * row[name]:.0f} %" for name in ("hit_rate", "missing"))
        say(f"{way}, {count} regions: {right} right, {missing} missing")
        return row

    return {way: {str(count): run(way, count) for count in quality.GRIDS} for way in quality.WAYS}


def _pictures(options: Namespace) -> dict:
    from . import cost, pictures

    host = cost.comfyui_cost(options.comfyui, options.pixels, options.steps)
    return {"pixels": options.pixels, "rounds": options.rounds,
            **pictures.measure(host, options.rounds, say)}


def _cost(options: Namespace) -> dict:
    from . import cost

    if options.comfyui is None:
        host, measured = "the UNet alone", cost.diffusers_cost(options.pixels, options.steps)
    else:
        host, measured = "ComfyUI", cost.comfyui_cost(options.comfyui, options.pixels, options.steps)
    return {"host": host, "pixels": options.pixels, **cost.measure(measured, options.rounds, say)}


def regional(options: Namespace) -> Result:
    """Measures cost and quality of regions. Parts that are not requested stay unchanged in the file."""
    require_at_least(options, pictures=1, learn_steps=1, pixels=64, steps=2, rounds=1)
    result = json.loads(options.file.read_text()) if options.file.exists() else {}
    if options.only == "pictures" and options.comfyui is None:
        raise ConceptError("--only pictures needs --comfyui: the UNet alone has no crop denoising")
    if options.only in (None, "cost"):
        result["cost"] = _cost(options)
    if options.only in (None, "pictures") and options.comfyui is not None:
        result["pictures"] = _pictures(options)
    if options.only in (None, "quality"):
        result["quality"] = _quality(options, options.file.with_suffix(".cells"))
    write_result(options.file, result)
    return result, _lines(result)


def _lines(result: dict) -> list[str]:
    """The readable result: a line per cost, and a table of quality."""
    lines = [f"{kind} {count}: {row['over_plain']:.3f} of a plain step"
             for kind in ("regions", "routed", "prompt", "hooks")
             for count, row in result.get("cost", {}).get(kind, {}).items()]
    for layout, costs in result.get("pictures", {}).get("pictures", {}).items():
        figures = ", ".join(f"{cost:.2f} with {settings}" for settings, cost in costs.items())
        lines.append(f"picture of {layout} (crop denoising / isolation): {figures} of a plain picture")
    quality = result.get("quality", {})
    if quality:
        counts = next(iter(quality.values()))
        lines.append(f"| right / missing, % | {' | '.join(f'K = {count}' for count in counts)} |")
        lines.append("|---" * (len(counts) + 1) + "|")
    for way, rows in quality.items():
        figures = [f"{100 * row['hit_rate']:.0f} / {100 * row['missing']:.0f}" for row in rows.values()]
        lines.append(f"| {way} | {' | '.join(figures)} |")
    return lines
