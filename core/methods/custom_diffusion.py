"""Custom Diffusion (Kumari et al., CVPR 2023, arXiv 2212.04488): sequential finetuning, and its merge of models learned alone.

The paper's: W_k and W_v of all text cross-attention layers are trained as they are, with one new word V* in front of the class noun, which
stays frozen ("V* dog"); 200 regularisation pictures of the class with captions, here the prior pictures of the training data; 250 steps at
batch 8 and rate 8e-5 for words and weights. Compression: the differences cut by SVD to 60 % of the sum of singular values.
The merge (Sec. 3.2, Eq. 4 and 5): `argmin_W ||W C_reg^T - W_0 C_reg^T||_F subject to W C^T = V`, C the text features of all concepts'
target words, V what each concept's own weights make of them, C_reg those of regularisation captions. Closed form:
`W = W_0 + (V - W_0 C^T) (d C^T)^-1 d`, `d = C (C_reg^T C_reg)^-1`. Target words are, as in the released code, a concept's words and the
end token in "{concept}" and "a photo of {concept}"; C_reg holds every word and end token of some 200 captions.

Ours: a record per task. `custom_diffusion` learns on the sum of earlier tasks and records the difference that it added, exactly, as `up` =
difference and `down` = identity (`kept=1`), or cut by SVD. `custom_diffusion_merge` learns every task on the base alone, keeps C and
V - W_0 C^T of each concept as shared state, and records merged_t - merged_{t-1}, so that all records add up to the merged weights; a first
concept's is the merge of one. Both inverses have a small ridge: text features of few captions do not span a wide context. The captions
are ours. A dense difference of each weight is trained: the method's formula needs that a×b matrix in a step.
Unknown: which rare word V* starts at; here a random vector of the vocabulary's spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank.composition import SUM
from ..bank.tokens import TokenGroup
from ..model.backbone import AttentionProcessor
from ..model.deltas import DeltaKey, LowRankDelta
from ..model.sites import SiteLayout
from ..neurons.scores import encode_plain, key_value_weights, text_positions
from .base import LearnedWords, Method, Outcome, Task, adapter_key, register, require, stored_dtype, wide_enough
from .fusion import Rows, compressed, fit, fused_outcome, text_rows

_THINGS = ("dog", "cat", "horse", "bird", "fish", "car", "boat", "chair", "teacup", "clock", "guitar", "tree", "flower", "mountain",
           "castle", "robot", "child", "woman", "backpack", "toy duck", "teddy bear", "train", "house", "bowl of fruit", "city street")
_SCENES = ("a photo of a {}", "a painting of a {}", "a {} on a beach", "a {} in the snow", "a drawing of a {}", "a {} at night",
           "a {} in a room", "a small red {} in a meadow")
CAPTIONS = tuple(scene.format(thing) for thing in _THINGS for scene in _SCENES)      # 200 as in the released code; the words are ours
CONSTRAINT_RIDGE = 1e-8      # relative; target words of two prompts may nearly agree


@dataclass(frozen=True)
class CustomDiffusionConfig:
    """kept: share of the sum of singular values that a record keeps, 1 = the exact difference, 0.6 the paper's compression;
    train_noun: whether the words after the first, which start as the class noun, train too."""

    lr: float = 8e-5
    token_lr: float = 8e-5
    layerwise: bool = False
    train_noun: bool = False
    first_std: float = 0.0
    kept: float = 1.0
    stored: str = "float16"

    def __post_init__(self) -> None:
        require(0 < self.kept <= 1, "kept", self.kept, "above 0 to 1")
        for name in ("lr", "token_lr", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


@dataclass(frozen=True)
class CustomDiffusionMergeConfig:
    """ridge: added to C_reg^T C_reg, relative to its mean diagonal; train_noun as in CustomDiffusionConfig."""

    lr: float = 8e-5
    token_lr: float = 8e-5
    layerwise: bool = False
    train_noun: bool = False
    first_std: float = 0.0
    ridge: float = 1e-3
    stored: str = "float16"

    def __post_init__(self) -> None:
        require(self.ridge > 0, "ridge", self.ridge, "above 0")
        for name in ("lr", "token_lr", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


class FullAdapters(nn.Module):
    """A trainable difference `[a, b]`, zero at the start, for W_k and W_v of every site."""

    def __init__(self, layout: SiteLayout, device) -> None:
        super().__init__()
        self.keys = key_value_weights(layout)
        self.differences = nn.ParameterDict({adapter_key(*key): nn.Parameter(torch.zeros(layout.sites[key[0]].shape(key[1]), device=device))
                                             for key in self.keys})

    def at(self, key: DeltaKey) -> Tensor:
        return self.differences[adapter_key(*key)]

    def stored(self, dtype: torch.dtype) -> dict[DeltaKey, LowRankDelta]:
        """The differences exactly, in the bank's type: `up` `[a, b]`, `down` the identity."""
        dtype = wide_enough(dtype, (self.at(key) for key in self.keys))
        found = {key: self.at(key).detach().to(dtype).cpu().clone() for key in self.keys}
        return {key: LowRankDelta(difference, torch.eye(difference.shape[1], dtype=dtype)) for key, difference in found.items()}


