"""Settings of a training run, checked where they enter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConceptError

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
LR_SCHEDULES = ("constant", "linear", "cosine")
EIGHT_BIT = ("AdamW8bit", "Adam8bit", "PagedAdamW8bit", "Lion8bit")      # bitsandbytes': a quarter of the optimiser's memory
UNFIT = {"LBFGS": "needs closures", "SparseAdam": "needs sparse gradients", "Muon": "takes matrices only"}


def optimizer_class(name: str) -> type[torch.optim.Optimizer] | None:
    """The optimiser of that name; None for one that there is not here, or that cannot train a concept."""
    home = torch.optim
    if name in EIGHT_BIT:
        try:
            import bitsandbytes.optim as home
        except (ImportError, OSError, RuntimeError):      # not installed, or not for this machine's driver
            return None
    kind = getattr(home, name, None)
    fits = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    return kind if fits and name not in UNFIT else None


@dataclass(frozen=True)
class TrainingConfig:
    """Everything about a run that is not the method's.

    steps: optimiser steps; batch_size: own pictures per forward pass (as many prior pictures come on top); accumulation: forward passes
    per step; resolution in pixels; optimizer: any class of torch.optim by name, or one of EIGHT_BIT; schedule: of the learning rates,
    after `warmup` steps; framing: see framing.Framing; max_grad_norm: 0 = no clipping; min_snr_gamma: 0 = off, 5 is usual; noise_offset:
    0 = off, CIDM's code 0.01; precision: of the frozen base's arithmetic, trainables stay fp32; prior_weight: of prior-preservation
    pictures; caption_dropout: share of empty prompts; patience: learning ends early when so many looks, `look_every` steps apart, were
    no better than those before them (see looks.has_stalled), 0 = never.
    """

    steps: int = 800
    batch_size: int = 1
    accumulation: int = 1
    resolution: int = 512
    framing: str = "crop"
    flip: bool = True
    seed: int = 0
    optimizer: str = "AdamW"
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup: int = 0
    max_grad_norm: float = 1.0
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0
    precision: str = "float32"
    gradient_checkpointing: bool = False
    prior_weight: float = 1.0
    caption_dropout: float = 0.0
    checkpoint_every: int = 0
    patience: int = 0
    look_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "resolution"):
            self._check(getattr(self, name) >= 1, name, "1 or more")
        for name in ("weight_decay", "warmup", "max_grad_norm", "min_snr_gamma", "noise_offset", "prior_weight", "checkpoint_every",
                     "patience", "look_every"):
            self._check(getattr(self, name) >= 0, name, "0 or more")
        self._check(self.look_every > 0 or self.patience == 0, "look_every", "1 or more where patience is not 0")
        self._check(0 <= self.caption_dropout < 1, "caption_dropout", "0 to below 1")
        self._check(self.precision in PRECISIONS, "precision", ", ".join(PRECISIONS))
        self._check(self.schedule in LR_SCHEDULES, "schedule", ", ".join(LR_SCHEDULES))
        self._check(optimizer_class(str(self.optimizer)) is not None, "optimizer", "a class of torch.optim such as AdamW, Adam, SGD, or "
                    f"one of {', '.join(EIGHT_BIT)} where bitsandbytes is installed; not "
                    + ", ".join(f"{name} ({why})" for name, why in UNFIT.items()))

    def _check(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise ConceptError(f"setting '{name}' is {getattr(self, name)!r}; allowed: {allowed}")
