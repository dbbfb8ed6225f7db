"""Custom Diffusion (Kumari et al., CVPR 2023, arXiv 2212.04488): sequential finetuning, and its merge of
separate models.

From the paper: W_k and W_v of all text cross-attention layers are trained in full, with one new word V* in
front of the class noun, which stays frozen ("V* dog"). 200 regularisation pictures of the class with captions
are used, here the prior pictures of the training data; 250 steps at batch 8 and rate 8e-5 for words and
weights. Compression cuts the differences by SVD to 60 % of the sum of singular values.

The merge (Sec. 3.2, Eqs. 4 and 5): `argmin_W ||W C_reg^T - W_0 C_reg^T||_F subject to W C^T = V`. C are the
text features of all concepts' target words, V what each concept's own weights make of them, and C_reg the
features of regularisation captions. Closed form: `W = W_0 + (V - W_0 C^T) (d C^T)^-1 d`,
`d = C (C_reg^T C_reg)^-1`. As in the released code, target words are a concept's words and the end token in
"{concept}" and "a photo of {concept}"; C_reg holds every word and end token of some 200 captions.

Ours: a record per task. `custom_diffusion` trains on the sum of earlier tasks and records the difference it
added: exactly, as `up` = difference and `down` = identity (`kept=1`), or cut by SVD. `custom_diffusion_merge`
trains every task on the base alone. It keeps C and V - W_0 C^T of each concept as shared state and records
merged_t - merged_{t-1}, so that all records add up to the merged weights. The first record is the merge of
one concept. Both inverses have a small ridge, because the text features of a few captions have fewer
directions than the context is wide. The captions are ours. A dense difference `[a, b]` of each weight is
trained, because a step of the method's formula needs it. Unknown: which rare word V* starts at; here a random
vector with the vocabulary's spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.adapters import FullAdapters
from ..bank.composition import SUM
from ..bank.tokens import TokenGroup
from ..model.backbone import Backbone
from ..model.compression import compressed
from ..model.deltas import Deltas
from ..model.least_squares import Rows, fit
from ..model.storage import stored_dtype
from ..neurons.scores import encode_plain, key_value_weights, text_positions
from ..settings import above
from .base import SHARE, Method, MethodConfig, Outcome, register
from .fusion import fused_outcome, text_rows

_THINGS = ("dog", "cat", "horse", "bird", "fish", "car", "boat", "chair", "teacup", "clock", "guitar", "tree",
           "flower", "mountain", "castle", "robot", "child", "woman", "backpack", "toy duck", "teddy bear",
           "train", "house", "bowl of fruit", "city street")
_SCENES = ("a photo of a {}", "a painting of a {}", "a {} on a beach", "a {} in the snow",
           "a drawing of a {}", "a {} at night", "a {} in a room", "a small red {} in a meadow")
# 200 as in the code; ours
CAPTIONS = tuple(scene.format(thing) for thing in _THINGS for scene in _SCENES)
CONSTRAINT_RIDGE = 1e-8      # relative; target words of two prompts may nearly agree


@dataclass(frozen=True)
class FullConfig(MethodConfig):
    """train_noun: whether the words after the first, which start as the class noun, are trained."""

    lr: float = 8e-5
    token_lr: float = 8e-5
    layerwise: bool = False
    train_noun: bool = False


@dataclass(frozen=True)
class CustomDiffusionConfig(FullConfig):
    """kept: share of the sum of singular values that a record keeps, 1 = the exact difference, paper 0.6."""

    kept: float = 1.0

    limits = {"kept": SHARE}


@dataclass(frozen=True)
class CustomDiffusionMergeConfig(FullConfig):
    """ridge: added to C_reg^T C_reg, relative to its mean diagonal."""

    ridge: float = 1e-3

    limits = {"ridge": above(0)}


class FullMethod(Method):
    """Trains full keys and values, and one word in front of the class noun."""

    composition = SUM
    wants_prior = True
    config: FullConfig
    adapters: FullAdapters

    def make_adapters(self) -> FullAdapters:
        backbone = self.task.backbone
        return FullAdapters(backbone.layout, key_value_weights(backbone.layout), backbone.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Without weight decay, which would move the frozen noun and pull the weights to the base."""
        return [{**group, "weight_decay": 0.0} for group in super().parameter_groups()]

    def token_group(self) -> TokenGroup:
        group = self.words.group()
        if self.config.train_noun:
            return group
        frozen = {name: torch.cat([v[:, :1], v[:, 1:].detach()], dim=1) for name, v in group.vectors.items()}
        return TokenGroup(group.words, frozen)


@register("custom_diffusion", CustomDiffusionConfig,
          "keys, values and one word finetuned task after task on the same weights")
class CustomDiffusion(FullMethod):
    """Task after task on one set of weights; it forgets."""

    config: CustomDiffusionConfig

    def recorded(self, dtype: torch.dtype) -> Deltas:
        exact, kept = self.adapters.stored(dtype), self.config.kept
        return exact if kept == 1 else compressed(exact, dtype, kept)


@register("custom_diffusion_merge", CustomDiffusionMergeConfig,
          "keys, values and one word learned alone per concept, merged in closed form under constraints")
class CustomDiffusionMerge(FullMethod):
    """Each task on the base alone, merged in closed form. captions: of C_reg; may be set before `begin`."""

    builds_on_sum = False
    captions: tuple[str, ...] = CAPTIONS
    config: CustomDiffusionMergeConfig

    @torch.no_grad()
    def finish(self) -> Outcome:
        dtype, backbone = stored_dtype(self.config.stored), self.task.backbone
        words = self.words.stored(dtype)
        inputs = text_rows(backbone, words, self.task.name)
        own = {key: Rows(inputs[key[0]], F.linear(inputs[key[0]], self.adapters.at(key).detach().cpu()))
               for key in self.adapters.keys}
        metric = regularisation_metric(backbone, self.captions, self.config.ridge)
        return fused_outcome(self.task.bank, self.name, words, {"text": own},
                             lambda rows: fit(rows, CONSTRAINT_RIDGE, metric), dtype)


@torch.no_grad()
def regularisation_metric(backbone: Backbone, captions: tuple[str, ...], ridge: float,
                          batch: int = 25) -> Tensor:
    """`(C_reg^T C_reg + rho I)^-1` from all words and end tokens of the captions, after Eq. 5.

    Args:
        backbone: encodes the captions, `batch` at once.
        captions: plain prompts.
        ridge: rho relative to the mean diagonal.

    Returns:
        `[b, b]` float64, b the width of the context.
    """
    width = backbone.layout.sites[0].context_width
    gram = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, len(captions), batch):
        chunk = captions[start:start + batch]
        hidden = encode_plain(backbone, chunk).hidden[:, 0].cpu().double()
        for row, places in zip(hidden, text_positions(backbone, chunk), strict=True):
            features = row[[*places, len(places) + 1]]
            gram += features.T @ features
    rho = ridge * gram.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.inv(gram + rho * torch.eye(width, dtype=torch.float64))
