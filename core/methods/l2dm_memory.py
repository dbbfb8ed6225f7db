"""The memories of L2DM (Sun et al., arXiv 2309.04430, Alg. 1 and Eq. 5): what is kept of pictures, and how
generated ones are chosen.

The paper describes pictures by CLIP's image features; `unet_features` is our stand-in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank.prompts import NO_CONCEPTS
from ..bank.tokens import TokenGroup
from ..conditioning.encoding import encode_prompts
from ..errors import ConceptError
from ..model.backbone import AttentionProcessor, Backbone
from ..model.sites import Site

Features = Callable[[Backbone, Tensor], Tensor]      # latents [B, C, h, w] -> [B, F], of any length
FEATURE_NOISE = 0.25      # at which share of the noise schedule the default features look
_FEATURES, _NOTES = "features", "notes"


def rainbow_scores(generated: Tensor, own: Tensor, real: Tensor, closeness: float) -> Tensor:
    """Eq. 5 for every candidate of every stored feature.

    generated `[G, F]`: features of all generated pictures of all old tasks; own `[n, eta]`: which of them are
    candidates of which stored feature; real `[n, F]`. Returns `[n, eta]`: mean over all generated of 1 - cos,
    itself included as printed, plus closeness times the cosine with the real picture's. """
    unit, target = F.normalize(generated, dim=-1), F.normalize(real, dim=-1)
    different = 1 - unit @ unit.mean(0)
    return different[own] + closeness * (unit[own] * target.unsqueeze(1)).sum(-1)


class _Pooled(AttentionProcessor):
    """Mean and spread over the cells of what goes into every site, kept for the deepest ones."""

    def __init__(self) -> None:
        self.found: dict[int, list[Tensor]] = {}

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        if projection == "to_q":
            wide = x.float()
            self.found.setdefault(x.shape[1],
                                  []).append(torch.cat([wide.mean(1), wide.std(1, correction=0)], dim=-1))
        return y

    def deepest(self) -> Tensor:
        return torch.cat(self.found[min(self.found)], dim=-1)


@torch.no_grad()
def unet_features(backbone: Backbone, latents: Tensor) -> Tensor:
    """`[B, F]`: pooled activations at the deepest sites of the frozen base for slightly noisy latents and an
    empty prompt.

    Ours, in place of CLIP image features. The noise is the same for every picture, so equal pictures have
    equal features. """
    t = int(FEATURE_NOISE * (len(backbone.schedule) - 1))
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
    found = []
    for chunk in latents.split(4):
        timesteps = torch.full((len(chunk),), t, device=chunk.device)
        context = encode_prompts(backbone, NO_CONCEPTS.parse_all([""] * len(chunk)), {})
        processor = _Pooled()
        backbone.predict(backbone.schedule.add_noise(chunk, noise.expand_as(chunk), timesteps), timesteps,
                         context, processor)
        found.append(processor.deepest())
    return torch.cat(found)


@dataclass(frozen=True)
class LongTerm:
    """The long-term memory: features `[n, F]`; per row its owner (digest of the concept's words, which a
    renaming leaves) and its prompt, in which `<>` stands for the owner's placeholder."""

    features: Tensor
    owners: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        text = json.dumps([self.owners, self.prompts]).encode()
        return {_FEATURES: self.features, _NOTES: torch.tensor(list(text), dtype=torch.uint8)}

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> LongTerm:
        """Raises ConceptError for a state that `tensors` did not make; an empty state is an empty memory."""
        if not state:
            return cls(torch.zeros(0, 0))
        try:
            owners, prompts = json.loads(bytes(state[_NOTES].tolist()))
            if not len(owners) == len(prompts) == len(state[_FEATURES]) or not all(isinstance(x, str)
                                                                                   for x in (*owners,
                                                                                             *prompts)):
                raise ValueError(f"{len(owners)} owners, {len(prompts)} prompts, {len(state[_FEATURES])} "
                                 "features")
            return cls(state[_FEATURES], tuple(owners), tuple(prompts))
        except (KeyError, ValueError, TypeError) as error:
            raise ConceptError(f"the bank's long-term memory of 'l2dm' is damaged ({type(error).__name__}: "
                               f"{error})") from error

    def rows(self, keep: list[int]) -> LongTerm:
        return LongTerm(self.features[keep], tuple(self.owners[i] for i in keep),
                        tuple(self.prompts[i] for i in keep))

    def joined(self, other: LongTerm) -> LongTerm:
        features = torch.cat([self.features, other.features]) if len(self.owners) else other.features
        return LongTerm(features, self.owners + other.owners, self.prompts + other.prompts)


def words_digest(tokens: TokenGroup) -> str:
    """By which the memory knows a concept."""
    digest = hashlib.sha256()
    for name in sorted(tokens.vectors):
        digest.update(tokens.vectors[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ShortTerm:
    """The short-term memory: latents `[n, C, h, w]` and prompts of generated pictures; tasks `[n]`: number of
    the old task of each."""

    latents: Tensor
    prompts: tuple[str, ...]
    tasks: Tensor

    @property
    def task_count(self) -> int:
        return len(self.tasks.unique())

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`[count]` rows, with replacement: every old task as likely as another, then every picture of it."""
        return torch.multinomial(1.0 / self.tasks.bincount()[self.tasks].float(), count, replacement=True,
                                 generator=generator)
