"""The commands `training`, `memory`, `aggregation` and `bank`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ...core.errors import ConceptError
from ...core.files import write_atomically
from ..report import Result, read_result, require_at_least, say, write_result


def add_commands(commands) -> None:
    of_training = commands.add_parser("training",
                                      help="the cost of a training step, compared with other trainers")
    of_aggregation = commands.add_parser("aggregation",
                                         help="the cost of many concepts between a prompt and a picture")
    of_bank = commands.add_parser("bank", help="the cost of many concepts in a file")
    of_memory = commands.add_parser("memory", help="planned and measured memory of learning")
    for parser, command in ((of_training, training), (of_aggregation, aggregation), (of_bank, bank),
                            (of_memory, memory)):
        parser.set_defaults(run=command)
        parser.add_argument("--json", dest="file", type=Path, required=True, help="where the result goes")
        parser.add_argument("--comfyui", type=Path,
                            help="folder of a ComfyUI to measure in (default: diffusers)")
        parser.add_argument("--pixels", type=int, default=256,
                            help="side of the picture (default %(default)s)")
        parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
        parser.add_argument("--rounds", type=int, default=2,
                            help="measurements of everything (default %(default)s)")
    of_training.add_argument("--steps", type=int, default=4,
                             help="of each measurement; the first one is left out (default %(default)s)")
    of_training.add_argument("--profile", type=Path, help="also write a profile of a step to this text file")
    of_training.add_argument("--shape", choices=("sd15", "sdxl"), default="sd15",
                             help="of the checkpoint (default %(default)s)")
    of_training.add_argument("--checkpointing", action="store_true",
                             help="recompute activations instead of storing them")
    of_training.add_argument("--rows",
                             help='what to measure, for example "bound; cidm, one copy" (default: all)')
    of_training.add_argument("--alone", action="store_true",
                             help="no banks of a hundred concepts, no other trainers")
    of_memory.add_argument("--shape", choices=("sd15", "sdxl", "anima"), default="sd15",
                           help="of the checkpoint (default %(default)s); results of others stay in the file")
    of_memory.add_argument("--base", choices=("float32", "bfloat16", "float8_e4m3fn"), default="float32",
                           help="type of the base's weights (default %(default)s)")
    of_memory.add_argument("--blocks", type=int, default=0,
                           help="of a transformer, and of SDXL where it has ten (default: all)")
    of_memory.add_argument("--steps", type=int, default=2, help="with each measure (default %(default)s)")
    of_memory.set_defaults(checkpointing=False)
    for parser, count in ((of_aggregation, 100), (of_bank, 1000)):
        parser.add_argument("--concepts", type=int, default=count, help="in the bank (default %(default)s)")
        parser.set_defaults(shape="sd15", checkpointing=False)


def _host(options: Namespace):
    """A model with random weights, in ComfyUI if its folder is given, else in diffusers."""
    from .training import Setup

    setup = Setup(options.shape, options.pixels, options.precision, options.checkpointing,
                  getattr(options, "base", ""), getattr(options, "blocks", 0))
    if options.comfyui is None:
        from .rivals import DiffusersHost

        return DiffusersHost(setup)
    from . import standalone

    standalone.start(options.comfyui)
    from .comfy_training import ComfyHost

    return ComfyHost(setup)


def training(options: Namespace) -> Result:
    """Measures the cost of a training step, relative to its forward passes and to other trainers."""
    from . import training as training_cost

    require_at_least(options, pixels=64, steps=2, rounds=1)
    names = [name.strip() for name in (options.rows or ";".join(training_cost.ROWS)).split(";")]
    unknown = [name for name in names if name not in training_cost.ROWS]
    if unknown:
        raise ConceptError(f"rows names {unknown[0]!r}; allowed: {'; '.join(training_cost.ROWS)}")
    host = _host(options)
    if options.profile is not None:
        tables = [training_cost.profile(host, row) for row in ("bound", "cidm")]
        write_atomically(options.profile, lambda temporary: temporary.write_text("\n".join(tables)))
    result = {"host": "diffusers" if options.comfyui is None else "ComfyUI",
              **training_cost.measure(host, options.steps, options.rounds, say, names, options.alone)}
    write_result(options.file, result)
    others = [name.removeprefix("faster_than_") for name in next(iter(result["rows"].values()))
              if name.startswith("faster_than_")]
    lines = [f"{name}: "
             f"{row['step_seconds']:.2f} s a step, {row['step_over_forwards']:.2f} of its forward passes, "
             f"{row['step_over_unet']:.2f} of the UNet's"
             + "".join(f", {row[f'faster_than_{other}']:.1f} times as fast as {other}" for other in others)
             + (f"; with 100 concepts in the bank {row['hundred_over_one']:.3f}" if "hundred_over_one" in row
                else "")
             for name, row in result["rows"].items()]
    return result, lines


def memory(options: Namespace) -> Result:
    """Measures the peak memory of learning, and compares it with the plan."""
    from . import memory as memory_cost

    require_at_least(options, pixels=64, steps=1, blocks=0)
    known = read_result(options.file)
    found = memory_cost.measure(_host(options), options.steps, say)
    result = known | {options.shape: {"host": "diffusers" if options.comfyui is None else "ComfyUI", **found}}
    write_result(options.file, result)
    return result, memory_cost.table(result)


def aggregation(options: Namespace) -> Result:
    """Measures the cost of many concepts when sampling a prompt."""
    from . import scale as scale_cost

    require_at_least(options, concepts=2, rounds=1)
    result = scale_cost.aggregation(_host(options).backbone, options.concepts, options.rounds)
    write_result(options.file, result)
    lines = [f"{mode}: {seconds:.2f} s from prompt to weights"
             for mode, seconds in result["apply_seconds"].items()]
    return result, [*lines, f"the sum alone, concept by concept: {result['naive_seconds']:.2f} s",
                    "a forward pass with them in the weights: "
                    f"{result['sampling_over_plain']:.3f} of a plain one"]


def bank(options: Namespace) -> Result:
    """Measures the cost of many concepts in a bank file."""
    from tempfile import TemporaryDirectory

    from . import scale as scale_cost

    require_at_least(options, concepts=1, rounds=1)
    with TemporaryDirectory() as folder:
        result = scale_cost.bank(_host(options).backbone, options.concepts, Path(folder), options.rounds)
    write_result(options.file, result)
    return result, [f"{name.removesuffix('_seconds')}: {result[name]:.3f} s" for name in result
                    if name.endswith("_seconds")] + [
        f"one concept: {result['concept_mb']:.2f} MB"]
