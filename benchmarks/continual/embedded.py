"""The continual benchmark on the embedded base: prompt suite, and settings for such a small base."""

from __future__ import annotations

from ...core.demo.base import load_base
from ...core.demo.judges import PLACES, SceneEncoder, assignment_of
from ...core.hosts.diffusers import DiffusersBackbone
from ...core.sampling.settings import SampleSettings
from ...core.training.config import TrainingConfig
from . import prompt_suite
from .concepts import concepts
from .prompt_suite import Benchmark, PromptSuite

STEPS = 200
SETTINGS = SampleSettings(steps=16, cfg=3.0, size=(64, 64), batch=24)
SEEDS = tuple(range(100, 108))
GROUP_SEEDS = tuple(range(300, 306))
PAIR_SEEDS = tuple(range(300, 348))
RATES = {"lr": 2e-3, "token_lr": 2e-2}      # 200 times smaller than SD1.5: needs higher rates
OWN_RATES: dict[str, dict] = {      # settings that were clearly better than the defaults on two tasks
    "custom_diffusion_merge": {"lr": 3e-3},
    "l2dm": {"replay": 4, "mu": 2.0, "generation_steps": 20, "cfg": 1.0},
}


def training(steps: int, seed: int) -> TrainingConfig:
    return TrainingConfig(steps=steps, batch_size=4, resolution=64, flip=True, schedule="cosine", warmup=20,
                          seed=seed)


def settings_of(method: str) -> dict:
    return {**RATES, **OWN_RATES.get(method, {})}


def suite_of(backbone: DiffusersBackbone, count: int) -> tuple[PromptSuite, dict]:
    """The prompt suite of the first `count` concepts, and the levels of the untrained base and of real
    pictures.
    """
    encoder = SceneEncoder()
    tasks = tuple(assignment_of(concept, seed=7 + i) for i, concept in enumerate(concepts(count)))
    noun, text, real = prompt_suite.levels(backbone, tasks, encoder, SETTINGS, SEEDS)
    groups, pairs = prompt_suite.groups_and_pairs(tasks)
    combined = tuple(f"a photo of {{}} {place}" for place in PLACES[:4])
    weights = backbone.parameter_count
    suite = PromptSuite(tasks, groups, pairs, combined, prompt_suite.unrelated_prompts(tasks), encoder,
                        SETTINGS, SEEDS,
                        GROUP_SEEDS, PAIR_SEEDS, prompt_suite.halfway(noun, real), weights)
    return suite, prompt_suite.untrained(noun, text, real)


def embedded_benchmark(count: int, steps: int) -> Benchmark:
    """The benchmark on the embedded base with drawn pictures. count: number of tasks; steps: steps per task.
    """
    backbone = load_base()
    suite, untrained = suite_of(backbone, count)
    return Benchmark(backbone, suite, untrained, lambda seed: training(steps, seed), settings_of)
