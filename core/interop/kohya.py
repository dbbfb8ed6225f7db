"""LoRA files with kohya's names, the format of ComfyUI, A1111, Forge and most trainers.

Keys: `lora_unet_<module path with _>.lora_up.weight` `[a, r]`, `.lora_down.weight` `[r, b]`, `.alpha`; the
change of a weight is `alpha / r * up @ down` (kohya-ss/sd-scripts, networks/lora.py). Learned words are
stored as
`bundle_emb.<name>.<key>` (AUTOMATIC1111/stable-diffusion-webui pull request 13568).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..bank.tokens import TokenGroup, check_name
from ..model.deltas import DeltaKey, LowRankDelta
from ..model.sites import SiteLayout
from .embedding import mean_vectors
from .factors import check_strength, compact


def module_name(layout: SiteLayout, key: DeltaKey) -> str:
    """`lora_unet_down_blocks_0_..._attn2_to_k`, `lora_unet_blocks_0_cross_attn_k_proj`."""
    index, projection = key
    return "lora_unet_" + layout.sites[index].path(projection).replace(".", "_")


def kohya_state(layout: SiteLayout, deltas: Mapping[DeltaKey, LowRankDelta],
                strength: float = 1.0) -> dict[str, Tensor]:
    """Low-rank deltas with kohya's names: float16 factors, scale and strength in a float32 `alpha`.

    Args:
        deltas: See `factors.low_rank`.
        strength: Factor on the deltas.
    """
    strength, state = check_strength(strength), {}
    for key, delta in sorted(deltas.items()):
        name = module_name(layout, key)
        state[f"{name}.lora_up.weight"] = compact(delta.up, f"{name}.lora_up.weight")
        state[f"{name}.lora_down.weight"] = compact(delta.down, f"{name}.lora_down.weight")
        state[f"{name}.alpha"] = torch.tensor(strength * delta.scale * delta.down.shape[0],
                                              dtype=torch.float32)
    return state


def bundled_words(name: str, tokens: TokenGroup) -> dict[str, Tensor]:
    """The mean over the words' layer copies as `bundle_emb.<name>.*`, `[words, D]` per text encoder.

    The whole group is one entry. A1111 then offers it under the concept's name. ComfyUI concatenates all
    entries of a file by name, so a single entry keeps the words' order. Keys are A1111's for SD1.x (one
    encoder) or SDXL (two).
    """
    check_name(name)
    vectors = mean_vectors(tokens)
    if len(vectors) == 1:
        return {f"bundle_emb.{name}.string_to_param.*": next(iter(vectors.values()))}
    return {f"bundle_emb.{name}.{encoder}": vector for encoder, vector in vectors.items()}
