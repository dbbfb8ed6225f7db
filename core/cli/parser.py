"""The command `continual-concepts`: demo, learn, sample, bank."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from ..bank.concepts import KINDS
from ..conditioning.routing import MODES
from ..data.framing import FRAMINGS
from ..errors import ConceptError
from ..interop.export import DEFAULT_FORMATS, FORMATS
from ..interop.factors import DEFAULT_ERROR, DEFAULT_RANK
from ..methods import DEFAULT, METHODS
from ..training.config import LR_SCHEDULES, PRECISIONS, TrainingConfig


def _setting(text: str) -> tuple[str, object]:
    """`key=value` with the value as JSON where it is JSON, else as text."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", default="embedded", help="'embedded', or the folder of a model in diffusers' layout (SD1.5, SD2, SDXL)")
    parser.add_argument("--device", default="cpu", help="torch device of the base (cpu, cuda, ...)")


def _add_learn(commands) -> None:
    parser = commands.add_parser("learn", help="a folder of photos becomes a concept in a bank")
    parser.add_argument("images", type=Path, help="folder of pictures; <name>.txt beside a picture is its caption")
    parser.add_argument("--bank", type=Path, required=True, help="bank file to grow (made when missing)")
    parser.add_argument("--name", required=True, help="name of the concept: <name> in prompts")
    parser.add_argument("--noun", default="", help="class noun: what it is in ordinary words, e.g. dog")
    parser.add_argument("--words", default="", help="names of the learned words, comma separated, e.g. dog1,dog2 (default: two)")
    parser.add_argument("--kind", choices=KINDS, default="object")
    parser.add_argument("--captions", type=Path, help="folder of captions, when not beside the pictures")
    parser.add_argument("--masks", type=Path, help="folder of masks: white counts, black does not")
    parser.add_argument("--prior", type=Path, help="folder of prior-preservation pictures with captions")
    parser.add_argument("--method", choices=sorted(METHODS), default=DEFAULT)
    parser.add_argument(
        "--set",
        dest="settings",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the method, e.g. rank=8",
    )
    for field in fields(TrainingConfig):
        if field.name in ("framing", "schedule", "precision"):
            choices = {"framing": FRAMINGS, "schedule": LR_SCHEDULES, "precision": tuple(PRECISIONS)}[field.name]
            parser.add_argument(f"--{field.name}", choices=choices, default=None)
        elif field.type == "bool":
            parser.add_argument(f"--{field.name.replace('_', '-')}", action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type={"int": int, "float": float, "str": str}[field.type], default=None
            )
    add_base(parser)


def _add_sample(commands) -> None:
    parser = commands.add_parser("sample", help="pictures from a prompt and a bank")
    parser.add_argument("prompt", help="e.g. 'a photo of <rex> on a beach'")
    parser.add_argument("--bank", type=Path, help="bank file; without one the base alone")
    parser.add_argument("--output", type=Path, default=Path("samples"), help="folder for the pictures")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture, the next ones follow")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=None, help="guidance scale, 1 = none (default 4 for the embedded base, else 7.5)")
    parser.add_argument("--negative", default="")
    parser.add_argument("--size", type=int, default=None, help="side in pixels (default 64 for the embedded base, else 512)")
    parser.add_argument("--mode", choices=MODES, default="sharp", help="how concepts are weighted")
    parser.add_argument("--strength", type=float, default=1.0, help="of the concepts, 0 = the base")
    parser.add_argument(
        "--region", action="append", default=[], metavar="TOP,LEFT,BOTTOM,RIGHT:PROMPT", help="a box in fractions with its own prompt"
    )
    parser.add_argument("--region-noise", action="store_true", help="region noise estimation: one more evaluation per region and step")
    parser.add_argument(
        "--solo", type=float, default=0.4, help="share of the first steps in which every region is drawn alone (default %(default)s)"
    )
    add_base(parser)


