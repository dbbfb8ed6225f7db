"""The command `regional`."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from ..report import Result, load_or_make, require_at_least, say, write_result


def add_commands(commands) -> None:
    parser = commands.add_parser("regional", help="what regions cost, and whether they keep concepts apart")
    parser.add_argument("--json", dest="file", type=Path, required=True, help="where the result goes; parts that are done lie beside it")
    parser.add_argument("--only", choices=("cost", "quality"), help="one of the two parts (default: both)")
    parser.add_argument("--pictures", type=int, default=16, help="per way and number of regions (default %(default)s)")
    parser.add_argument("--learn-steps", type=int, default=600, help="per concept of the embedded base (default %(default)s)")
    parser.add_argument("--comfyui", type=Path, help="folder of a ComfyUI to measure the cost in (default: a UNet alone)")
    parser.add_argument("--pixels", type=int, default=512, help="side of the picture whose cost is measured (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of each look at the cost, the first is left out (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="looks at the cost of every way (default %(default)s)")
    parser.set_defaults(run=regional)


def _regional_quality(options: Namespace, folder: Path) -> dict:
    from ...core.demo.base import load_base
    from . import quality

    backbone, steps = load_base(), options.learn_steps
    made = {method: quality.bank_name(method, steps) for method in quality.RANKS}
    banks = {method: quality.learned_bank(backbone, method, folder / f"{method}-{name}.safetensors", steps, say)
             for method, name in made.items()}
    judge, found = quality.judge(backbone), {}
    for way in quality.WAYS:
        method = quality.method_of(way)
        for count in quality.GRIDS:
            path = folder / f"{way}-k{count}-p{options.pictures}-{made[method]}.json"
            row = load_or_make(path, lambda way=way, bank=banks[method], count=count:
                        quality.quality(backbone, bank, judge, way, count, options.pictures))
            found.setdefault(way, {})[str(count)] = row
            say(f"{way}, {count} regions: {100 * row['hit_rate']:.0f} % right, {100 * row['missing']:.0f} % missing")
    return found


def _regional_cost(options: Namespace) -> dict:
    from . import cost as regional_cost

    where = "the UNet alone" if options.comfyui is None else "ComfyUI"
    cost = (regional_cost.diffusers_cost(options.pixels, options.steps) if options.comfyui is None
            else regional_cost.comfyui_cost(options.comfyui, options.pixels, options.steps))
    return {"host": where, "pixels": options.pixels, **regional_cost.measure(cost, options.rounds, say)}


def regional(options: Namespace) -> Result:
    """What regions cost and whether they keep concepts apart. A part that is not asked for stays what it was in the file."""
    require_at_least(options, pictures=1, learn_steps=1, pixels=64, steps=2, rounds=1)
    result = json.loads(options.file.read_text()) if options.file.exists() else {}
    if options.only != "quality":
        result["cost"] = _regional_cost(options)
    if options.only != "cost":
        result["quality"] = _regional_quality(options, options.file.with_suffix(".cells"))
    write_result(options.file, result)
    lines = [f"{kind} {count}: {row['over_plain']:.3f} of a plain step" for kind in ("regions", "routed", "prompt", "hooks")
             for count, row in result.get("cost", {}).get(kind, {}).items()]
    quality = result.get("quality", {})
    if quality:
        counts = next(iter(quality.values()))
        lines += [f"| right / missing, % | {' | '.join(f'K = {count}' for count in counts)} |", "|---" * (len(counts) + 1) + "|"]
    for way, rows in quality.items():
        cells = [f"{100 * row['hit_rate']:.0f} / {100 * row['missing']:.0f}" for row in rows.values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return result, lines
