"""Trains the 128-pixel bases stage by stage; a further call resumes where an earlier one was stopped.

The stages are the autoencoder, the UNet, the transformer, the one with joint attention, the decoder, and a
classifier that judges pictures.
Each call renders and encodes some more shards before it trains the denoisers. The first call thus
reaches the UNet soon, and later calls show it more pictures. Without the first stage, a denoiser learns on
latents of the shipped autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...core.demo.autoencoder import SceneAutoencoder
from . import denoisers, latent_set, parts_classifier, pictures, scene_autoencoder, sizes
from .long_run import newest_checkpoints

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


def autoencoder_of(folder: Path) -> SceneAutoencoder:
    """The autoencoder of a folder's first stage, or the shipped one where that stage has not begun."""
    checkpoints = folder / "checkpoints"
    if not newest_checkpoints(checkpoints, "autoencoder"):
        return scene_autoencoder.shipped()
    return scene_autoencoder.load_trained(sizes.AUTOENCODER, autoencoder_pictures(folder), checkpoints)


def add_latents(folder: Path, count: int) -> None:
    """Renders and encodes the next `count` shards that have no latents yet."""
    done = set(latent_set.finished_shards(folder / "latents"))
    rendered = [n for n in range(sizes.SHARDS) if (folder / "pictures" / f"pictures_{n:03d}.npz").exists()]
    order = [n for n in (*rendered, *range(sizes.SHARDS)) if n not in done]
    numbers = list(dict.fromkeys(order))[:count]
    for number in numbers:
        pictures.render_shard(folder / "pictures", number, sizes.PICTURE)
    scene_autoencoder.encode_shards(autoencoder_of(folder), folder / "pictures", folder / "latents", numbers)
    latents = folder / "latents"
    latent_set.write_ids(folder / "pictures", latents, latent_set.finished_shards(latents))


def train(folder: Path, stages: tuple[str, ...], stop: Callable[[], bool], shards: int,
          compiled: bool = False, begun: Path | None = None) -> None:
    """Runs the given stages in order, each until it is finished or `stop()` is true.

    Args:
        folder: of pictures, latents and checkpoints.
        stages: some of `STAGES`.
        stop: called before every step; once it is true, the stage in progress saves and all end.
        shards: how many further shards get latents first.
        compiled, begun: of the transformers, see `denoisers.train_flow`.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (folder / "pictures").mkdir(exist_ok=True)
    if "autoencoder" in stages:
        images, plan = autoencoder_pictures(folder), sizes.AUTOENCODER_PLAN
        run = scene_autoencoder.train_both(sizes.AUTOENCODER, images, checkpoints, plan, stop)
        if not run.finished:
            return
    if {"unet", *FLOWS} & set(stages):
        add_latents(folder, shards)
        train_denoisers(folder, stages, stop, compiled, begun)
    if "decoder" in stages and not stop():
        images = autoencoder_pictures(folder)
        scene_autoencoder.train_decoder(sizes.AUTOENCODER, images, checkpoints, sizes.DECODER_PLAN, stop)
    if "judge" in stages and not stop():
        parts_classifier.train(folder / "judge", stop=stop).save(folder / "judge" / "parts.safetensors")


def train_denoisers(folder: Path, stages: tuple[str, ...], stop: Callable[[], bool],
                    compiled: bool = False, begun: Path | None = None) -> None:
    """The UNet, then the transformers, on all latents that exist."""
    data, checkpoints = latent_set.load(folder / "latents"), folder / "checkpoints"
    print(f"{len(data.latents)} pictures", flush=True)
    if "unet" in stages:
        denoisers.train_unet(sizes.UNET, data, checkpoints, sizes.UNET_PLAN, stop)
    for kind, (config, scale, plan) in FLOWS.items():
        if kind in stages and not stop():
            denoisers.train_flow(kind, config, scale, data, checkpoints, plan, stop, compiled=compiled,
                                 begun=begun)
