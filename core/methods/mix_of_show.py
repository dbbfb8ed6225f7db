"""Mix-of-Show (Gu et al., NeurIPS 2023, arXiv 2305.18292): ED-LoRA per concept, then gradient fusion into one
set of weights.

From the paper and its released code: a concept is two layer-wise words (one random, one from the class noun;
Sec. 4.1) and rank-4 deltas, with rates 1e-3 for words and 1e-4 for weights. Gradient fusion (Sec. 4.2) solves
for every linear layer `W = argmin_W sum_i ||(W_0 + dW_i) X_i - W X_i||_F^2` with L-BFGS. X_i are the layer's
inputs under concept i. For keys and values they are the text features of the concept's words and the end
token in "{concept}" and "photo of a {concept}"; for the others, what passes through them in 20 denoising
steps of the concept's own model.

Ours: the least squares are solved in closed form, with a ridge towards W_0 in place of L-BFGS's early end.
The answer is then unique: the smallest change that does what the concepts' own models do. Only the sites'
projections are adapted; the paper also adapts the text encoder and all attention layers. The prompts are
"{concept}" and "a photo of {concept}". Of the recorded inputs, the leading directions of their second moment
are kept. The released code's attention regulariser and its dropout of keys and values are left out. Removing
another concept than the newest leaves its share in later records until the next task fuses anew.

Shared state per concept: what its layers read and what its own deltas make of that. This takes rows × 50,000
numbers for q and out of SD1.5 (6 MB in float16 with 64 rows) and 1 MB for its text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.adapters import AdapterProcessor
from ..bank.composition import SUM
from ..conditioning.encoding import encode_concept
from ..data.batch import Batch
from ..model.least_squares import Rows, fit
from ..model.storage import stored_dtype
from ..neurons.recording import RECORDED, record_moments
from ..settings import above, between
from .base import Outcome, Task, register
from .fusion import CONCEPT_PROMPTS, fused_outcome, text_rows
from .low_rank import KEYS_AND_VALUES, LowRankConfig, LowRankMethod

GROUPS = {"text": KEYS_AND_VALUES, "picture": RECORDED}


@dataclass(frozen=True)
class MixOfShowConfig(LowRankConfig):
    """passes: denoising steps whose inputs are recorded; rows: leading directions kept per layer; ridge:
    towards the base, relative."""

    passes: int = 20
    rows: int = 64
    ridge: float = 1e-3

    limits = {"passes": between(1, 1000), "rows": between(1, 1024), "ridge": above(0)}


@register("mix_of_show", MixOfShowConfig,
          "each concept learned alone, all fused by least squares over the inputs of their layers")
class MixOfShow(LowRankMethod):
    composition = SUM
    builds_on_sum = False
    extra_key = "seen.size"
    config: MixOfShowConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.seed = task.draw_seed()
        self.size = (0, 0)      # (h, w) of the latents; zeros before the first batch

    def on_batch(self, batch: Batch) -> Batch:
        height, width = batch.latents.shape[-2:]
        self.size = height, width
        return batch

    @torch.no_grad()
    def finish(self) -> Outcome:
        """Fuses by X_i and dW_i X_i in two groups; without a batch there is no "picture" group."""
        c, backbone, name = self.config, self.task.backbone, self.task.name
        dtype = stored_dtype(c.stored)
        words, deltas = self.words.stored(dtype), self.adapters.stored(dtype)
        text = text_rows(backbone, words, name)
        rows = {"text": {key: Rows.of(text[key[0]], delta) for key, delta in deltas.items()
                         if key[1] in GROUPS["text"]}}
        if min(self.size) > 0:
            context = encode_concept(backbone, name, words, ["", *CONCEPT_PROMPTS])
            recorder = record_moments(backbone, context, AdapterProcessor(self.adapters), self.size,
                                      c.passes, self.seed)
            rows["picture"] = {key: Rows.of(recorder.leading(key, c.rows), delta)
                               for key, delta in deltas.items() if key[1] in GROUPS["picture"]}
        return fused_outcome(self.task.bank, self.name, words, rows, lambda rows: fit(rows, c.ridge), dtype)

    def extra_state(self) -> Tensor:
        return torch.tensor(self.size)

    def load_extra_state(self, state: Tensor) -> None:
        height, width = state.tolist()
        self.size = height, width
