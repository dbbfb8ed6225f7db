"""LoRA files for diffusers' `load_lora_weights`: `unet.<module path>.lora_A.weight` `[r, b]` and `lora_B.weight` `[a, r]`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from ..model.deltas import DeltaKey, LowRankDelta
from ..model.sites import SiteLayout
from .factors import check_strength, compact


def diffusers_state(layout: SiteLayout, deltas: Mapping[DeltaKey, LowRankDelta], strength: float = 1.0) -> dict[str, Tensor]:
    """Low-rank deltas (see `factors.low_rank`) under diffusers' names; the change of a weight is `lora_B @ lora_A`.

    Scale and strength are in `lora_B`: the layout has no alpha. All factors get the largest rank by zeros, since older diffusers
    scale modules of another rank than the most frequent one wrongly when no alphas are there.
    """
    strength, state = check_strength(strength), {}
    rank = max((delta.down.shape[0] for delta in deltas.values()), default=0)
    for (index, projection), delta in sorted(deltas.items()):
        inner = "to_out.0" if projection == "to_out" else projection
        name = f"unet.{layout.sites[index].name}.{inner}"
        missing = rank - delta.down.shape[0]
        down, up = pad(delta.down.float(), (0, 0, 0, missing)), pad(delta.up.float() * (strength * delta.scale), (0, missing))
        state[f"{name}.lora_A.weight"] = compact(down, f"{name}.lora_A.weight")
        state[f"{name}.lora_B.weight"] = compact(up, f"{name}.lora_B.weight")
    return state
