"""LoRA files for `load_lora_weights` of diffusers.

Keys: `unet.<module path>.lora_A.weight` `[r, b]` and `lora_B.weight` `[a, r]`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from ..model.deltas import DeltaKey, LowRankDelta
from ..model.sites import SiteLayout
from .factors import check_strength, compact


def diffusers_state(layout: SiteLayout, deltas: Mapping[DeltaKey, LowRankDelta],
                    strength: float = 1.0) -> dict[str, Tensor]:
    """Low-rank deltas under diffusers' names; the change of a weight is `lora_B @ lora_A`.

    Scale and strength are in `lora_B`, because these files have no alpha. All factors are padded with zeros
    to the largest rank. Without alphas, older versions of diffusers wrongly scale modules whose rank is not
    the most frequent one.

    Args:
        deltas: See `factors.low_rank`.
        strength: Factor on the deltas.
    """
    strength, state = check_strength(strength), {}
    rank = max((delta.down.shape[0] for delta in deltas.values()), default=0)
    for (index, projection), delta in sorted(deltas.items()):
        name = f"unet.{layout.sites[index].path(projection)}"
        missing = rank - delta.down.shape[0]
        down = pad(delta.down.float(), (0, 0, 0, missing))
        up = pad(delta.up.float() * (strength * delta.scale), (0, missing))
        state[f"{name}.lora_A.weight"] = compact(down, f"{name}.lora_A.weight")
        state[f"{name}.lora_B.weight"] = compact(up, f"{name}.lora_B.weight")
    return state
