"""The commands of one measurement each: `photo-encoder`, `one-class`, `compose`, `large-bank`, `neurons`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ...core.errors import ConceptError
from ..report import Result, add_embedded_base, numbers, require_at_least, say, write_result
from .runs import BASE

DRAWN = "where the result goes; a chart is drawn beside it"
RUNS = "folder of finished runs, which are not repeated (default: the result's name with the suffix .cells)"


def add_commands(commands) -> None:
    """Adds the commands to a parser's subcommands."""
    _add_photo_encoder(commands)
    _add_one_class(commands)
    _add_compose(commands)
    _add_large_bank(commands)
    parser = commands.add_parser("neurons", help="how many base neurons do prompts share?")
    parser.add_argument("--json", dest="file", type=Path, required=True, help=DRAWN)
    parser.add_argument("--draws", type=int, default=16, help="gradients per prompt (default %(default)s)")
    parser.set_defaults(run=neurons)


def rows_of(text: str) -> list[tuple[str, str]]:
    """Method and overrides of every row; all methods for an empty text."""
    from ...core.methods import METHODS
    from .plan import all_methods

    rows = [name.strip().partition("+")[::2] for name in text.split(",") if name.strip()]
    unknown = [name for name, _ in rows if name not in METHODS]
    if unknown:
        raise ConceptError(f"unknown method {unknown[0]!r}; known: {', '.join(sorted(METHODS))}")
    return rows or all_methods()


def methods_of(text: str) -> list[str]:
    """Methods of a command that takes no overrides; all for an empty text."""
    rows = rows_of(text)
    overridden = [f"{name}+{overrides}" for name, overrides in rows if overrides]
    if overridden:
        raise ConceptError(f"methods names {overridden[0]!r}; allowed: methods without overrides")
    return [name for name, _ in rows]


def _add_photo_encoder(commands) -> None:
    parser = commands.add_parser("photo-encoder", help="how well the encoder for photos tells concepts apart")
    parser.add_argument("--json", dest="file", type=Path, required=True, help="where the result goes")
    parser.add_argument("--data", type=Path, required=True,
                        help="folder with tasks.json and photos, such as CIFC's")
    parser.set_defaults(run=photo_encoder)


def photo_encoder(options: Namespace) -> Result:
    """Measures the encoder for photos on the concepts of a folder."""
    from ...core.evaluation.photo_encoder import PhotoEncoder
    from .photo_encoder import lines_of, told_apart
    from .photos import read_tasks

    tasks = read_tasks(options.data)
    result = {"encoder": "EfficientNet-Lite2", **told_apart(PhotoEncoder(), tasks)}
    write_result(options.file, result)
    return result, lines_of(result)


def _add_drawn(parser: ArgumentParser, methods: str) -> None:
    """Adds the flags of a command whose methods draw pictures. methods: the default."""
    add = parser.add_argument
    add("--json", dest="file", type=Path, required=True, help="where the result goes, and pictures beside it")
    add("--runs", type=Path, help=RUNS)
    add("--methods", default=methods, help="comma separated (default %(default)s)")


def _add_one_class(commands) -> None:
    parser = commands.add_parser("one-class", help="many individuals of one class in one bank, in all pairs")
    add = parser.add_argument
    _add_drawn(parser, "slots,lora")
    add("--class", dest="kind", default="dog", help="what they are (default %(default)s)")
    add("--count", type=int, default=10, help="number of individuals (default %(default)s)")
    add_embedded_base(parser)
    parser.set_defaults(run=one_class)


def one_class(options: Namespace) -> Result:
    """Learns individuals of one class one after another and draws all pairs of them."""
    from .one_class import one_class as perform
    from .one_class import table

    result = perform(methods_of(options.methods), options.kind, options.count, options.file,
                     options.runs or options.file.with_suffix(".cells"), options.base, say)
    return result, table(result).split("\n")


def _add_compose(commands) -> None:
    parser = commands.add_parser("compose", help="a style of a thing, and a thing that wears another one")
    add = parser.add_argument
    _add_drawn(parser, "slots,bound,lora")
    add("--seed", default="0", help="seeds, comma separated (default %(default)s)")
    add("--steps", type=int, default=200, help="of learning each concept (default %(default)s)")
    add_embedded_base(parser, BASE)
    parser.set_defaults(run=compose)


def compose(options: Namespace) -> Result:
    """Learns a dog, a style and a hat, and draws the style of the dog and the dog with the hat."""
    from .compose import compose as perform
    from .compose import lines_of

    require_at_least(options, steps=1)
    result = perform(methods_of(options.methods), numbers(options.seed, "seed"), options.steps, options.file,
                     options.runs or options.file.with_suffix(".cells"), options.base, say)
    return result, lines_of(result)


def _add_large_bank(commands) -> None:
    parser = commands.add_parser("large-bank", help="many concepts in one bank: the same pictures and cost?")
    add = parser.add_argument
    add("--json", dest="file", type=Path, required=True, help="where the result goes")
    add("--method", choices=("slots", "bound", "lora"), default="slots",
        help="how the concepts are learned (default %(default)s)")
    add("--concepts", type=int, default=200, help="in the large bank (default %(default)s)")
    add("--steps", type=int, default=200, help="of learning each of two (default %(default)s)")
    add("--rounds", type=int, default=5, help="measurements of everything (default %(default)s)")
    add_embedded_base(parser, BASE)
    parser.set_defaults(run=large_bank)


def large_bank(options: Namespace) -> Result:
    """Compares a bank of many concepts with one of two: pictures, and seconds."""
    from tempfile import TemporaryDirectory

    from .large_bank import large_bank as measure
    from .large_bank import lines_of

    require_at_least(options, concepts=3, steps=1, rounds=1)
    with TemporaryDirectory() as folder:
        result = measure(options.method, options.concepts, options.steps, options.rounds, Path(folder),
                         options.base)
    write_result(options.file, result)
    return result, lines_of(result)


def neurons(options: Namespace) -> Result:
    """Measures how many base neurons prompts share; writes JSON and a chart next to it."""
    from ...core.demo.base import load_base
    from ...core.demo.bases import file_of
    from .neuron_sharing import draw, neuron_sharing

    result = neuron_sharing(load_base(file_of(BASE)), draws=options.draws)
    write_result(options.file, result)
    draw(options.file.with_suffix(".png"), result)
    shares, half, same = result["shares"], result["general"], result["same_prompt"]
    last = result["prompts"][-1]
    lines = [f"{name}: {100 * shares[name][-1]:.0f} % shared by all {last} prompts, "
             f"{100 * half[name][-1]:.0f} % by half of them, "
             f"{100 * same[name]:.0f} % by another picture of the same prompt" for name in shares]
    return result, [*lines, f"CNS reports about {100 * result['paper']:.0f} %"]
