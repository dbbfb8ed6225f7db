"""Trainers for comparison: diffusers with PEFT's LoRA on the same layers. Also a host without ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from ...core.errors import ConceptError
from ...core.hosts.diffusers import ClipText
from .synthetic import TOKENS, UNETS, WIDTH, random_unet, random_weights, sd15_backbone
from .training import Setup, Timing, optimizer_steps

RANK = 4


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def peft_loop(setup: Setup, steps: int) -> Timing:
    """The training loop of common scripts: LoRA on q, k, v and out of the same attention layers.

    Texts are encoded in advance.
    """
    from peft import LoraConfig

    side, unet = setup.side, random_unet(setup.shape).requires_grad_(False)
    if setup.checkpointing:
        unet.train()      # checkpointing needs training mode; there is no dropout
        unet.enable_gradient_checkpointing()
    names = [f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, TOKENS, UNETS[setup.shape]["cross_attention_dim"],
                       generator=generator).to(_device())
    added = None
    if setup.shape == "sdxl":
        added = {"text_embeds": text[:, 0, -1280:], "time_ids": torch.full((1, 6), 8.0 * side).to(_device())}

    def run() -> None:
        for _ in range(steps):
            x, target = (torch.randn(1, 4, side, side, generator=generator).to(_device()) for _ in range(2))
            is_mixed = setup.precision == "bfloat16"
            with torch.autocast(_device(), torch.bfloat16) if is_mixed else nullcontext():
                t = torch.tensor([500], device=_device())
                loss = F.mse_loss(unet(x, t, text, added_cond_kwargs=added).sample.float(), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()      # waits for the graphics card, for correct timing

    return optimizer_steps(run)


def peft_rival(setup: Setup) -> dict[str, Callable[[int], Timing]]:
    """The PEFT trainer by name; empty if PEFT is not installed."""
    if not (find_spec("peft") and find_spec("diffusers")):
        return {}
    return {"peft": lambda steps: peft_loop(setup, steps)}


class DiffusersHost:
    """UNet and text encoder of SD1.5's shape, without ComfyUI; the tokenizer is the embedded base's."""

    def __init__(self, setup: Setup) -> None:
        if setup.shape != "sd15":
            raise ConceptError(f"shape is '{setup.shape}'; allowed without ComfyUI: sd15")
        from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

        from ...core.demo import base

        tokenizer = AutoTokenizer.from_pretrained(base.TOKENIZER)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH,
                                            num_hidden_layers=12, num_attention_heads=12,
                                            eos_token_id=tokenizer.eos_token_id))
        random_weights(text)
        self.backbone = sd15_backbone((ClipText("clip_l", text.to(_device()), tokenizer),))
        self.setup = setup

    @property
    def weights(self) -> int:
        """Bytes of the weights of all models."""
        return self.backbone.loaded_weights(True)[0]

    def training(self):
        return nullcontext()

    def release(self) -> None:
        del self.backbone

    def rivals(self) -> Mapping[str, Callable[[int], Timing]]:
        return peft_rival(self.setup)
