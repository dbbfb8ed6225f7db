"""The commands `pretraining FOLDER` and `base`, which train the embedded base from scratch and measure it.

On two cores, rendering takes 3 minutes, the autoencoder 5 minutes, and diffusion at least an hour. Each
process uses one core and computes a share of every batch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

from ...core.demo import networks, vocabulary
from ...core.demo.bases import FILES, NEWEST, TOKENIZER, file_of
from ..report import Result, numbers, require_at_least, write_result
from . import autoencoder, command_128, data, diffusion
from .export import export


def _prepare(options: argparse.Namespace) -> np.ndarray:
    """Makes pictures, autoencoder and latents. Returns the pictures used for fitting the linear part."""
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (TOKENIZER / "vocab.json").exists():
        vocabulary.build(TOKENIZER)
    data.render_all(folder / "data", options.shards, options.workers)
    pictures, captions = data.load_pictures(folder / "data", options.shards)
    vae = autoencoder.train(pictures, folder, options.autoencoder_steps)
    if not (folder / "latents.pt").exists():
        ids = diffusion.tokenize(vocabulary.load(TOKENIZER), captions)
        torch.save({"latents": autoencoder.encode_all(vae, pictures), "ids": ids}, folder / "latents.pt")
    return pictures[: autoencoder.FITTED_ON]


def add_commands(commands) -> None:
    """Adds the commands of this room to a parser's subcommands."""
    parser = commands.add_parser("pretraining", help="train the embedded base from scratch, stage by stage")
    parser.add_argument("folder", type=Path,
                        help="of pictures and checkpoints; a second call continues from there")
    parser.add_argument("--shards", type=int, default=24, help=f"of {data.SHARD} pictures each")
    parser.add_argument("--autoencoder-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=8000, help="of the diffusion model")
    parser.add_argument("--from-shipped", action="store_true",
                        help="start the diffusion model from the weights that ship")
    parser.add_argument("--workers", type=int, default=2, help="processes, one core each")
    parser.set_defaults(run=pretrain)
    parser = commands.add_parser("base", help="how well the embedded base follows unseen captions")
    parser.add_argument("--json", dest="file", type=Path, help="where the result goes")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--base-file", type=Path, help="a base that does not ship (default: the newest one)")
    parser.set_defaults(run=base)
    _add_bases(commands)
    command_128.add_commands(commands)


def _add_bases(commands) -> None:
    parser = commands.add_parser("bases", help="the demo's concepts on several embedded bases")
    add = parser.add_argument
    add("--json", dest="file", type=Path, required=True, help="where the result goes")
    add("--bases", default="embedded-128,embedded-dit,embedded-joint",
        help="comma separated (default %(default)s)")
    add("--seeds", default="0,1", help="of learning, comma separated (default %(default)s)")
    add("--steps", type=int, help="of learning a concept (default: those of the demo on that base)")
    add("--pictures", type=int, default=12, help="of each concept, pair and scene (default %(default)s)")
    parser.set_defaults(run=bases)


def pretrain(options: argparse.Namespace) -> Result:
    """Trains the unfinished stages and writes the shipped file."""
    fitted_on = _prepare(options)
    (options.folder / "rendezvous").unlink(missing_ok=True)
    if options.workers > 1:
        mp.spawn(diffusion.worker, args=(options.workers, options.folder, options.steps,
                                         options.from_shipped), nprocs=options.workers)
    else:
        diffusion.worker(0, 1, options.folder, options.steps, options.from_shipped)
    target = FILES["embedded-64"]
    export(options.folder, fitted_on, target)
    parameters = sum(p.numel() for p in networks.build_unet().parameters())
    return {"file": str(target),
            "unet": parameters}, [f"wrote {target} (UNet of {parameters / 1e6:.1f} M weights)"]


def base(options: argparse.Namespace) -> Result:
    """Measures how often the embedded base follows unseen captions."""
    from .quality import base_quality

    require_at_least(options, pictures=1)
    result = base_quality(options.base_file or FILES[NEWEST], options.pictures)
    write_result(options.file, result)
    return result, json.dumps(result, indent=1).splitlines()


def bases(options: argparse.Namespace) -> Result:
    """Learns the demo's concepts on several bases; writes JSON."""
    from .on_bases import compare, lines_of

    require_at_least(options, pictures=1, **({} if options.steps is None else {"steps": 1}))
    seeds = numbers(options.seeds, "seeds")
    names = [name.strip() for name in options.bases.split(",") if name.strip()]
    for name in names:
        file_of(name)      # raises ConceptError for a base that is not there
    runs = options.file.with_suffix(".cells")
    result = compare(names, seeds, options.pictures, options.steps, runs)
    write_result(options.file, result)
    return result, lines_of(result)
