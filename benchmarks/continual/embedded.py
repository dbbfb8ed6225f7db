"""The continual benchmark on the embedded base: its suite, and the settings that fit so small a base."""

from __future__ import annotations

from ...core.demo.judges import PLACES, SceneEncoder, assignment_of
from ...core.model.backbone import Backbone
from ...core.sampling.settings import SampleSettings
from ...core.training.config import TrainingConfig
from . import suites
from .concepts import concepts
from .sequence_run import Suite

SETTINGS = SampleSettings(steps=16, cfg=3.0, size=(64, 64), batch=24)
SEEDS = tuple(range(100, 108))
GROUP_SEEDS = tuple(range(300, 306))
PAIR_SEEDS = tuple(range(300, 348))
RATES = {"lr": 2e-3, "token_lr": 2e-2}      # a base 200 times smaller than SD1.5 learns at higher rates
OWN_RATES: dict[str, dict] = {      # where others did clearly better on two tasks
    "custom_diffusion_merge": {"lr": 3e-3},
    "l2dm": {"replay": 4, "mu": 2.0, "generation_steps": 20, "cfg": 1.0},
}


def training(steps: int, seed: int) -> TrainingConfig:
    return TrainingConfig(steps=steps, batch_size=4, resolution=64, flip=True, schedule="cosine", warmup=20, seed=seed)


def settings_of(method: str) -> dict:
    return {**RATES, **OWN_RATES.get(method, {})}


def suite(backbone: Backbone, count: int) -> tuple[Suite, dict]:
    """The suite of a sequence's first `count` concepts, and what the untrained base and real pictures reach."""
    encoder = SceneEncoder()
    tasks = tuple(assignment_of(concept, seed=7 + i) for i, concept in enumerate(concepts(count)))
    noun, text, real = suites.levels(backbone, tasks, encoder, SETTINGS, SEEDS)
    groups, pairs = suites.groups_and_pairs(tasks)
    weights = sum(parameter.numel() for parameter in backbone.unet.parameters())
    made = Suite(tasks, groups, pairs, tuple(f"a photo of {{}} {place}" for place in PLACES[:4]), suites.unrelated_prompts(tasks), encoder,
                 SETTINGS, SEEDS, GROUP_SEEDS, PAIR_SEEDS, suites.halfway(noun, real), weights)
    return made, suites.untrained(noun, text, real)