def _add_bank(commands) -> None:
    bank = commands.add_parser("bank", help="list, show, remove, rename, merge, verify, export, import, restore")
    bank = bank.add_subparsers(dest="action", required=True)
    for action, help_text in (("list", "one line per concept"), ("verify", "read everything and check it")):
        bank.add_parser(action, help=help_text).add_argument("bank", type=Path)
    show = bank.add_parser("show", help="all that is known of a concept")
    remove = bank.add_parser("remove", help="take a concept out")
    for parser in (show, remove):
        parser.add_argument("bank", type=Path)
        parser.add_argument("name")
    rename = bank.add_parser("rename", help="give a concept another name")
    rename.add_argument("bank", type=Path)
    rename.add_argument("name")
    rename.add_argument("new")
    restore = bank.add_parser("restore", help="an earlier version of a bank; without --version: which there are")
    restore.add_argument("bank", type=Path)
    restore.add_argument("--version", dest="number", type=int, help="1 is the last one before the present")
    merge = bank.add_parser("merge", help="two banks into one file")
    merge.add_argument("bank", type=Path)
    merge.add_argument("other", type=Path)
    merge.add_argument("--output", type=Path, required=True)
    _add_export(bank)
    _add_import(bank)


def _add_import(bank) -> None:
    parser = bank.add_parser("import", help="a LoRA or an embedding of another program as a concept")
    parser.add_argument("bank", type=Path, help="bank file to grow (made when missing)")
    parser.add_argument("name", help="of the concept: <name> in prompts")
    parser.add_argument("--noun", default="", help="class noun: what it is in ordinary words, e.g. dog")
    parser.add_argument("--kind", choices=KINDS, default="object")
    parser.add_argument("--lora", type=Path, help=".safetensors, with kohya's, diffusers' or PEFT's names")
    parser.add_argument("--embedding", type=Path, help=".safetensors, a textual inversion")
    parser.add_argument("--trigger", default="", help="what is typed for a LoRA without learned words, e.g. 'sks dog'")
    add_base(parser)


def _add_export(bank) -> None:
    export = bank.add_parser("export", help="a concept, all of them, or what a prompt gets, as files for other programs")
    export.add_argument("bank", type=Path)
    export.add_argument("name", nargs="?", help="of the concept")
    export.add_argument("--all", action="store_true", help="every concept; one that cannot be written is told of and left out")
    export.add_argument("--prompt", help="what the bank gives for this prompt as one LoRA, and the words of the concepts that it names")
    export.add_argument("--mode", choices=MODES, default="sharp", help="with --prompt: how concepts are weighted")
    export.add_argument("--output", type=Path, required=True, help="folder for the files; nothing in it is overwritten")
    export.add_argument(
        "--format",
        dest="formats",
        choices=FORMATS,
        action="append",
        help="may be given several times; kohya: LoRA, bundle: LoRA and words in one file, diffusers: LoRA, embedding: words "
        f"(default: {' and '.join(DEFAULT_FORMATS)})",
    )
    export.add_argument("--strength", type=float, default=1.0, help="factor on the LoRA")
    export.add_argument("--rank", type=int, help=f"of LoRA made from sparse deltas (default {DEFAULT_RANK}); with --prompt: of the LoRA")
    export.add_argument("--max-error", type=float, default=DEFAULT_ERROR, help="what that rank may lose, relative (default %(default)s)")
    export.add_argument("--refit", action="store_true", help="words with layer copies: one copy fitted to the text encoder, not their "
                        "mean; the words are read more alike, pictures gain little")
    add_base(export)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="continual-concepts", description="Teach an image model concepts one after another, with nothing forgotten."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="learn two objects and a style on the embedded base, by two methods")
    demo.add_argument("--output", type=Path, default=Path("demo"))
    _add_learn(commands)
    _add_sample(commands)
    _add_bank(commands)
    return parser


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse before Python 3.13 takes an optional name for missing when options stand between it and what is before it."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(options, "name", "") is None:
        options.name, rest = rest[0], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 with one sentence on stderr for bad input, 130 when interrupted."""
    from . import commands

    options = _parsed(arguments)
    stopped = "stopped; a run with a bank continues where it was when the same command is given again"
    return run("continual-concepts", getattr(commands, options.command), options, stopped)


def run(program: str, command: Callable, options: argparse.Namespace, stopped: str) -> int:
    """Calls a command and prints what it returns. Exit code 0; 1 with one sentence on stderr for bad input; 130 when interrupted."""
    try:
        said = command(options)
    except ConceptError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: {stopped}", file=sys.stderr)
        return 130
    if said is not None:  # of several processes one speaks
        result, lines = said
        print(json.dumps(result, indent=1) if options.json else "\n".join(lines))
    return 0
