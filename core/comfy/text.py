"""ComfyUI's text encoders, for training and for prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import ConceptError
from ..model.backbone import TextEncoder

NAMES = ("clip_l", "clip_g", "clip_h")
ROWS = "t5xxl"      # tokens of a text that is read as one row per T5 token
QWEN = ("qwen3_4b", "qwen3_8b", "qwen3vl_4b")      # the same of Qwen tokens, for Flux.2 Klein and Krea 2
ROW_NAMES = (ROWS, *QWEN)
_ROW_ENCODERS = ("qwen3_06b", *ROW_NAMES)      # of Anima; of Cosmos Predict2, Flux.1 and Chroma; of others
_POOLED = ["clip_l"]      # beside the rows of Flux.1: gives a pooled vector, and no rows


def encoder_names(clip) -> tuple[str, ...]:
    """The CLIP text encoders of a CLIP, in the order in which their outputs are concatenated."""
    names = tuple(name for name in NAMES
                  if hasattr(clip.cond_stage_model, name) and hasattr(clip.tokenizer, name))
    if not names:
        raise ConceptError(f"the CLIP's class is {type(clip.cond_stage_model).__name__}, which is not "
                           "supported; allowed: the CLIP of a checkpoint of Stable Diffusion 1.x, 2.x, SDXL, "
                           "Anima, Cosmos Predict2, Flux.1, Flux.2 Klein, Chroma or Krea 2")
    return names


def row_tokenizer(clip):
    """The tokenizer whose tokens are the rows of a text, or None for a CLIP whose text is read otherwise."""
    model, tokenizer = clip.cond_stage_model, clip.tokenizer
    if [name for name in NAMES if hasattr(model, name)] not in ([], _POOLED) or _row_encoder(model) is None:
        return None
    name = row_name(clip)
    return getattr(tokenizer, name, None) or getattr(tokenizer, f"clip_{name}", None)


def row_name(clip) -> str:
    """The name of the tokens that are read as rows, for a CLIP whose text is read as rows."""
    return next((name for name in QWEN if hasattr(clip.cond_stage_model, name)), ROWS)


def row_tokens(tokens) -> list:
    """The tokens that are read as rows, from all tokens of such a CLIP."""
    return next(tokens[name] for name in ROW_NAMES if name in tokens)[0]


def cut_in_front(tokens, states: Tensor) -> int:
    """How many tokens in front of a text have no row in the states: those of a template that the encoder cuts
    off. Negative where a picture in front of the text has several rows for its one token.

    Args:
        tokens: All tokens of a CLIP whose text is read as rows.
        states: `[B, N, D]`, what it makes of them.
    """
    if not any(name in tokens for name in QWEN):
        return 0      # states of T5, or of Anima, whose rows its adapter makes
    return len(row_tokens(tokens)) - states.shape[1]


def _row_encoder(model):
    return next((getattr(model, name) for name in _ROW_ENCODERS if hasattr(model, name)), None)


def reads_rows(clip) -> bool:
    """Whether the model beside a CLIP reads one row of text per token of T5 or Qwen."""
    return row_tokenizer(clip) is not None


def text_widths(clip) -> tuple[tuple[str, int], ...]:
    if reads_rows(clip):
        return ((row_name(clip), _embedding(_row_encoder(clip.cond_stage_model)).shape[1]),)
    models = {name: getattr(clip.cond_stage_model, name) for name in encoder_names(clip)}
    return tuple((name, _embedding(model).shape[1]) for name, model in models.items())


def _embedding(model) -> Tensor:
    return model.transformer.get_input_embeddings().weight


class ComfyText(TextEncoder):
    """One of a CLIP's encoders (an SDClipModel and its SDTokenizer)."""

    encodes_prefixes = True

    def __init__(self, name: str, clip, load: Callable[[], None] = lambda: None) -> None:
        """load: Called before every forward pass; moves the weights to their device."""
        self.name, self.clip, self.load = name, clip, load
        self.model, self.tokenizer = getattr(clip.cond_stage_model, name), getattr(clip.tokenizer, name)
        self.width, self.length = _embedding(self.model).shape[1], self.tokenizer.max_length
        self.start, self.end = self.tokenizer.start_token, self.tokenizer.end_token
        self.pad = self.tokenizer.pad_token

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.tokenizer(text)["input_ids"][self.tokenizer.tokens_start:-1]

    def vectors(self, ids: list[int]) -> Tensor:
        return _embedding(self.model)[torch.tensor(ids, dtype=torch.long)].detach().float().clone()

    def encode(self, ids: Tensor, slots: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        self.load()
        remaining = iter(vectors)
        rows = [[next(remaining) if slot else token for token, slot in zip(*row, strict=True)]
                for row in zip(ids.tolist(), slots.tolist(), strict=True)]
        self.model.reset_clip_options()
        if self.clip.layer_idx is not None:
            self.model.set_clip_options({"layer": self.clip.layer_idx})
        self.model.set_clip_options({"execution_device": self.clip.patcher.load_device})
        with _first_positions(self.model, ids.shape[1]):
            return self.model(rows)[:2]


@contextmanager
def _first_positions(model, count: int) -> Iterator[None]:
    """Cuts the position embeddings to `count` rows, because ComfyUI's CLIP always adds the whole table."""
    table = model.transformer.text_model.embeddings.position_embedding
    whole = table.weight
    if count == len(whole):
        yield
        return
    table.weight = nn.Parameter(whole.detach()[:count], requires_grad=False)
    try:
        yield
    finally:
        table.weight = whole
