"""Random models, concepts and prompts for benchmarks of speed and memory, and the measuring functions."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...core.model.context import Context
from ...core.model.deltas import Deltas, LowRankDelta
from ...core.model.sites import PROJECTIONS, SiteLayout
from ...core.model.slots import SLOTS, SlotDelta

_FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}
DRAWN = 2**22      # random numbers of a weight at most
TOKENS, WIDTH = 77, 768      # shape of SD1.5's encoded prompts
# arguments of diffusers' UNet that differ from its defaults (SD1.5)
UNETS: dict[str, dict] = {
    "sd15": {"cross_attention_dim": WIDTH},
    "sdxl": {"cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
             "transformer_layers_per_block": (1, 2, 10),
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
             "attention_head_dim": (5, 10, 20),
             "use_linear_projection": True, "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}


def deltas_of(layout: SiteLayout, seed: int, rank: int = 4, size: float = 0.01) -> Deltas:
    """Low-rank deltas of all projections of all sites."""
    generator, deltas = torch.Generator().manual_seed(seed), {}
    for site in layout.sites:
        for projection in PROJECTIONS:
            a, b = site.shape(projection)
            up = size * torch.randn(a, rank, generator=generator)
            down = torch.randn(rank, b, generator=generator) * b**-0.5
            deltas[site.index, projection] = LowRankDelta(up, down)
    return deltas


def slots_of(layout: SiteLayout, seed: int, count: int = 8) -> Deltas:
    """Slots at all sites."""
    generator, shapes = torch.Generator().manual_seed(seed), [(count, site.width) for site in layout.sites]
    return {(site.index, SLOTS): SlotDelta(torch.randn(shape, generator=generator),
                                           0.01 * torch.randn(shape, generator=generator), site.heads)
            for site, shape in zip(layout.sites, shapes, strict=True)}


def context_of(batch: int, copies: int, seed: int, words: dict[str, tuple[int, ...]]
               | None = None) -> Context:
    """`batch` random prompts. words: word positions of the last one."""
    hidden = torch.randn(batch, copies, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Context(hidden, None, ({},) * (batch - 1) + (words or {},))


def _resident(row: str) -> float:
    """GiB of this process: `VmRSS`, or its peak since the peak was reset, `VmHWM`.

    Raises OSError or KeyError if the system does not report it.
    """
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
                if ":" in line)
    return int(rows[row].split()[0]) / 2**20


def held_gb() -> float | None:
    """GiB that this process holds, on the graphics card if there is one; None if the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    with suppress(OSError, KeyError):
        return _resident("VmRSS")
    return None


def peak_gb(run: Callable[[], object]) -> float | None:
    """Peak memory in GiB while `run` runs, of the graphics card if there is one, else of the process.

    None if the system does not report it.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")      # Linux: resets the peak
    run()
    try:
        return _resident("VmHWM")
    except (OSError, KeyError):
        return None


class Operations(TorchDispatchMode):
    """Counts operations that launch kernels: each is at least one kernel launch on a graphics card.

    Views and operations with an empty result do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(argument.alias_info is not None and not argument.alias_info.is_write
                      for argument in func._schema.arguments)
        out = func(*args, **(kwargs or {}))
        is_empty = isinstance(out, torch.Tensor) and out.numel() == 0
        self.count += not (is_view or is_empty or func.overloadpacket.__name__ in _FREE)
        return out


def seconds(run: Callable[[], object], rounds: int = 2) -> float:
    """The smallest time of several calls. The first call also warms up."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def normals(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Normal random numbers. Large tensors repeat their first ones, because drawing billions takes minutes.
    """
    few = torch.randn(min(shape.numel(), DRAWN), generator=generator)
    return few.repeat(-(-shape.numel() // DRAWN))[:shape.numel()].view(shape)


def random_weights(module: nn.Module) -> None:
    """Fills a module with random weights, scaled so that activations stay finite."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.state_dict().items():
        if not weight.dtype.is_floating_point:      # buffers of position ids
            continue
        if "embedding" in name:
            weight.copy_(0.02 * normals(weight.shape, generator))
        elif weight.ndim > 1:
            weight.copy_(weight[0].numel()**-0.5 * normals(weight.shape, generator))
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)


def random_unet(shape: str = "sd15") -> nn.Module:
    """A random diffusers UNet of a shape, on the graphics card if there is one."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**UNETS[shape])
    random_weights(unet)
    return unet.to("cuda" if torch.cuda.is_available() else "cpu")


def sd15_backbone(text: tuple = ()):
    """A backbone with a random UNet and no autoencoder. text: its text encoders, if prompts are encoded."""
    from ...core.hosts.diffusers import DiffusersBackbone
    from ...core.model.schedule import NoiseSchedule, cumulative_alphas

    vae = nn.Module()
    vae.config = SimpleNamespace(block_out_channels=(0,) * 4, latent_channels=4)      # nothing else is used
    return DiffusersBackbone(random_unet(), vae, text, NoiseSchedule(cumulative_alphas(0.00085, 0.012)))
