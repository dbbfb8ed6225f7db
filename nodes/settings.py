"""The optional settings of ConceptLearner: of training, and of the methods that people tune."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from comfy_api.latest import io

from ..core.data.framing import MODES
from ..core.methods import make
from ..core.training.config import EIGHT_BIT, LR_SCHEDULES, PRECISIONS, TrainingConfig
from . import types
from .schema import Schema

OPTIMIZERS = ("AdamW", "Adam", "SGD", "Adafactor", "NAdam", "RAdam")


class ConceptTrainingSettings(io.ComfyNode):
    """What most people never need to touch about training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptTrainingSettings",
            display_name="Concept Training Settings",
            category=types.LEARNING,
            description="Optional settings of the training loop, for Concept Learner's training_settings.",
            inputs=[
                io.Combo.Input(
                    "optimizer", options=[*OPTIMIZERS, *(EIGHT_BIT if find_spec("bitsandbytes") else ())], default="AdamW",
                    tooltip="Torch's; those that end in 8bit are bitsandbytes', where it is installed."
                ),
                io.Combo.Input("schedule", options=list(LR_SCHEDULES), default="linear", tooltip="Of the learning rates."),
                io.Int.Input("warmup", default=0, min=0, max=10_000, tooltip="Steps until the full rate; 0 = none."),
                io.Float.Input("max_grad_norm", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="0 = no clipping."),
                io.Float.Input("min_snr_gamma", default=0.0, min=0.0, max=20.0, step=0.5, tooltip="0 = off; 5 is usual."),
                io.Float.Input("noise_offset", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="0 = off; CIDM's code uses 0.01."),
                io.Int.Input("accumulation", default=1, min=1, max=64, tooltip="Forward passes per step; 1 = none."),
                io.Boolean.Input("gradient_checkpointing", default=False, tooltip="Less memory, about a third more time."),
                io.Combo.Input("precision", options=list(PRECISIONS), default="float32", tooltip="Of the base's arithmetic in training."),
                io.Combo.Input(
                    "framing", options=list(MODES), default="crop",
                    tooltip="crop fills the square; pad shows the whole photo in it; buckets keep each photo's shape and enlarge none."
                ),
                io.Boolean.Input("flip", default=True, tooltip="Also learn from mirrored photos. Off for text and asymmetric things."),
                io.Float.Input("prior_weight", default=1.0, min=0.0, max=10.0, step=0.1, tooltip="Of prior pictures; 0 = ignore them."),
                io.Float.Input("caption_dropout", default=0.0, min=0.0, max=0.9, step=0.05, tooltip="Share of empty captions; 0 = none."),
                io.Int.Input(
                    "checkpoint_every",
                    default=100,
                    min=0,
                    max=10_000,
                    tooltip="Steps between safety copies of the run; 0 = only when it is cancelled or fails.",
                ),
            ],
            outputs=[types.Settings.Output(display_name="training_settings")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        replace(TrainingConfig(), **settings)  # says what is wrong here, not in the learner
        return io.NodeOutput(settings)


class WordBoundSettings(io.ComfyNode):
    """The settings of word-bound concepts (methods/bound.py)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="WordBoundSettings",
            display_name="Word-Bound Settings",
            category=types.LEARNING,
            description="Optional settings of the method 'bound', for Concept Learner's method_settings.",
            inputs=[
                io.Int.Input("rank", default=4, min=1, max=128, tooltip="Rank of the deltas: room for detail, and size of the concept."),
                io.Float.Input("scale", default=1.0, min=0.01, max=16.0, step=0.05, tooltip="Factor on the deltas; 1 = none."),
                io.Boolean.Input("layerwise", default=True, tooltip="A word for every layer, or one for all (exports as embedding)."),
                io.Boolean.Input(
                    "apart", default=True, tooltip="Words are encoded apart from the rest of the prompt: several concepts mix less."
                ),
            ],
            outputs=[types.Settings.Output(display_name="method_settings")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        make("bound", settings)
        return io.NodeOutput(settings)


class CIDMSettings(io.ComfyNode):
    """The settings of CIDM (methods/cidm.py)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="CIDMSettings",
            display_name="CIDM Settings",
            category=types.LEARNING,
            description="Optional settings of the method CIDM, for Concept Learner's method_settings. The defaults are the paper's.",
            inputs=[
                io.Int.Input("rank", default=4, min=1, max=128, tooltip="Rank of the deltas. Paper: 4."),
                io.Float.Input("scale", default=1.0, min=0.01, max=16.0, step=0.05, tooltip="Factor on the deltas; 1 = none."),
                io.Boolean.Input(
                    "layerwise", default=True, tooltip="A word for every layer (the paper's), or one for all (exports as embedding)."
                ),
                io.Float.Input("gamma1", default=0.1, min=0.0, max=100.0, step=0.01, tooltip="Task-specific loss R1; 0 = off. Paper: 0.1."),
                io.Float.Input("gamma2", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Task-shared loss R2; 0 = off. Paper: 1."),
                io.Combo.Input(
                    "orthogonality", options=["rr", "aa", "off"], default="rr", tooltip="Reading of R1: r x r (ours), a x a (printed)."
                ),
                io.Combo.Input(
                    "shared", options=["als", "gradient", "off"], default="als", tooltip="W* and H: solved, or the paper's step."
                ),
                io.Int.Input("shared_rank", default=8, min=1, max=256, tooltip="Rank of the common subspace W*."),
                io.Float.Input("attention_weight", default=0.01, min=0.0, max=10.0, step=0.01, tooltip="Attention regulariser; 0 = off."),
                io.Float.Input(
                    "token_norm_stop",
                    default=1.4,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Words stop learning at this many times the class noun's length; 0 = never.",
                ),
            ],
            outputs=[types.Settings.Output(display_name="method_settings")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        make("cidm", settings)
        return io.NodeOutput(settings)


NODES = [ConceptTrainingSettings, WordBoundSettings, CIDMSettings]
