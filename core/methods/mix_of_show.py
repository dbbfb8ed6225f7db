"""Mix-of-Show (Gu et al., NeurIPS 2023, arXiv 2305.18292): ED-LoRA per concept, then gradient fusion into one set of weights.

The paper's and its released code's: a concept is two layer-wise words (one random, one from the class noun; Sec. 4.1) and rank-4 deltas;
rates 1e-3 for words, 1e-4 for weights; gradient fusion (Sec. 4.2) solves for every linear layer
`W = argmin_W sum_i ||(W_0 + dW_i) X_i - W X_i||_F^2` with L-BFGS, X_i being the layer's inputs under concept i: for keys and values the
text features of the concept's words and the end token in "{concept}" and "photo of a {concept}", for the others what 20 denoising steps
of the concept's own model pass through them.

Ours: the least squares in closed form, with a ridge towards W_0 in place of the early end of L-BFGS (`ridge`, relative to the mean
diagonal), which makes the answer unique: the smallest change that does what the concepts' own models do. Only the sites' projections are
adapted; the paper adapts the text encoder and all attention layers too. The prompts are "{concept}" and "a photo of {concept}". Recorded
inputs are kept as the `rows` leading directions of their second moment. The released code's attention regulariser and its drop-out of
keys and values are left out. The record of a task is fused_t - fused_{t-1}, so that all records add up to the fused weights. Removing
another concept than the newest leaves its share in later records until the next task fuses anew.

Kept per concept as shared state: what its layers read and what its own deltas make of that, rows × 50,000 numbers for q and out of SD1.5
(6 MB in float16 with 64 rows) and 1 MB for its text. Fusion runs once, after a task; no training step sees old concepts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bank.composition import SUM
from ..bank.concepts import ConceptInfo
from ..bank.prompts import Vocabulary
from ..bank.tokens import TokenGroup
from ..conditioning.encoding import encode_prompts
from ..data.batch import Batch
from ..model.backbone import AttentionProcessor, Backbone, Context
from ..model.deltas import DeltaKey, LowRankDelta
from ..model.sites import Site
from ..model.solver import Ddim, denoise, guided
from .base import AdapterProcessor, LearnedWords, LowRankAdapters, Method, Outcome, Task, register, require, stored_dtype
from .fusion import CONCEPT_PROMPTS, Rows, fit, fused_outcome, text_rows

GROUPS = {"text": ("to_k", "to_v"), "picture": ("to_q", "to_out")}
GUIDANCE = 5.0      # of the recorded pictures, ours


@dataclass(frozen=True)
class MixOfShowConfig:
    """passes: denoising steps whose inputs are recorded; rows: directions kept of them per layer; ridge: relative, towards the base."""

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

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 128, "rank", self.rank, "1 to 128")
        require(1 <= self.passes <= 1000, "passes", self.passes, "1 to 1000")
        require(1 <= self.rows <= 1024, "rows", self.rows, "1 to 1024")
        require(self.ridge > 0, "ridge", self.ridge, "above 0")
        for name in ("lr", "token_lr", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


class Recorder(AttentionProcessor):
    """Second moments of what goes into to_q and to_out: key -> mean of x x^T `[b, b]` over passes, samples and cells."""

    def __init__(self, inner: AttentionProcessor) -> None:
        self.inner, self.sums, self.counts = inner, {}, {}

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        if projection in GROUPS["picture"]:
            key, flat = (site.index, projection), x.detach().flatten(0, -2).float()
            found = flat.T @ flat
            self.sums[key] = self.sums[key] + found if key in self.sums else found
            self.counts[key] = self.counts.get(key, 0) + len(flat)
        return self.inner.project(site, projection, x, y)

    def leading(self, key: DeltaKey, rows: int) -> Tensor:
        """R `[rows, b]` whose R^T R is nearest to the second moment; zeros where the width has fewer directions."""
        moment = self.sums[key].cpu().double() / self.counts[key]
        values, vectors = torch.linalg.eigh(moment)
        best = (values.clamp(min=0).sqrt() * vectors).T.flip(0)[:rows]
        return torch.cat([best, best.new_zeros(rows - len(best), best.shape[1])]).float()


@torch.inference_mode(False)
@torch.no_grad()
def record(backbone: Backbone, context: Context, processor: AttentionProcessor, size: tuple[int, int], passes: int, seed: int) -> Recorder:
    """Denoises one picture per row of the context after the first, which is the unconditional one, by DDIM; size: latents' (h, w)."""
    recorder, count = Recorder(processor), len(context) - 1
    negative, positive = Context.cat([context[0:1]] * count), context[1:]
    noise = torch.randn(count, backbone.latent_channels, *size, generator=torch.Generator().manual_seed(seed))

    def estimate(x: Tensor, t: int, _progress: float) -> Tensor:
        return guided(backbone, x, t, negative, positive, GUIDANCE, recorder)

    denoise(Ddim(backbone.schedule, passes), noise.to(backbone.device), estimate)
    return recorder


class _Seen(nn.Module):
    """Lets a checkpoint carry the size of the latents `(h, w)`; zeros before the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("size", torch.zeros(2, dtype=torch.int64))


class MixOfShow(Method):
    composition = SUM
    builds_on_sum = False

    def __init__(self, config: MixOfShowConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, self.task = self.config, task
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.adapters = LowRankAdapters(task.backbone.layout, c.rank, c.scale, task.generator, task.backbone.device)
        self.seed, self.seen = int(torch.randint(2**31, (1,), generator=task.generator)), _Seen()

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr},
                {"params": list(self.adapters.parameters()), "lr": self.config.lr}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        return AdapterProcessor(self.adapters)

    def on_batch(self, batch: Batch) -> Batch:
        self.seen.size.copy_(torch.tensor(batch.latents.shape[-2:]))
        return batch

    @torch.no_grad()
    def finish(self) -> Outcome:
        dtype = stored_dtype(self.config.stored)
        words = self.words.stored(dtype)
        own = self._own_rows(words, self.adapters.stored(dtype))
        return fused_outcome(self.task.bank, self.name, words, own, lambda rows: fit(rows, self.config.ridge), dtype)

    def _own_rows(self, words: TokenGroup, deltas: dict[DeltaKey, LowRankDelta]) -> dict[str, dict[DeltaKey, Rows]]:
        """This concept's inputs and what its own deltas make of them, in the two groups; no pictures before the first batch."""
        text = text_rows(self.task.backbone, words, self.task.name)
        found = {"text": {key: Rows.of(text[key[0]], delta) for key, delta in deltas.items() if key[1] in GROUPS["text"]}}
        size = tuple(self.seen.size.tolist())
        if min(size) > 0:
            context = self._context(words)
            recorder = record(self.task.backbone, context, AdapterProcessor(self.adapters), size, self.config.passes, self.seed)
            found["picture"] = {key: Rows.of(recorder.leading(key, self.config.rows), delta)
                                for key, delta in deltas.items() if key[1] in GROUPS["picture"]}
        return found

    def _context(self, words: TokenGroup) -> Context:
        name = self.task.name
        prompts = ["", *(prompt.format(f"<{name}>") for prompt in CONCEPT_PROMPTS)]
        vocabulary = Vocabulary([ConceptInfo(name, "", self.name, words.words)])
        return encode_prompts(self.task.backbone, vocabulary.parse_all(prompts), {name: words})

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters, "seen": self.seen})


register("mix_of_show", MixOfShowConfig, MixOfShow, "each concept learned alone, fused by least squares over what its layers read")
