"""The node ConceptJudgeSettings, and what Concept Learner does with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import comfy.model_management
from comfy_api.latest import io
from torch import Tensor

from ..core.bank.bank import ConceptBank
from ..core.data.pictures import Picture
from ..core.errors import ConceptError
from ..core.evaluation.bankcheck import Encode
from ..core.evaluation.states import (
    MOST_SAMPLES,
    MOST_STATES,
    Judging,
    judge_states,
    proposed,
    states_picture,
    thumbnailed,
)
from ..core.images import to_tensor
from ..core.methods import Task
from ..core.sampling.settings import SampleSettings
from ..core.training.record import Learned
from . import types
from .inputs import lines_of
from .schema import Schema


class ConceptJudgeSettings(io.ComfyNode):
    """Which states of a concept are kept and compared while it is learned."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptJudgeSettings",
            display_name="Concept Judge Settings",
            category=types.ADVANCED,
            search_aliases=["sample prompts", "checkpoints", "best epoch", "validation"],
            description="Keeps several states of a concept while it is learned. Draws your sample prompts "
                        "with each state and proposes the best one. For Concept Learner's judging.",
            inputs=[
                io.Int.Input("states", display_name="kept states", default=4, min=1, max=MOST_STATES,
                             tooltip="How many states are kept, evenly spaced over the steps; the last one "
                                     "is the end."),
                io.String.Input("sample_prompts", default="", multiline=True,
                                tooltip="One prompt per line with <name> in it, such as a pose or place that "
                                        "your photos lack. Empty = a place that no caption mentions."),
                io.Int.Input("samples", default=4, min=1, max=MOST_SAMPLES,
                             tooltip="Pictures of each prompt, always from the same seeds. More pictures "
                                     "make the figures more certain and take longer."),
            ],
            outputs=[types.Settings.Output(display_name="judging")],
        )

    @classmethod
    def execute(cls, states, sample_prompts, samples) -> io.NodeOutput:
        judging = Judging(states, tuple(lines_of([sample_prompts])), samples)
        return io.NodeOutput(asdict(judging))


def judging_of(settings: object, encode: Encode | None) -> Judging | None:
    """What the input `judging` holds; None if nothing is connected.

    Raises:
        ConceptError: It is no judging, or nothing can compare pictures. Prompts are not checked yet.
    """
    if settings is None:
        return None
    if not isinstance(settings, dict) or set(settings) != {"states", "prompts", "samples"}:
        raise ConceptError("judging holds other settings; connect Concept Judge Settings")
    if encode is None:
        raise ConceptError("judging compares pictures with the photos, and clip_vision is not connected; "
                           "connect Load CLIP Vision, or install the encoder for photos")
    return Judging(**settings)


def judged(judging: Judging, task: Task, learned: Learned, photos: Sequence[Picture], encode: Encode,
           settings: SampleSettings, seed: int) -> tuple[ConceptBank, Tensor, list[str]]:
    """The bank with the proposed state, the picture of all states `[1, H, W, 3]` in 0..1, and notes."""
    cancel = comfy.model_management.throw_exception_if_processing_interrupted
    prompts = judging.prompts_for(task.name, task.kind, [photo.caption for photo in photos])
    states = judge_states(task, learned.kept, prompts, [photo.pixels for photo in photos], encode,
                          replace(settings, batch=1), seed, judging.samples, before_each=cancel)
    chosen = proposed(states)
    notes = [f"{state.describe()}{', proposed' if i == chosen else ''}" for i, state in enumerate(states)]
    bank = task.grown(thumbnailed(states[chosen]), learned.bank.shared)
    return bank, to_tensor(states_picture(states)), [*notes, f"sample prompts: {'; '.join(prompts)}"]


NODES = [ConceptJudgeSettings]
