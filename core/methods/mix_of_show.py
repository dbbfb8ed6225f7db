"""Mix-of-Show (Gu et al., NeurIPS 2023, arXiv 2305.18292): ED-LoRA per concept, then gradient fusion into one
set of weights.

From the paper and its released code: a concept is two layer-wise words (one random, one from the class noun;
Sec. 4.1) and rank-4 deltas, with rates 1e-3 for words and 1e-4 for weights. Gradient fusion (Sec. 4.2) solves
for every linear layer `W = argmin_W sum_i ||(W_0 + dW_i) X_i - W X_i||_F^2` with L-BFGS. X_i are the layer's
inputs under concept i. For keys and values they are the text features of the concept's words and the end
token in "{concept}" and "photo of a {concept}"; for the others, what passes through them in 20 denoising
steps of the concept's own model.

Ours: the least squares are solved in closed form, with a ridge towards W_0 (`ridge`, relative to the mean
diagonal) in place of L-BFGS's early end. The answer is then unique: the smallest change that does what the
concepts' own models do. Only the sites' projections are adapted; the paper also adapts the text encoder and
all attention layers. The prompts are "{concept}" and "a photo of {concept}". Recorded inputs are kept as the
`rows` leading directions of their second moment. The released code's attention regulariser and its dropout of
keys and values are left out. The record of a task is fused_t - fused_{t-1}, so that all records add up to the
fused weights. Removing another concept than the newest leaves its share in later records until the next task
fuses anew.

Shared state per concept: what its layers read and what its own deltas make of that. This takes rows × 50,000
numbers for q and out of SD1.5 (6 MB in float16 with 64 rows) and 1 MB for its text. Fusion runs once, after a
task; no training step depends on old concepts. """

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bank.composition import SUM
from ..bank.concepts import ConceptInfo
from ..bank.prompts import Vocabulary
from ..bank.tokens import TokenGroup
from ..conditioning.encoding import encode_prompts
from ..data.batch import Batch
from ..model.backbone import AttentionProcessor, Backbone, Context
from ..model.deltas import DeltaKey
from ..model.sites import Site
from ..model.solver import Ddim, denoise, guided
from ..model.storage import stored_dtype
from .adapters import AdapterProcessor
from .base import Outcome, Task, register
from .config import RankConfig, above, between
from .fusion import CONCEPT_PROMPTS, Rows, fit, fused_outcome, text_rows
from .low_rank import KEYS_AND_VALUES, LowRankMethod

GROUPS = {"text": KEYS_AND_VALUES, "picture": ("to_q", "to_out")}
GUIDANCE = 5.0      # of the recorded pictures, ours


@dataclass(frozen=True)
class MixOfShowConfig(RankConfig):
    """passes: denoising steps whose inputs are recorded; rows: leading directions kept per layer; ridge:
    towards the base, relative."""

    rank: int = 4
    scale: float = 1.0
    lr: float = 1e-4
    token_lr: float = 1e-3
    layerwise: bool = True
    passes: int = 20
    rows: int = 64
    ridge: float = 1e-3
    first_std: float = 0.0
    stored: str = "float16"

    limits = {"passes": between(1, 1000), "rows": between(1, 1024), "ridge": above(0)}


class Recorder(AttentionProcessor):
    """Second moments of the inputs of to_q and to_out: key -> mean of x x^T `[b, b]` over passes, samples and
    cells."""

    def __init__(self, inner: AttentionProcessor) -> None:
        self.inner = inner
        self.sums: dict[DeltaKey, Tensor] = {}
        self.counts: dict[DeltaKey, int] = {}

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        if projection in GROUPS["picture"]:
            key, flat = (site.index, projection), x.detach().flatten(0, -2).float()
            moment = flat.T @ flat
            self.sums[key] = self.sums[key] + moment if key in self.sums else moment
            self.counts[key] = self.counts.get(key, 0) + len(flat)
        return self.inner.project(site, projection, x, y)

    def leading(self, key: DeltaKey, rows: int) -> Tensor:
        """R `[rows, b]` whose R^T R is nearest to the second moment; zeros where the width has fewer
        directions."""
        moment = self.sums[key].cpu().double() / self.counts[key]
        values, vectors = torch.linalg.eigh(moment)
        best = (values.clamp(min=0).sqrt() * vectors).T.flip(0)[:rows]
        return torch.cat([best, best.new_zeros(rows - len(best), best.shape[1])]).float()


@torch.inference_mode(False)
@torch.no_grad()
def record(backbone: Backbone, context: Context, processor: AttentionProcessor, size: tuple[int, int],
           passes: int, seed: int) -> Recorder:
    """Records what passes through the sites while pictures are denoised by DDIM.

    Args:
        context: the unconditional row first, then one row per picture.
        processor: what the sites do meanwhile.
        size: (h, w) of the latents.
        passes: denoising steps.
        seed: of the starting noise.
    """
    recorder, count = Recorder(processor), len(context) - 1
    negative, positive = Context.cat([context[0:1]] * count), context[1:]
    noise = torch.randn(count, backbone.latent_channels, *size, generator=torch.Generator().manual_seed(seed))

    def estimate(x: Tensor, t: int, _progress: float) -> Tensor:
        return guided(backbone, x, t, negative, positive, GUIDANCE, recorder)

    denoise(Ddim(backbone.schedule, passes), noise.to(backbone.device), estimate)
    return recorder


class MixOfShow(LowRankMethod):
    composition = SUM
    builds_on_sum = False
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
        dtype = stored_dtype(self.config.stored)
        words = self.words.stored(dtype)
        return fused_outcome(self.task.bank, self.name, words, self._own_rows(words, dtype),
                             lambda rows: fit(rows, self.config.ridge), dtype)

    def _own_rows(self, words: TokenGroup, dtype: torch.dtype) -> dict[str, dict[DeltaKey, Rows]]:
        """X_i and dW_i X_i of this concept in two groups. Before the first batch there is no "picture"
        group."""
        backbone, name, deltas = self.task.backbone, self.task.name, self.adapters.stored(dtype)
        text = text_rows(backbone, words, name)
        rows = {"text": {key: Rows.of(text[key[0]], delta) for key,
                         delta in deltas.items() if key[1] in GROUPS["text"]}}
        if min(self.size) > 0:
            prompts = ["", *(prompt.format(f"<{name}>") for prompt in CONCEPT_PROMPTS)]
            vocabulary = Vocabulary([ConceptInfo(name, "", self.name, words.words)])
            context = encode_prompts(backbone, vocabulary.parse_all(prompts), {name: words})
            recorder = record(backbone, context, AdapterProcessor(self.adapters), self.size,
                              self.config.passes, self.seed)
            rows["picture"] = {key: Rows.of(recorder.leading(key, self.config.rows), delta)
                               for key, delta in deltas.items() if key[1] in GROUPS["picture"]}
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seen.size": torch.tensor(self.size)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        height, width = state["seen.size"].tolist()
        self.size = height, width


register("mix_of_show", MixOfShowConfig, MixOfShow, "each concept learned alone, fused by least squares over "
                                                    "what its layers read")
