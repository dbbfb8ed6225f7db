"""Trains the 128-pixel bases stage by stage; a further call resumes where an earlier one was stopped.

The stages are the autoencoder, the UNet, the transformer, the one with joint attention, the decoder, and a
classifier that judges pictures.
Each call renders and encodes some more shards before it trains the denoisers. The first call thus
reaches the UNet soon, and later calls show it more pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import denoisers, latent_set, parts_classifier, pictures, scene_autoencoder, sizes

STAGES = ("autoencoder", "unet", "transformer", "joint", "decoder", "judge")
SHARDS_PER_CALL = 10
# stages of flow matching -> sizes, what times are multiplied with, plan
FLOWS = {"transformer": (sizes.TRANSFORMER, sizes.TIME_SCALE, sizes.TRANSFORMER_PLAN),
         "joint": (sizes.JOINT, 1.0, sizes.JOINT_PLAN)}


def autoencoder_pictures(folder: Path) -> np.ndarray:
    """The autoencoder's training pictures `[N, 128, 128, 3]` uint8; missing shards are rendered."""
    shards = folder / "pictures"
    shards.mkdir(parents=True, exist_ok=True)
    for number in sizes.AUTOENCODER_SHARDS:
        pictures.render_shard(shards, number, sizes.PICTURE)
    return np.concatenate([pictures.load_shard(shards, number).pictures
                           for number in sizes.AUTOENCODER_SHARDS])


def add_latents(folder: Path, images: np.ndarray, count: int) -> None:
    """Renders and encodes the next `count` shards that have no latents yet."""
    done = set(latent_set.finished_shards(folder / "latents"))
    rendered = [n for n in range(sizes.SHARDS) if (folder / "pictures" / f"pictures_{n:03d}.npz").exists()]
    order = [n for n in (*rendered, *range(sizes.SHARDS)) if n not in done]
    numbers = list(dict.fromkeys(order))[:count]
    for number in numbers:
        pictures.render_shard(folder / "pictures", number, sizes.PICTURE)
    autoencoder = scene_autoencoder.load_trained(sizes.AUTOENCODER, images, folder / "checkpoints")
    scene_autoencoder.encode_shards(autoencoder, folder / "pictures", folder / "latents", numbers)
    latents = folder / "latents"
    latent_set.write_ids(folder / "pictures", latents, latent_set.finished_shards(latents))


def train(folder: Path, stages: tuple[str, ...], stop: Callable[[], bool], shards: int) -> None:
    """Runs the given stages in order, each until it is finished or `stop()` is true.

    Args:
        folder: of pictures, latents and checkpoints.
        stages: some of `STAGES`.
        stop: called before every step; once it is true, the stage in progress saves and all end.
        shards: how many further shards get latents first.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    images = autoencoder_pictures(folder)
    if "autoencoder" in stages:
        plan = sizes.AUTOENCODER_PLAN
        run = scene_autoencoder.train_both(sizes.AUTOENCODER, images, checkpoints, plan, stop)
        if not run.finished:
            return
    if {"unet", *FLOWS} & set(stages):
        add_latents(folder, images, shards)
        train_denoisers(folder, stages, stop)
    if "decoder" in stages and not stop():
        scene_autoencoder.train_decoder(sizes.AUTOENCODER, images, checkpoints, sizes.DECODER_PLAN, stop)
    if "judge" in stages and not stop():
        parts_classifier.train(folder / "judge", stop=stop).save(folder / "judge" / "parts.safetensors")


def train_denoisers(folder: Path, stages: tuple[str, ...], stop: Callable[[], bool]) -> None:
    """The UNet, then the transformers, on all latents that exist."""
    data, checkpoints = latent_set.load(folder / "latents"), folder / "checkpoints"
    print(f"{len(data.latents)} pictures", flush=True)
    if "unet" in stages:
        denoisers.train_unet(sizes.UNET, data, checkpoints, sizes.UNET_PLAN, stop)
    for kind, (config, scale, plan) in FLOWS.items():
        if kind in stages and not stop():
            denoisers.train_flow(kind, config, scale, data, checkpoints, plan, stop)
