"""`python -m continual_concepts.core.demo.pretraining FOLDER`: the embedded base from nothing, stage by stage, resumable.

On two cores: rendering 3 minutes, autoencoder 7, latents 2, diffusion an hour. Each process takes one core and a share of every batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .. import networks, vocabulary
from ..base import BASE_FILE, TOKENIZER
from . import autoencoder, data, diffusion
from .export import averaged_autoencoder, export, whitened


def _worker(rank: int, world: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    folder = options.folder
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{(folder / 'rendezvous').resolve()}", rank=rank, world_size=world)
    pictures, captions = data.load_pictures(folder / "data", options.shards)
    autoencoder.train(pictures, folder, options.autoencoder_steps)
    tokenizer = vocabulary.load(TOKENIZER)
    if rank == 0 and not (folder / "latents.pt").exists():
        latents = autoencoder.encode_all(averaged_autoencoder(folder), pictures)
        balanced, mean, matrix = whitened(latents)
        ids = diffusion.tokenize(tokenizer, captions)
        torch.save({"latents": balanced, "mean": mean, "matrix": matrix, "ids": ids}, folder / "latents.pt")
    if world > 1:
        dist.barrier()
    cached = torch.load(folder / "latents.pt", weights_only=True)
    diffusion.train(tokenizer, cached["latents"], cached["ids"], folder, options.steps)
    autoencoder.refine_decoder(averaged_autoencoder(folder), pictures, cached, folder, options.decoder_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where pictures and checkpoints lie; a second call goes on from there")
    parser.add_argument("--shards", type=int, default=24, help=f"of {data.SHARD} pictures each")
    parser.add_argument("--autoencoder-steps", type=int, default=1100)
    parser.add_argument("--decoder-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=8000, help="of the diffusion model")
    parser.add_argument("--workers", type=int, default=2, help="processes, one core each")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (TOKENIZER / "vocab.json").exists():
        vocabulary.build(TOKENIZER)
    data.render_all(options.folder / "data", options.shards, options.workers)
    (options.folder / "rendezvous").unlink(missing_ok=True)
    if options.workers > 1:
        mp.spawn(_worker, args=(options.workers, options), nprocs=options.workers)
    else:
        _worker(0, 1, options)
    export(options.folder, BASE_FILE)
    parameters = sum(p.numel() for p in networks.build_unet().parameters())
    print(f"wrote {BASE_FILE} (UNet of {parameters / 1e6:.1f} M weights)")


if __name__ == "__main__":
    main()
