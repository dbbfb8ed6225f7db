"""The commands `pretraining-128`, `-progress` and `-export`: the 128-pixel bases, in many short calls."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...core.demo.base import DENOISERS
from ..report import Result, require_at_least
from ..sheet import save_sheet
from . import export_128, progress, stages
from .long_run import Deadline


def add_commands(commands) -> None:
    """Adds the three commands to a parser's subcommands."""
    parser = commands.add_parser("pretraining-128",
                                 help="train the 128-pixel bases; resumes where it stopped")
    parser.add_argument("folder", type=Path, help="of pictures, latents and checkpoints")
    parser.add_argument("--hours", type=float, default=2.4, help="save and stop after so many hours")
    parser.add_argument("--stages", nargs="+", choices=stages.STAGES, default=list(stages.STAGES))
    parser.add_argument("--shards", type=int, default=stages.SHARDS_PER_CALL,
                        help="further shards of pictures to encode before training")
    parser.add_argument("--compile", action="store_true",
                        help="compile the transformers: steps take 0.6 times as long; needs a C++ compiler")
    parser.add_argument("--start", type=Path, metavar="FILE",
                        help="base file of a transformer, such as the one that ships: its training goes on "
                             "where the folder has no checkpoint (with one transformer in --stages)")
    parser.set_defaults(run=train)
    parser = commands.add_parser("pretraining-128-progress", help="pictures of a 128-pixel base in training")
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=DENOISERS)
    parser.add_argument("--sheet", type=Path, help="where a table of pictures goes")
    parser.add_argument("--pictures", type=int, default=0,
                        help="how many pictures to classify for the share of captions that are followed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.set_defaults(run=show_progress)
    parser = commands.add_parser("pretraining-128-export", help="write a 128-pixel base into one file")
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=DENOISERS)
    parser.add_argument("target", type=Path)
    parser.set_defaults(run=export)


def train(options: argparse.Namespace) -> Result:
    """Trains the stages that are not finished until the time is over or SIGTERM comes."""
    require_at_least(options, shards=0)
    stages.train(options.folder, tuple(options.stages), Deadline(options.hours), options.shards,
                 options.compile, options.start)
    return {"folder": str(options.folder)}, [f"checkpoints are in {options.folder / 'checkpoints'}"]


def show_progress(options: argparse.Namespace) -> Result:
    """Draws with the newest averaged weights."""
    require_at_least(options, pictures=0, steps=1)
    modules, step = progress.trained_modules(options.folder, options.kind)
    make_draw = progress.draw_with_unet if options.kind == "unet" else progress.draw_with_transformer
    draw = make_draw(modules, options.steps, options.cfg)
    if options.sheet:
        seeds = [progress.SHEET_SEED + i for i in range(len(progress.PROMPTS))]
        save_sheet(draw(list(progress.PROMPTS), seeds), options.sheet)
    followed = progress.captions_followed(draw, options.pictures) if options.pictures else {}
    shares = "".join(f", {name} {share:.2f}" for name, share in followed.items())
    return {"step": step, **followed}, [f"{options.kind} at step {step}{shares}"]


def export(options: argparse.Namespace) -> Result:
    """Writes the newest averaged weights into a base file."""
    step = export_128.export(options.folder, options.kind, options.target)
    size = options.target.stat().st_size
    return {"file": str(options.target), "step": step,
            "bytes": size}, [f"wrote {options.target}: step {step}, {size / 1e6:.1f} MB"]
