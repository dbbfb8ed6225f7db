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
from ..demo.bases import EMBEDDED, JOINT, NAMES, TRANSFORMERS
from ..evaluation.states import MOST_SAMPLES, MOST_STATES
from ..methods import DEFAULT, METHODS
from ..regional.noise import AREAS, OUTSIDE, NoiseSettings
from ..regional.regions import OVERLAPS
from ..sampling.settings import SampleSettings
from ..settings import FINITE, SEED, at_least, between
from ..training.config import TrainingConfig
from ..training.presets import EFFORTS, FOR_OTHERS, NORMAL
from ..versions import own_version
from .arguments import (
    KIND_HELP,
    Parser,
    UsageError,
    add_base,
    add_settings,
    file_path,
    number,
    setting_pair,
    some_name,
    whole,
    width_and_height,
    with_plain_booleans,
    word_names,
)
from .backbones import EMBEDDED_CFG, EMBEDDED_SIZE, EMBEDDED_TRAINING, OTHER_CFG, OTHER_SIZE, PRESETS
from .bank_parser import add_bank
from .learning import IF_KNOWN
from .result import messages_may_fail, run, say

NO_BASE = ("NO --base: USING AN EMBEDDED BASE, which draws small pictures of toys and animals. Real photos "
           "cannot be learned on it: give --base FOLDER, a model in diffusers' layout (SD1.5, SD2, SDXL). "
           "--base embedded hides this line.")
LEARNING = ("learn", "learn-all")      # commands that save where they are when they are stopped
# One of the ways that the demo compares learns words.
DEMO_BASES = tuple(dict.fromkeys(name for name in (*NAMES, *TRANSFORMERS) if name != JOINT))
def _add_learn(commands) -> None:
    parser = commands.add_parser("learn", help="learn a concept from a folder of photos into a bank")
    parser.add_argument("images", type=file_path,
                        help="folder of pictures, or one picture; <name>.txt beside a picture is its caption")
    parser.add_argument("--subfolders", action="store_true",
                        help="learn from the pictures in all subfolders; those in 10_dog count 10 times "
                        "(default: off)")
    parser.add_argument("--name", type=typed_name, required=True,
                        help="name of the concept: <name> in prompts")
    parser.add_argument("--noun", default="",
                        help="class noun: an ordinary word for the concept, e.g. dog (default: none)")
    parser.add_argument("--words", type=word_names, default=(),
                        help="names of the learned words, comma separated, e.g. dog1,dog2 (default: as many "
                        "as the method learns)")
    parser.add_argument("--kind", choices=KINDS, help=KIND_HELP.replace("%(default)s", KINDS[0]))
    parser.add_argument("--captions", type=file_path,
                        help="folder of captions, or a table such as metadata.jsonl, if they are not beside "
                        "the pictures (default: none)")
    parser.add_argument("--masks", type=file_path,
                        help="folder of masks: white areas are learned, black ones are not (default: the "
                        "subfolder masks, and files such as a-masklabel.png)")
    parser.add_argument("--variant-of", type=some_name, metavar="NAME",
                        help="for a variant, such as rex-winter of rex: the concept of the bank to start "
                        "from. Its method and settings are used, and its noun unless another is given "
                        "(default: start anew)")
    parser.add_argument("--keep-states", type=whole(between(1, MOST_STATES)), metavar="COUNT",
                        help="keep this many states, evenly spaced, and compare them with the photos. Of the "
                        "states with nearly the best likeness, the one that follows prompts best is stored "
                        "(default: store the last)")
    parser.add_argument("--sample-prompt", dest="sample_prompts", action="append", default=[], metavar="TEXT",
                        help="with --keep-states: a prompt to draw, such as 'a photo of <rex> on a horse'; "
                        "can be given several times (default: a place that no caption mentions)")
    parser.add_argument("--samples", type=whole(between(1, MOST_SAMPLES)),
                        help="with --keep-states: pictures of each prompt (default 4)")
    parser.add_argument("--states-picture", type=file_path,
                        help="with --keep-states: PNG file that shows all kept states side by side (default: "
                        "none)")
    parser.add_argument("--contact-sheet", type=file_path,
                        help="PNG file for a picture of all photos, their masks and captions, and what was "
                        "not used (default: none)")
    _add_learning(parser)


