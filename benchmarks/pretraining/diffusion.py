"""Stage 2: trains text encoder and UNet together, with v prediction on cached latents and randomly drawn
captions.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core.demo import base, networks, vocabulary
from ...core.demo.bases import FILES
from ...core.demo.vocabulary import CONTEXT_LENGTH
from ...core.model.schedule import NoiseSchedule
from .loop import Run

CAPTION_DROPOUT = 0.1  # share of empty prompts, for the unconditional half of classifier-free guidance
# share of uniform timesteps; the others concentrate around the middle, where the content is decided
UNIFORM_SHARE = 0.3


def tokenize(tokenizer, captions: list[list[str]]) -> Tensor:
    """Token ids of all captions, `[N, captions per picture, tokens]` int16."""
    flat = [text for group in captions for text in group]
    ids = tokenizer(flat, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH).input_ids
    return torch.tensor(ids, dtype=torch.int16).view(len(captions), -1, CONTEXT_LENGTH)


def draw_timesteps(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """`[batch]` timesteps below `count`: a few uniform, most logit-normal around 0.55 (as in Stable Diffusion
    3, Esser et al. 2024).

    Measured here: sampling from a real picture noised to t = 850 gives as many wrong classes as from pure
    noise; from t = 500, a third of that.
    """
    middle = torch.sigmoid(0.2 + torch.randn(batch, generator=generator))
    uniform = torch.rand(batch, generator=generator)
    place = torch.where(torch.rand(batch, generator=generator) < UNIFORM_SHARE, uniform, middle)
    return (place * count).long().clamp(max=count - 1)


def train(
    tokenizer,
    latents: Tensor,
    ids: Tensor,
    folder: Path,
    steps: int,
    batch: int = 48,
    seed: int = 0,
    start: dict[str, nn.Module] | None = None,
) -> nn.ModuleDict:
    """Trains text encoder and UNet together.

    Args:
        tokenizer: Tokenizer of the captions.
        latents: `[N, 12, 16, 16]` with unit variance.
        ids: Token ids from `tokenize`.
        folder: Folder of the checkpoint.
        steps: Total number of steps.
        batch: Batch size over all processes.
        seed: Seed of weights and noise.
        start: Trained modules to continue from; None = new ones.
    """
    torch.manual_seed(seed)  # every process starts from the same weights
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch //= processes
    start = start or {"unet": networks.build_unet(), "text_encoder": networks.build_text_encoder(tokenizer)}
    modules = nn.ModuleDict({part: start[part] for part in ("unet", "text_encoder")}).requires_grad_(True)
    run = Run(modules, folder / "diffusion.pt", steps, lr=1.2e-3, muon=True)
    generator = torch.Generator().manual_seed(1009 * (seed + run.start) + rank)
    schedule = NoiseSchedule(networks.alphas_cumprod(), networks.SCHEDULE["prediction_type"])
    empty = tokenize(tokenizer, [[""]])[0, 0]
    for _ in run:
        index = torch.randint(len(latents), (batch,), generator=generator)
        x = latents[index].float()
        tokens = ids[index, torch.randint(ids.shape[1], (batch,), generator=generator)]
        tokens = torch.where(torch.rand(batch, 1, generator=generator) < CAPTION_DROPOUT, empty,
                             tokens).long()
        t = draw_timesteps(batch, len(schedule), generator)
        noise = torch.randn(x.shape, generator=generator)
        noisy, target = schedule.add_noise(x, noise, t), schedule.target(x, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            context = modules["text_encoder"](tokens).last_hidden_state
            output = modules["unet"](noisy, t, context, return_dict=False)[0]
        run.after((output.float() - target).square().mean())
    run.ema.copy_into_modules()
    return modules.eval()


def worker(rank: int, processes: int, folder: Path, steps: int, from_shipped: bool) -> None:
    """One of several processes, with a share of the cores and of every batch.

    A module-level function, because spawned processes import it.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    if processes > 1:
        rendezvous = f"file://{(folder / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    cached = torch.load(folder / "latents.pt", weights_only=True)
    start = base.load_modules(FILES["embedded-64"]) if from_shipped else None
    train(vocabulary.load(base.TOKENIZER), cached["latents"], cached["ids"], folder, steps, start=start)
