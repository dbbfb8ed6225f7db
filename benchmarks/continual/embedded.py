"""The continual benchmark on the embedded base: prompt suites, and settings for such a small base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...core.demo.base import load_base
from ...core.demo.bases import file_of
from ...core.demo.judges import PLACES, SceneEncoder, assignment_of
from ...core.demo.scenes import SceneConcept
from ...core.hosts.diffusers import DiffusersBackbone
from ...core.sampling.settings import SampleSettings
from ...core.training.config import TrainingConfig
from . import tuned
from .concepts import concepts
from .judges import ENCODER, TEMPLATE, EncoderJudge
from .prompt_suite import Benchmark, PromptSuite, groups_and_pairs, unrelated_prompts
from .real_pictures import side_by_side
from .runs import BASE, settings_for
from .template_judge import TemplateJudge

STEPS = 200
SETTINGS = SampleSettings(steps=16, cfg=3.0, size=(64, 64), batch=24)
SEEDS = tuple(range(100, 124))
GROUP_SEEDS = tuple(range(300, 312))
PAIR_SEEDS = tuple(range(300, 348))
RATES = {"lr": 2e-3, "token_lr": 2e-2}      # 200 times smaller than SD1.5: needs higher rates
OWN_RATES: dict[str, dict] = {      # settings that were clearly better than the defaults on two tasks
    "custom_diffusion_merge": {"lr": 3e-3},
    "clora": {"forget": 10.0},      # at 1e3 and above later tasks learn their word alone, see docs/claims.md
    "l2dm": {"replay": 4, "mu": 2.0, "generation_steps": 20, "cfg": 1.0},
}


def training(steps: int, seed: int, side: int = 64) -> TrainingConfig:
    """Training configuration for pictures of `side` pixels."""
    return TrainingConfig(steps=steps, batch_size=4, resolution=side, flip=True, schedule="cosine", warmup=20,
                          seed=seed)


def usual_settings(method: str) -> dict:
    """The settings that a method has before it is tuned."""
    return {**RATES, **OWN_RATES.get(method, {})}


def settings_of(method: str, fingerprint: str = "") -> dict:
    """A method's settings: those chosen by tuning on the base with this fingerprint, where there are some.

    They can hold `runs.STYLE_RATE`, which is no setting of a method; see `settings_of_kind`.
    """
    return {**usual_settings(method), **tuned.chosen_settings(method, fingerprint)}


def settings_of_kind(method: str, fingerprint: str, kind: str) -> dict:
    """`settings_of` for a concept of this kind, as the method takes them."""
    return settings_for(settings_of(method, fingerprint), kind)


def suite_of(backbone: DiffusersBackbone, sequence: Sequence[SceneConcept]) -> PromptSuite:
    """The prompt suite of a sequence of drawn concepts, in the size of the base's pictures."""
    encoder, side = SceneEncoder(), backbone.picture_size
    by_name = {concept.name: concept for concept in sequence}
    tasks = tuple(assignment_of(concept, seed=7 + i, size=side) for i, concept in enumerate(sequence))
    groups, pairs = groups_and_pairs(tasks)
    judges = {ENCODER: EncoderJudge(encoder, tasks), TEMPLATE: TemplateJudge(sequence, tasks)}
    together = {group: side_by_side([by_name[name] for name in group], side) for group in (*groups, *pairs)}
    return PromptSuite(tasks, groups, pairs, tuple(f"a photo of {{}} {place}" for place in PLACES[:4]),
                       unrelated_prompts(tasks), encoder, judges, replace(SETTINGS, size=(side, side)), SEEDS,
                       GROUP_SEEDS, PAIR_SEEDS, backbone.parameter_count, together,
                       origin={"base": backbone.fingerprint, "pictures": len(SEEDS),
                               "group_pictures": len(GROUP_SEEDS)})


def embedded_benchmark(sequence: Sequence[SceneConcept], steps: int | None = None,
                       base_name: str = BASE) -> Benchmark:
    """The benchmark on an embedded base with drawn pictures.

    Args:
        sequence: The concepts, in the order in which order 0 learns them.
        steps: Steps per task; None = those chosen by tuning, else `STEPS`.
        base_name: Name of the embedded base.
    """
    backbone = load_base(file_of(base_name))
    side, base = backbone.picture_size, backbone.fingerprint
    return Benchmark(backbone, suite_of(backbone, sequence), lambda count, seed: training(count, seed, side),
                     lambda method: settings_of(method, base),
                     lambda method: steps or tuned.chosen_steps(method, base) or STEPS)


def ten_and_more(count: int, steps: int | None, base_name: str = BASE) -> Benchmark:
    """`embedded_benchmark` of the first `count` concepts."""
    return embedded_benchmark(concepts(count), steps, base_name)
