"""Nodes with optional settings of ConceptLearner, for training and for some methods. The inputs are generated
from the configurations.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from comfy_api.latest import io

from ..core.methods import METHODS, make
from ..core.training.config import TrainingConfig
from ..core.training.optimizers import LIBRARIES, MATRICES, OPTIMIZERS
from . import types
from .inputs import setting_inputs
from .schema import Schema

TRAINING = ("optimizer", "schedule", "warmup", "max_grad_norm", "min_snr_gamma", "noise_offset",
            "accumulation", "gradient_checkpointing", "precision", "framing", "flip", "prior_weight",
            "caption_dropout", "checkpoint_every", "replay", "timestep_sampling")
CIDM = ("rank", "scale", "layerwise", "gamma1", "gamma2", "orthogonality", "shared", "shared_rank",
        "attention_weight", "token_norm_stop")


class ConceptTrainingSettings(io.ComfyNode):
    """Training settings that rarely need changes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        optimizers = [*OPTIMIZERS, *MATRICES, *(name for name, (module, _) in LIBRARIES.items()
                                                if find_spec(module.partition(".")[0]))]
        return Schema(
            node_id="ConceptTrainingSettings",
            display_name="Concept Training Settings",
            category=types.ADVANCED,
            description="Optional settings of the training loop, for Concept Learner's training_settings.",
            inputs=setting_inputs(TrainingConfig, TRAINING, optimizer={"options": optimizers},
                                  replay={"optional": True},
                                  timestep_sampling={"optional": True}),
            outputs=[types.Settings.Output(display_name="training_settings")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        replace(TrainingConfig(), **settings)  # shows an error here, not in the learner
        return io.NodeOutput(settings)


class WordBoundSettings(io.ComfyNode):
    """The settings of word-bound concepts (methods/bound.py)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="WordBoundSettings",
            display_name="Word-Bound Settings",
            category=types.ADVANCED,
            description="Optional settings of the method 'bound', for Concept Learner's method_settings.",
            inputs=setting_inputs(METHODS["bound"].config, ("rank", "scale", "layerwise", "apart")),
            outputs=[types.Settings.Output(display_name="method_settings")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        make("bound", settings)
        return io.NodeOutput(settings)


class SlotSettings(io.ComfyNode):
    """The settings of slots (methods/slots.py)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="SlotSettings",
            display_name="Slot Settings",
            category=types.ADVANCED,
            description="Optional settings of the method 'slots', for Concept Learner's method_settings.",
            inputs=setting_inputs(METHODS["slots"].config, ("slots", "learn_words", "rank")),
            outputs=[types.Settings.Output(display_name="method_settings")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        make("slots", settings)
        return io.NodeOutput(settings)


class CIDMSettings(io.ComfyNode):
    """The settings of CIDM (methods/cidm.py)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="CIDMSettings",
            display_name="CIDM Settings",
            category=types.ADVANCED,
            description="Optional settings of the method CIDM, for Concept Learner's method_settings. The "
                        "defaults are the paper's.",
            inputs=setting_inputs(METHODS["cidm"].config, CIDM),
            outputs=[types.Settings.Output(display_name="method_settings")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        make("cidm", settings)
        return io.NodeOutput(settings)


NODES = [ConceptTrainingSettings, WordBoundSettings, SlotSettings, CIDMSettings]
