"""The command `continual-concepts`: demo, learn, learn-all, sample, bank."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..bank.concepts import KINDS
from ..bank.tokens import typed_name
from ..conditioning.routing import MODES
from ..demo.bases import EMBEDDED, FILES, NAMES, TRANSFORMERS
from ..interop.export import DEFAULT_FORMATS, FORMATS
from ..interop.factors import DEFAULT_ERROR, DEFAULT_RANK
from ..methods import DEFAULT, METHODS
from ..sampling.settings import SampleSettings
from ..settings import FINITE, SEED, at_least, between
from ..training.config import TrainingConfig
from ..training.presets import EFFORTS, NORMAL
from .arguments import (
    Parser,
    UsageError,
    add_settings,
    base_name,
    file_path,
    number,
    setting_pair,
    whole,
    with_plain_booleans,
    word_names,
)
from .backbones import EMBEDDED_CFG, EMBEDDED_SIZE, EMBEDDED_TRAINING, OTHER_CFG, OTHER_SIZE, PRESETS
from .learning import IF_KNOWN
from .result import run, say

BANK_HELP, NAME_HELP = "bank file", "name of a concept in the bank"
KIND_HELP = "object: a thing; style: how pictures look (default %(default)s)"


def add_base(parser: argparse.ArgumentParser, default: str = "embedded") -> None:
    """Adds the flags that choose the base."""
    names = ", ".join([*FILES, *TRANSFORMERS])
    parser.add_argument("--base", type=base_name, default=default,
                        help="'embedded' (a small base that ships: the one that the bank was made on, else "
                        f"the newest; by name: {names}), or the folder of a model in diffusers' "
                        "layout (SD1.5, SD2, SDXL) (default %(default)s)")
    parser.add_argument("--device", default="cpu",
                        help="torch device of the base, such as cpu or cuda (default %(default)s)")


def _add_learn(commands) -> None:
    parser = commands.add_parser("learn", help="learn a concept from a folder of photos into a bank")
    parser.add_argument("images", type=file_path,
                        help="folder of pictures, or one picture; <name>.txt beside a picture is its caption")
    parser.add_argument("--subfolders", action="store_true",
                        help="learn from the pictures in all subfolders; those in 10_dog count 10 times")
    parser.add_argument("--name", type=typed_name, required=True,
                        help="name of the concept: <name> in prompts")
    parser.add_argument("--noun", default="", help="class noun: an ordinary word for it, e.g. dog")
    parser.add_argument("--words", type=word_names, default=(),
                        help="names of the learned words, comma separated, e.g. dog1,dog2 (default: as many "
                        "as the method learns)")
    parser.add_argument("--kind", choices=KINDS, help=KIND_HELP.replace("%(default)s", KINDS[0]))
    parser.add_argument("--captions", type=file_path,
                        help="folder of captions, or a table such as metadata.jsonl, if they are not beside "
                        "the pictures")
    parser.add_argument("--masks", type=file_path,
                        help="folder of masks: white areas are learned, black ones are not (default: the "
                        "subfolder masks, and files such as a-masklabel.png)")
    parser.add_argument("--contact-sheet", type=file_path,
                        help="PNG file for a picture of all photos, their masks and captions, and what was "
                        "not used")
    _add_learning(parser)


def _add_learn_all(commands) -> None:
    parser = commands.add_parser("learn-all",
                                 help="learn a concept from each subfolder of photos into a bank")
    parser.add_argument("folder", type=file_path,
                        help="holds a folder of photos per concept, named 'rex dog' (name and class noun) or "
                        "as kohya's trainers do: '10_rex dog'")
    parser.add_argument("--table", type=file_path,
                        help="CSV table with the columns folder, name, noun, kind, captions and masks; the "
                        "first two are needed (default: concepts.csv in the folder, else the folders' names)")
    parser.add_argument("--contact-sheets", type=file_path,
                        help="folder for a picture of each concept's photos, their masks and captions, and "
                        "what was not used")
    _add_learning(parser)


def _add_learning(parser: argparse.ArgumentParser) -> None:
    """Adds what `learn` and `learn-all` have in common."""
    parser.add_argument("--bank", type=file_path, required=True,
                        help="bank file to add to (created if missing)")
    parser.add_argument("--find-subject", action="store_true",
                        help="make a mask for each photo that has none: what differs from the photo's border")
    parser.add_argument("--caption-templates", action="store_true",
                        help="give each photo without a caption a short sentence such as 'a close view of "
                        "the <name>', another for every photo (default: 'a photo of <name>')")
    parser.add_argument("--prior", type=file_path,
                        help="folder of prior-preservation pictures; the caption of those without one is "
                        "'a photo of a NOUN'")
    parser.add_argument("--preset", choices=tuple(PRESETS),
                        help="what is learned: a person or animal, an object, or a style; chooses kind, "
                        "steps, learning rates, resolution and batch size for the base's family; flags and "
                        "--set change single ones (default: none)")
    parser.add_argument("--effort", choices=EFFORTS,
                        help=f"with --preset: how long to learn (default {NORMAL})")
    parser.add_argument("--method", choices=sorted(METHODS),
                        help=f"how the concept is learned (default {DEFAULT})")
    parser.add_argument("--set", dest="settings", type=setting_pair, action="append", default=[],
                        metavar="KEY=VALUE", help="a setting of the method, e.g. rank=8 or lr=1e-4")
    parser.add_argument("--if-known", choices=IF_KNOWN, default=IF_KNOWN[0],
                        help="if the bank holds this name: keep the concept if it was learned from these "
                        "photos and settings, else an error; or learn it again and replace it; or refine: "
                        "go on from what it has learned, with further photos; noun, kind, method and its "
                        "settings are then its own (default %(default)s)")
    parser.add_argument("--encoder", type=file_path,
                        help="folder of a CLIP model in transformers' layout, which compares pictures with "
                        "the photos for --patience (default: the embedded base's own, else the encoder for "
                        "photos if it is installed), and describes pictures for the method l2dm")
    add_settings(parser, TrainingConfig, EMBEDDED_TRAINING, "the embedded base")
    add_base(parser)


def _add_sample(commands) -> None:
    parser = commands.add_parser("sample", help="draw pictures from a prompt and a bank")
    parser.add_argument("prompt", help="e.g. 'a photo of <rex> on a beach'")
    parser.add_argument("--bank", type=file_path, help="bank file (default: the base alone)")
    parser.add_argument("--output", type=file_path, default=Path("samples"),
                        help="folder for the pictures; existing files are kept (default %(default)s)")
    parser.add_argument("--count", type=whole(at_least(1)), default=4,
                        help="number of pictures (default %(default)s)")
    parser.add_argument("--seed", type=whole(SEED), default=0,
                        help="seed of the first picture; each further one adds 1 (default %(default)s)")
    parser.add_argument("--steps", type=whole(at_least(1)), default=SampleSettings.steps,
                        help="steps of the sampler (default %(default)s)")
    parser.add_argument("--cfg", type=number(at_least(0)), default=None,
                        help=f"guidance scale, 1 = none (default {EMBEDDED_CFG:g} for the embedded base, "
                        f"else {OTHER_CFG:g})")
    parser.add_argument("--negative", default="", help="negative prompt (default: none)")
    parser.add_argument("--size", type=whole(at_least(8)), default=None,
                        help=f"side in pixels (default {EMBEDDED_SIZE} for the embedded base, else "
                        f"{OTHER_SIZE})")
    parser.add_argument("--mode", choices=MODES, default="sharp",
                        help="how concepts are weighted (default %(default)s)")
    parser.add_argument("--strength", type=number(FINITE), default=1.0,
                        help="factor on the concepts' deltas; 0 = the base alone (default %(default)s)")
    parser.add_argument("--region", action="append", default=[], metavar="TOP,LEFT,BOTTOM,RIGHT:PROMPT",
                        help="a box in fractions of the picture with its own prompt")
    parser.add_argument("--region-noise", action="store_true",
                        help="region noise estimation: one more evaluation per region and step")
    parser.add_argument("--solo", type=number(between(0, 1)), default=0.4,
                        help="crop denoising: share of the first steps in which regions are denoised alone "
                        "(default %(default)s)")
    add_base(parser)


def _add_bank(commands) -> None:
    bank = commands.add_parser("bank",
                               help="list, show, remove, rename, merge, verify, export, import, restore")
    bank = bank.add_subparsers(dest="action", required=True)
    for action, help_text in (("list", "one line per concept"), ("verify", "read and check every concept")):
        bank.add_parser(action, help=help_text).add_argument("bank", type=file_path, help=BANK_HELP)
    show = bank.add_parser("show", help="all facts about a concept")
    remove = bank.add_parser("remove", help="remove a concept")
    for parser in (show, remove):
        parser.add_argument("bank", type=file_path, help=BANK_HELP)
        parser.add_argument("name", type=typed_name, help=NAME_HELP)
    rename = bank.add_parser("rename", help="rename a concept")
    rename.add_argument("bank", type=file_path, help=BANK_HELP)
    rename.add_argument("name", type=typed_name, help=NAME_HELP)
    rename.add_argument("new", type=typed_name, help="its new name")
    restore = bank.add_parser("restore",
                              help="bring back an earlier version of a bank; without --version: list them")
    restore.add_argument("bank", type=file_path, help=BANK_HELP)
    restore.add_argument("--version", dest="number", type=whole(at_least(1)),
                         help="1 is the latest earlier version")
    merge = bank.add_parser("merge", help="merge two banks into one file")
    merge.add_argument("bank", type=file_path, help=BANK_HELP)
    merge.add_argument("other", type=file_path, help="bank file whose concepts come last")
    merge.add_argument("--output", type=file_path, required=True, help="bank file to write")
    _add_export(bank)
    _add_import(bank)


def _add_import(bank) -> None:
    parser = bank.add_parser("import", help="add a LoRA or an embedding of another program as a concept")
    parser.add_argument("bank", type=file_path, help="bank file to add it to (created if missing)")
    parser.add_argument("name", type=typed_name, help="name of the concept: <name> in prompts")
    parser.add_argument("--noun", default="", help="class noun: an ordinary word for it, e.g. dog")
    parser.add_argument("--kind", choices=KINDS, default="object", help=KIND_HELP)
    parser.add_argument("--lora", type=file_path,
                        help=".safetensors file (LoRA, DoRA, LoHa, LoKr, .diff or Custom Diffusion; kohya's, "
                        "LyCORIS', diffusers' or PEFT's names), or the folder that PEFT or diffusers saved")
    parser.add_argument("--embedding", type=file_path, help=".safetensors, a textual inversion")
    parser.add_argument("--trigger", default="",
                        help="trigger words of a LoRA without learned words, e.g. 'sks dog'")
    parser.add_argument("--which", default="",
                        help="the adapter or embedding to take from a file that holds several; one of each "
                        "with a comma")
    add_base(parser)


def _add_export(bank) -> None:
    export = bank.add_parser("export",
                             help="write files for other programs: of one concept, of all, or for a prompt")
    export.add_argument("bank", type=file_path, help=BANK_HELP)
    export.add_argument("name", type=typed_name, nargs="?", help=NAME_HELP)
    export.add_argument("--all", action="store_true", help="every concept; failures are reported and skipped")
    export.add_argument("--prompt",
                        help="one LoRA with everything the bank adds for this prompt, and the words of the "
                        "concepts it names")
    export.add_argument("--mode", choices=MODES, default="sharp",
                        help="with --prompt: how concepts are weighted (default %(default)s)")
    export.add_argument("--output", type=file_path, required=True,
                        help="folder for the files; existing files are kept")
    export.add_argument("--format", dest="formats", choices=FORMATS, action="append",
                        help="can be given several times; kohya: LoRA, bundle: LoRA and words in one file, "
                        f"diffusers: LoRA, embedding: words (default: {' and '.join(DEFAULT_FORMATS)})")
    export.add_argument("--strength", type=number(FINITE), default=1.0,
                        help="factor on the LoRA (default %(default)s)")
    export.add_argument("--rank", type=whole(at_least(1)),
                        help=f"of a LoRA made from sparse deltas (default {DEFAULT_RANK}); "
                        "with --prompt: of the LoRA")
    export.add_argument("--max-error", type=number(at_least(0)), default=DEFAULT_ERROR,
                        help="largest relative error that this rank may cause (default %(default)s)")
    export.add_argument("--refit", action="store_true",
                        help="layer-wise words: "
                             "fit one copy to the text encoder instead of taking their mean; "
                        "the encoder reads it more like the layer copies, pictures gain little")
    add_base(export)


def build_parser() -> argparse.ArgumentParser:
    description = "Teach an image model concepts one after another, with nothing forgotten."
    parser = Parser(prog="continual-concepts", description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo",
                               help="learn two objects and a style on the embedded base, in three ways")
    demo.add_argument("--output", type=file_path, default=Path("demo"),
                      help="folder for the report and the bank (default %(default)s)")
    demo.add_argument("--base", default=EMBEDDED, choices=(*NAMES, *TRANSFORMERS),
                      help="which embedded base; embedded is the newest (default %(default)s)")
    _add_learn(commands)
    _add_learn_all(commands)
    _add_sample(commands)
    _add_bank(commands)
    return parser


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments.

    Before Python 3.13, argparse misses an optional positional argument after options.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(with_plain_booleans(arguments, TrainingConfig))
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(options, "name", "") is None:
        options.name, rest = rest[0], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _names_bench(arguments: Sequence[str]) -> bool:
    """Whether the command is `bench`, a command of earlier versions."""
    return next((argument for argument in arguments if not argument.startswith("-")), "") == "bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code, see `result.run`."""
    from . import commands

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if _names_bench(arguments):
        print("continual-concepts: benchmarks run from a clone of the project, with the same options: "
              "python -m continual_concepts.benchmarks "
              f"{shlex.join(arguments[list(arguments).index('bench') + 1:]) or '--help'}", file=sys.stderr)
        return 2
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    flags = sorted(arguments[:end], key=lambda argument: argument != "--json")      # --json at any place
    try:
        options = _parsed([*flags, *arguments[end:]])
    except UsageError as error:
        if "--json" in flags:
            say(json.dumps({"error": error.sentence}))
        raise
    stopped = "stopped; the same command continues learning where it stopped"
    return run("continual-concepts", getattr(commands, options.command.replace("-", "_")), options, stopped)