def _add_learn_all(commands) -> None:
    parser = commands.add_parser("learn-all",
                                 help="learn a concept from each subfolder of photos into a bank")
    parser.add_argument("folder", type=file_path,
                        help="holds a folder of photos per concept, named 'rex dog' (name and class noun) or "
                        "as kohya's trainers do: '10_rex dog'")
    parser.add_argument("--table", type=file_path,
                        help="CSV table with the columns folder, name, noun, kind, captions, masks, "
                        "preset and variant_of; the first two are needed (default: concepts.csv in the "
                        "folder, else the folders' names)")
    parser.add_argument("--contact-sheets", type=file_path,
                        help="folder for a picture of each concept's photos, their masks and captions, and "
                        "what was not used (default: none)")
    _add_learning(parser)


def _add_learning(parser: argparse.ArgumentParser) -> None:
    """Adds what `learn` and `learn-all` have in common."""
    parser.add_argument("--bank", type=file_path, required=True,
                        help="bank file to add to (created if missing)")
    parser.add_argument("--find-subject", action="store_true",
                        help="make a mask for each photo that has none: what differs from the photo's border "
                        "(default: off)")
    parser.add_argument("--caption-templates", action="store_true",
                        help="give each photo without a caption a short sentence such as 'a close view of "
                        "the <name>', a different one for each photo (default: 'a photo of <name>')")
    parser.add_argument("--prior", type=file_path,
                        help="folder of prior-preservation pictures; the caption of those without one is "
                        "'a photo of a NOUN' (default: none)")
    parser.add_argument("--preset", choices=tuple(PRESETS),
                        help="what is learned: a person or animal, an object, or a style. Chooses kind, "
                        "steps, learning rates, resolution and batch size for the base's family. Flags and "
                        "--set change single ones (default: none)")
    parser.add_argument("--effort", choices=EFFORTS,
                        help=f"with --preset: how long to learn (default {NORMAL})")
    parser.add_argument("--for-other-programs", action="store_true",
                        help=f"learn what other programs read without loss: plain low-rank deltas (method "
                        f"{FOR_OTHERS}) and one vector per word. Two such concepts in one prompt mix more "
                        "than those of the default method (default: off)")
    parser.add_argument("--method", choices=sorted(METHODS),
                        help=f"how the concept is learned (default {DEFAULT})")
    parser.add_argument("--set", dest="settings", type=setting_pair, action="append", default=[],
                        metavar="KEY=VALUE",
                        help="a setting of the method, e.g. rank=8; can be given several times (default: the "
                        "method's own)")
    for flag, what in (("--lr", "weights"), ("--token-lr", "words")):
        parser.add_argument(flag, metavar="RATE",
                            help=f"learning rate of the {what}, e.g. 1e-4 (default: the preset's, else the "
                            "method's)")
    parser.add_argument("--if-known", choices=IF_KNOWN, default=IF_KNOWN[0],
                        help="if the bank holds this name. keep: nothing is learned; other photos or "
                        "settings are an error. again: the concept is replaced. refine: learning continues "
                        "from it with further photos, and with its noun, kind, method and settings (default "
                        "%(default)s)")
    parser.add_argument("--encoder", type=file_path,
                        help="folder of a CLIP model in transformers' layout. It compares pictures with the "
                        "photos for --patience, and describes pictures for the method l2dm (default: the "
                        "embedded base's own, else the encoder for photos if it is installed)")
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
    parser.add_argument("--size", type=width_and_height, default=None, metavar="SIDE or WIDTHxHEIGHT",
                        help=f"size in pixels (default {EMBEDDED_SIZE} for the embedded base, else "
                        f"{OTHER_SIZE})")
    parser.add_argument("--mode", choices=MODES, default="sharp",
                        help="how concepts are weighted (default %(default)s)")
    parser.add_argument("--strength", type=number(FINITE), default=1.0,
                        help="factor on the concepts' deltas; 0 = the base alone (default %(default)s)")
    _add_regions(parser)
    add_base(parser)


