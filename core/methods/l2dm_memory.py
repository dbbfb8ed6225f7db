"""The memories of L2DM (Sun et al., arXiv 2309.04430, Alg. 1), and how pictures are selected (Eq. 5)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptError
from ..model.backbone import Backbone

Features = Callable[[Backbone, Tensor], Tensor]      # latents [B, C, h, w] -> [B, F], of any length
_FEATURES, _NOTES = "features", "notes"


def rainbow_scores(generated: Tensor, candidates: Tensor, real: Tensor, closeness: float) -> Tensor:
    """Scores every candidate of every stored feature by Eq. 5.

    Args:
        generated: features of all generated pictures of all old tasks, `[G, F]`.
        candidates: numbers of the generated pictures of each stored feature, `[n, eta]`.
        real: the stored features, `[n, F]`.
        closeness: the paper's beta.

    Returns:
        `[n, eta]`: the mean of 1 - cos over all generated pictures, itself included as printed, plus
        closeness times the cosine with the real picture.
    """
    unit, target = F.normalize(generated, dim=-1), F.normalize(real, dim=-1)
    different = 1 - unit @ unit.mean(0)
    return different[candidates] + closeness * (unit[candidates] * target.unsqueeze(1)).sum(-1)


@dataclass(frozen=True)
class LongTerm:
    """The long-term memory. features: `[n, F]`; owners: `TokenGroup.digest` of each row's concept, which
    renaming does not change; prompts: of each row, with `<>` for the owner's placeholder."""

    features: Tensor
    owners: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        text = json.dumps([self.owners, self.prompts]).encode()
        return {_FEATURES: self.features, _NOTES: torch.tensor(list(text), dtype=torch.uint8)}

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> LongTerm:
        """Inverse of `tensors`; an empty state is an empty memory. Raises ConceptError for any other."""
        if not state:
            return cls(torch.zeros(0, 0))
        try:
            owners, prompts = json.loads(bytes(state[_NOTES].tolist()))
            is_text = all(isinstance(text, str) for text in (*owners, *prompts))
            if not is_text or not len(owners) == len(prompts) == len(state[_FEATURES]):
                count = len(state[_FEATURES])
                raise ValueError(f"{len(owners)} owners, {len(prompts)} prompts, {count} features")
            return cls(state[_FEATURES], tuple(owners), tuple(prompts))
        except (KeyError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConceptError(f"the bank's long-term memory of 'l2dm' is damaged ({reason})") from error

    def rows(self, keep: list[int]) -> LongTerm:
        return LongTerm(self.features[keep], tuple(self.owners[i] for i in keep),
                        tuple(self.prompts[i] for i in keep))

    def joined(self, other: LongTerm) -> LongTerm:
        features = torch.cat([self.features, other.features]) if len(self.owners) else other.features
        return LongTerm(features, self.owners + other.owners, self.prompts + other.prompts)
