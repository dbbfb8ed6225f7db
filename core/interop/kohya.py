"""LoRA files under kohya's names, as ComfyUI, A1111, Forge and most trainers read them.

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
    """`lora_unet_down_blocks_0_..._attn2_to_k`."""
    index, projection = key
    inner = "to_out.0" if projection == "to_out" else projection
    return "lora_unet_" + f"{layout.sites[index].name}.{inner}".replace(".", "_")


def kohya_state(layout: SiteLayout, deltas: Mapping[DeltaKey, LowRankDelta],
                strength: float = 1.0) -> dict[str, Tensor]:
    """Low-rank deltas under kohya's names: float16 factors, scale and strength in a float32 `alpha`.

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
    """The words' mean copy as `bundle_emb.<name>.*`, `[words, D]` per text encoder.

    One entry for the whole group: A1111 then has it under the concept's name, and ComfyUI, which joins all
    entries of a file in the order of their names, gets the words in their own order. One encoder goes under
    A1111's key for SD1.x, two under theirs.
    """
    check_name(name)
    vectors = mean_vectors(tokens)
    if len(vectors) == 1:
        return {f"bundle_emb.{name}.string_to_param.*": next(iter(vectors.values()))}
    return {f"bundle_emb.{name}.{encoder}": vector for encoder, vector in vectors.items()}
