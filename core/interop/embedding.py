"""Embedding files (textual inversion): a concept's words without its deltas, for ComfyUI and A1111."""

from __future__ import annotations

from torch import Tensor

from ..bank.tokens import TokenGroup
from ..errors import ConceptError


def mean_vectors(tokens: TokenGroup) -> dict[str, Tensor]:
    """Text encoder -> the mean over layer copies, `[words, D]`, float32, for formats without layer copies."""
    means = {encoder: vectors.detach().float().cpu().mean(0).contiguous()
             for encoder, vectors in tokens.vectors.items()}
    for encoder, mean in means.items():
        if not mean.isfinite().all():
            raise ConceptError(f"the vectors of {list(tokens.words)} for '{encoder}' hold NaN or infinity; "
                               "allowed: finite numbers")
    return means


def embedding_state(tokens: TokenGroup) -> dict[str, Tensor]:
    """The tensors of an embedding file, `[words, D]` each.

    With one text encoder the key is `emb_params` (A1111); with two, `clip_l` and `clip_g` (SDXL embeddings).
    Both work in ComfyUI, which uses the encoder's key if present, else the first tensor.
    """
    vectors = mean_vectors(tokens)
    return {"emb_params": next(iter(vectors.values()))} if len(vectors) == 1 else vectors


def layer_loss(tokens: TokenGroup) -> float:
    """Distance of the layer copies from their mean, relative to the norm of the copies.

    0 to 1, over all words and text encoders: 0 for words with a single copy, 1 for copies whose mean is zero.
    """
    vectors = [vector.detach().cpu().double() for vector in tokens.vectors.values()]
    total = sum(float((vector**2).sum()) for vector in vectors)
    spread = sum(float(((vector - vector.mean(0)) ** 2).sum()) for vector in vectors)
    return (spread / total) ** 0.5 if total else 0.0