class FullProgram(AttentionProcessor):
    """Adds the differences to the projections while training."""

    def __init__(self, adapters: FullAdapters) -> None:
        self.adapters, self.keys = adapters, frozenset(adapters.keys)

    def project(self, site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        key = (site.index, projection)
        return y + F.linear(x, self.adapters.at(key).to(x)).to(y.dtype) if key in self.keys else y


class CustomDiffusion(Method):
    """Task after task on one set of weights; what forgets."""

    composition = SUM
    wants_prior = True

    def __init__(self, config: CustomDiffusionConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, self.task = self.config, task
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.adapters = FullAdapters(task.backbone.layout, task.backbone.device)

    def parameter_groups(self) -> list[dict]:
        # no decay: it would move the frozen noun, and pull the weights to the base
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr, "weight_decay": 0.0},
                {"params": list(self.adapters.parameters()), "lr": self.config.lr, "weight_decay": 0.0}]

    def token_group(self) -> TokenGroup:
        group = self.words.group()
        if self.config.train_noun:
            return group
        return TokenGroup(group.words, {name: torch.cat([v[:, :1], v[:, 1:].detach()], dim=1) for name, v in group.vectors.items()})

    def processor(self) -> AttentionProcessor:
        return FullProgram(self.adapters)

    @torch.no_grad()
    def finish(self) -> Outcome:
        dtype = stored_dtype(self.config.stored)
        exact = self.adapters.stored(dtype)
        return Outcome(self.words.stored(dtype), exact if self.config.kept == 1 else compressed(exact, dtype, self.config.kept))

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters})


class CustomDiffusionMerge(CustomDiffusion):
    """Each task on the base alone, merged in closed form. captions: what regularises the merge; may be set before `begin`."""

    builds_on_sum = False
    captions: tuple[str, ...] = CAPTIONS

    @torch.no_grad()
    def finish(self) -> Outcome:
        dtype, backbone = stored_dtype(self.config.stored), self.task.backbone
        words = self.words.stored(dtype)
        inputs = text_rows(backbone, words, self.task.name)
        own = {key: Rows(inputs[key[0]], F.linear(inputs[key[0]], self.adapters.at(key).detach().cpu())) for key in self.adapters.keys}
        metric = regularisation_metric(backbone, self.captions, self.config.ridge)
        return fused_outcome(self.task.bank, self.name, words, {"text": own}, lambda rows: fit(rows, CONSTRAINT_RIDGE, metric), dtype)


@torch.no_grad()
def regularisation_metric(backbone, captions: tuple[str, ...], ridge: float, batch: int = 25) -> Tensor:
    """(C_reg^T C_reg + rho I)^-1 `[b, b]` float64: all words and end tokens of the captions, rho = `ridge` times the mean diagonal."""
    width = backbone.layout.sites[0].context_width
    gram = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, len(captions), batch):
        chunk = captions[start:start + batch]
        hidden = encode_plain(backbone, chunk).hidden[:, 0].cpu().double()
        for row, places in zip(hidden, text_positions(backbone, chunk), strict=True):
            features = row[[*places, len(places) + 1]]
            gram += features.T @ features
    return torch.linalg.inv(gram + ridge * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(width, dtype=torch.float64))


register("custom_diffusion", CustomDiffusionConfig, CustomDiffusion,
         "keys, values and one word finetuned task after task on the same weights")
register("custom_diffusion_merge", CustomDiffusionMergeConfig, CustomDiffusionMerge,
         "keys, values and one word learned alone per concept, merged in closed form under constraints")