def _add_regions(parser: argparse.ArgumentParser) -> None:
    """Adds what `sample` needs for regions."""
    share = number(between(0, 1))
    parser.add_argument("--box", action="append", default=[], metavar="LEFT,TOP,RIGHT,BOTTOM:PROMPT",
                        help="a region with its own prompt: a box in fractions of the picture; can be given "
                        "several times (default: none)")
    parser.add_argument("--regions", type=file_path, metavar="FILE",
                        help="regions as JSON, as Concept Region Editor stores them; each may have strength, "
                        "negative, start, end and feather (default: none)")
    parser.add_argument("--region", action="append", default=[], metavar="TOP,LEFT,BOTTOM,RIGHT:PROMPT",
                        help="as --box, in the order of earlier versions (default: none)")
    parser.add_argument("--feather", type=number(between(0, 0.5)), default=0.0,
                        help="soft edge of --box and --region, as a share of the picture's smaller side "
                        "(default %(default)s)")
    parser.add_argument("--overlap", choices=OVERLAPS, default="average",
                        help="which region acts where they overlap (default %(default)s)")
    parser.add_argument("--solo", type=share, default=0.4,
                        help="crop denoising: share of the first steps in which regions are denoised alone "
                        "(default %(default)s)")
    parser.add_argument("--isolation", type=share, default=0.0,
                        help="share of the first steps in which regions do not see each other in "
                        "self-attention (default %(default)s)")
    parser.add_argument("--find-regions", action="store_true",
                        help="without boxes: find in the first steps where each concept of the prompt is, "
                        "and keep it there (default: off)")
    parser.add_argument("--attention-guidance", type=number(at_least(0)), default=0.0, metavar="STRENGTH",
                        help="without regions: how strongly each concept of the prompt gets attention "
                        "(default %(default)s)")
    parser.add_argument("--region-noise", action="store_true",
                        help="region noise estimation: one more evaluation per region and step "
                        "(default: off)")
    parser.add_argument("--alpha", type=share, default=NoiseSettings.alpha,
                        help="with --region-noise: share of the scene inside regions (default %(default)s)")
    parser.add_argument("--outside", choices=OUTSIDE, default=NoiseSettings.outside,
                        help="with --region-noise: keep the scene outside regions, or the paper's formula "
                        "(default %(default)s)")
    parser.add_argument("--noise-area", choices=AREAS, default=NoiseSettings.area,
                        help="with --region-noise: estimate on the whole frame or on a crop of the region "
                        "(default %(default)s)")


def build_parser() -> argparse.ArgumentParser:
    description = "Teach an image model concepts one after another, with nothing forgotten."
    parser = Parser(prog="continual-concepts", description=description)
    parser.add_argument("--version", action="version", version=f"%(prog)s {own_version()}")
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object instead of text (default: off); may stand at any place")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo",
                               help="learn two objects and a style on the embedded base, in three ways")
    demo.add_argument("--output", type=file_path, default=Path("demo"),
                      help="folder for the report and the bank (default %(default)s)")
    demo.add_argument("--base", default=EMBEDDED, choices=DEMO_BASES,
                      help="which embedded base; embedded is the newest (default %(default)s)")
    _add_learn(commands)
    _add_learn_all(commands)
    _add_sample(commands)
    add_bank(commands)
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
    rarely_needs_one = getattr(options, "action", "") == "export"
    if not getattr(options, "base_is_named", True) and not rarely_needs_one:
        print(NO_BASE, file=sys.stderr)
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
        with messages_may_fail():
            options = _parsed([*flags, *arguments[end:]])
    except UsageError as error:
        if "--json" in flags:
            say(json.dumps({"error": error.sentence}))
        raise
    goes_on = "continues learning where it stopped" if options.command in LEARNING else "begins anew"
    stopped = f"stopped; the same command {goes_on}"
    return run("continual-concepts", getattr(commands, options.command.replace("-", "_")), options, stopped)
