"""Settings of a training run, checked when they are created."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data.framing import FRAMINGS
from ..errors import ConceptError
from ..model.schedule import Schedule
from ..settings import SEED, at_least, between, check, one_of, require, setting
from .optimizers import OPTIMIZERS, allowed_optimizers, check_with_schedule, optimizer_class

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIMESTEP_SAMPLINGS = ("uniform", "logit-normal")
LR_SCHEDULES = ("constant", "linear", "cosine")
MOST_PHOTOS = 4096      # of a batch; the lists of a much larger one would fill the memory of any machine


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run that are independent of the method. Trained parameters are always float32."""

    steps: int = setting(800, "Optimiser steps. CIDM's paper uses 800.", 1, 100_000)
    batch_size: int = setting(1, "Photos per forward pass. More photos make training steadier and slower.",
                              1, 64)
    accumulation: int = setting(1, "Forward passes per optimiser step; 1 = no accumulation.", 1, 64)
    resolution: int = setting(512, "Side of the training pictures in pixels.", 16, 2048, 8)
    framing: str = setting("crop", "crop fills the square; pad shows the whole photo on grey; buckets keeps "
                           "each photo's shape and never enlarges it.", choices=FRAMINGS)
    flip: bool = setting(True,
                         "Also learn from mirrored photos. Switch it off for text and asymmetric things.")
    seed: int = setting(0, "The same seed gives the same result.", 0, 0xFFFFFFFF)
    optimizer: str = setting("AdamW", "Optimisers of PyTorch, and those of installed libraries: prodigyopt, "
                             "schedulefree, came-pytorch, bitsandbytes (8 bit).",
                             choices=OPTIMIZERS)
    weight_decay: float = setting(0.01, "Weight decay of the optimiser; 0 = none.", 0.0, 1.0, 0.001)
    schedule: str = setting("linear", "Learning-rate schedule after the warm-up.", choices=LR_SCHEDULES)
    warmup: int = setting(0, "Steps until the full learning rate; 0 = none.", 0, 10_000)
    max_grad_norm: float = setting(1.0, "Largest norm of the gradient; 0 = no clipping.", 0.0, 100.0, 0.1)
    min_snr_gamma: float = setting(0.0, "Min-SNR weighting of the loss; 0 = off, 5 is usual.", 0.0, 20.0, 0.5)
    noise_offset: float = setting(0.0, "Offset noise; 0 = off, CIDM's code uses 0.01.", 0.0, 1.0, 0.01)
    precision: str = setting("float32", "Number format of the base's computations while training.",
                             choices=tuple(PRECISIONS))
    gradient_checkpointing: bool = setting(False, "Saves memory and takes about a third more time.")
    prior_weight: float = setting(1.0, "Loss weight of the prior pictures; 0 = ignore them.", 0.0, 10.0, 0.1)
    caption_dropout: float = setting(0.0, "Share of captions replaced by empty ones; 0 = none.",
                                     0.0, 0.9, 0.05)
    checkpoint_every: int = setting(
        100, "Steps between checkpoints of the run; 0 = only when it is cancelled or fails.", 0, 10_000)
    patience: int = setting(0, "Training stops after this many evaluations without improvement; 0 = never.",
                            0, 100)
    look_every: int = setting(0, "Steps between two evaluations; 0 = none.", 0, 10_000)
    replay: int = setting(16, "When a concept is refined, this many pictures of it are drawn first and "
                              "trained on, so that it keeps what it has learned; 0 = none.", 0, 256)
    timestep_sampling: str = setting(
        "uniform", "How timesteps are drawn: evenly, or logit-normal, which prefers the middle of the base's "
        "schedule.", choices=TIMESTEP_SAMPLINGS)

    def __post_init__(self) -> None:
        positive = dict.fromkeys(("steps", "batch_size", "accumulation", "resolution"), at_least(1))
        positive["batch_size"] = between(1, MOST_PHOTOS)
        others = dict.fromkeys(("weight_decay", "warmup", "max_grad_norm", "min_snr_gamma", "noise_offset",
                                "prior_weight", "checkpoint_every", "patience", "look_every", "replay"),
                               at_least(0))
        check(self, {**positive, **others, "seed": SEED, "framing": one_of(FRAMINGS),
                     "precision": one_of(tuple(PRECISIONS)), "schedule": one_of(LR_SCHEDULES),
                     "timestep_sampling": one_of(TIMESTEP_SAMPLINGS),
                     "caption_dropout": (lambda value: 0 <= value < 1, "0 to below 1")})
        require(self.look_every > 0 or self.patience == 0, "look_every", self.look_every,
                "1 or more where patience is not 0")
        require(optimizer_class(self.optimizer) is not None, "optimizer", self.optimizer,
                allowed_optimizers())
        check_with_schedule(self.optimizer, self.schedule)

    def check_schedule(self, schedule: Schedule) -> None:
        """Raises ConceptError if the base cannot be trained with these settings."""
        if self.min_snr_gamma > 0 and not schedule.has_snr_weights:
            raise ConceptError(f"setting 'min_snr_gamma' is {self.min_snr_gamma:g}; allowed: 0 for a base "
                               "that is trained by flow matching")
