"""ComfyUI's text encoders, for training and as a CLIP that lets stock nodes use placeholders such as `<rex>`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..bank.bank import ConceptBank
from ..bank.composition import Kind
from ..bank.concepts import ConceptInfo
from ..bank.prompts import NO_CONCEPTS, Vocabulary, WordRef
from ..bank.tokens import TokenGroup
from ..conditioning.placeholder_nouns import (
    Words,
    encoded_apart,
    noun_for,
    noun_ids,
    positions_of,
    with_words,
)
from ..errors import ConceptError
from ..model.backbone import TextEncoder
from ..sampling.attention_guidance import Subject
from .sites import OFFSETS, WORDS, OffsetCond
from .token_lora import code

NAMES = ("clip_l", "clip_g", "clip_h")
_MARK = "concept."      # ComfyUI's tokenizer gets a placeholder as `embedding:concept.<name>`

Concepts = dict[str, tuple[ConceptInfo, TokenGroup]]


def encoder_names(clip) -> tuple[str, ...]:
    """The CLIP text encoders of a CLIP, in the order in which their outputs are concatenated."""
    names = tuple(name for name in NAMES
                  if hasattr(clip.cond_stage_model, name) and hasattr(clip.tokenizer, name))
    if not names:
        raise ConceptError(f"the CLIP is a {type(clip.cond_stage_model).__name__}, which has no CLIP text "
                           "encoder; allowed: the CLIP of Stable Diffusion 1.x, 2.x and SDXL checkpoints")
    return names


def text_widths(clip) -> tuple[tuple[str, int], ...]:
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


class _Wrapped:
    """A part of a CLIP with some methods replaced. All other attributes come from the original."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        if name == "inner":     # not set yet while being copied
            raise AttributeError(name)
        return getattr(self.inner, name)


class _Tokenizer(_Wrapped):
    """A CLIP's tokenizer with placeholders. A learned word becomes a token `[L, D]` of L layer copies."""

    def __init__(self, original, encoders: tuple[str, ...], concepts: Concepts) -> None:
        super().__init__(copy.copy(original))
        self.original, self.concepts = original, concepts
        self.vocabulary = Vocabulary(info for info, _ in concepts.values())
        for encoder in encoders:
            setattr(self.inner, encoder, self._with_words(getattr(original, encoder), encoder))

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        prompt = self.vocabulary.parse(text)     # raises for an unknown placeholder
        marked = prompt.substituted(lambda name: f" embedding:{_MARK}{name} ")
        return self.inner.tokenize_with_weights(marked, *args, **kwargs)

    def _with_words(self, tokenizer, encoder: str):
        """Copies an SDTokenizer. Its `embedding:` look-up finds learned words before files."""
        clone = copy.copy(tokenizer)
        files = tokenizer._try_get_embedding
        clone.embedding_directory = []
        arity = len(clone._try_get_embedding("nothing"))      # results, more since 0.33
        clone.embedding_directory = tokenizer.embedding_directory or []

        def look_up(embedding_name: str):
            first, _, rest = embedding_name.partition(" ")
            if not first.startswith(_MARK):
                return files(embedding_name)
            words = self.vocabulary.entries[first.removeprefix(_MARK)]
            groups = [self.concepts[word.concept][1] for word in words]
            vectors = torch.stack([group.word(word.position, encoder).float()
                                   for group, word in zip(groups, words, strict=True)])      # [words, L, D]
            return (vectors, rest.strip()) if arity == 2 else (vectors, first, rest.strip())

        clone._try_get_embedding = look_up
        return clone


class _Encoder(_Wrapped):
    """A CLIP's text model that encodes prompts once per layer copy; the CONDITIONING carries all copies.

    The CONDITIONING itself is the mean over the copies, for nodes without layer support (ControlNet, other
    MODELs, averaging). The copies' differences from the mean are a model condition. Words with a placeholder
    noun are encoded separately, see `conditioning.placeholder_nouns`.
    """

    def __init__(self, inner, encoders: tuple[str, ...], concepts: Concepts, clip) -> None:
        """clip: Provides the tokenizers for the placeholder nouns."""
        super().__init__(inner)
        groups = {name: tokens for name, (_, tokens) in concepts.items()}
        self.copies = max(tokens.copies for tokens in groups.values())
        self.nouns = {encoder: noun_ids(ComfyText(encoder, clip), groups) for encoder in encoders}
        self.word_bound = {name for name, (info, _) in concepts.items() if info.composes.kind is Kind.WORDS}
        self.words: dict[bytes, WordRef] = {}      # codes of the word-bound concepts
        for name, group in groups.items():
            if name in self.word_bound or group.placeholder_noun:
                for i in range(len(group.words)):
                    self.words |= {_key(group.word(i, encoder)): WordRef(name, i) for encoder in encoders}

    def encode_token_weights(self, tokens):
        words = [self.words.get(_key(token)) for chunk in next(iter(tokens.values())) for token, *_ in chunk]
        apart = encoded_apart(words, next(iter(self.nouns.values())))
        output, hidden = self._layers(self._with_nouns(tokens) if apart else tokens)
        for name in apart:
            _, own_states = self._layers(self._with_nouns(tokens, but=name))
            hidden = with_words(hidden, own_states, positions_of(words)[name])
        if self.copies == 1 and not self.word_bound:
            return (hidden[:, 0], *output[1:])
        hidden = hidden.expand(-1, self.copies, -1, -1) if hidden.shape[1] == 1 else hidden
        mean = hidden[:, 0] + (hidden - hidden[:, :1]).mean(1)      # exact where all copies are equal
        return mean, output[1], self._extra(output, hidden - mean.unsqueeze(1), words)

    def _layers(self, tokens):
        """Encodes tokens once per layer copy.

        Returns:
            The text model's output, with the pooled output averaged over copies, and hidden states `[B, L, N,
            D]`. L = 1 without layer-wise words.
        """
        layers = max((token.shape[0] for token in _learned(tokens)), default=1)
        outputs = [self.inner.encode_token_weights(_at(tokens, layer)) for layer in range(layers)]
        hidden = torch.stack([output[0] for output in outputs], dim=1)
        pooled = None if outputs[0][1] is None else torch.stack([output[1] for output in outputs]).mean(0)
        return (outputs[0][0], outputs[0][1] if layers == 1 else pooled, *outputs[0][2:]), hidden

    def _with_nouns(self, tokens, but: str = ""):
        """Replaces words that have a placeholder noun by the noun, except the words of concept `but`."""
        def pick(token, encoder: str):
            noun = noun_for(self.words.get(_key(token)), self.nouns.get(encoder, {}), but)
            return token if noun is None else noun

        return {key: [[(pick(token, f"clip_{key}"), *rest) for token, *rest in chunk] for chunk in chunks]
                for key, chunks in tokens.items()}

    def _extra(self, output, offsets: Tensor, words: Words) -> dict:
        """The CONDITIONING's dictionary with the copies' offsets and the codes of word-bound words."""
        extra = dict(output[2]) if len(output) > 2 else {}
        conds = {**extra.get("model_conds", {}), OFFSETS: OffsetCond(offsets)}
        if self.word_bound:
            concepts = [None if word is None else word.concept for word in words]
            codes = torch.tensor([code(name) if name in self.word_bound else 0 for name in concepts])
            by_row = codes.to(offsets.device).view(1, 1, -1, 1).expand(offsets.shape[0], -1, -1, -1)
            conds[WORDS] = OffsetCond(by_row)
        return extra | {"model_conds": conds}


def _key(token) -> bytes:
    """Identifies a learned word by its values, because ComfyUI's tokenizer passes nothing else on."""
    return token.detach().float().cpu().contiguous().numpy().tobytes() if torch.is_tensor(token) else b""


def _learned(tokens) -> list[Tensor]:
    return [token for chunks in tokens.values() for chunk in chunks for token, *_ in chunk
            if torch.is_tensor(token) and token.ndim == 2]


def _at(tokens, layer: int):
    """The tokens for one layer copy: learned words `[L, D]` become `[D]`."""
    def pick(token):
        if not torch.is_tensor(token) or token.ndim != 2:
            return token
        return token[layer if token.shape[0] > 1 else 0]

    return {name: [[(pick(token), *rest) for token, *rest in chunk] for chunk in chunks]
            for name, chunks in tokens.items()}


def learned_positions(clip, prompt: str) -> tuple[int, ...]:
    """Positions of a prompt's learned words in its first chunk, or of all its words if none is learned."""
    chunk = next(iter(clip.tokenize(prompt).values()))[0]
    learned = [i for i, (token, *_) in enumerate(chunk) if torch.is_tensor(token)]
    return tuple(learned) or tuple(range(1, max(2, len(chunk) - 1 - _padding(chunk))))


def subject_of(clip, prompt: str) -> Subject:
    """Positions of a prompt's concepts and its text in the first chunk; empty without concepts."""
    if not isinstance(clip.tokenizer, _Tokenizer):
        return Subject((), ())
    chunk = next(iter(clip.tokenize(prompt).values()))[0]
    tokens = [token for token, *_ in chunk]
    end_id = getattr(clip.tokenizer, encoder_names(clip)[0]).end_token
    ends = (i for i, token in enumerate(tokens) if not torch.is_tensor(token) and token == end_id)
    end = next(ends, len(tokens))
    pieces = clip.tokenizer.vocabulary.parse(prompt).pieces
    words = iter([piece for piece in pieces if isinstance(piece, WordRef)])      # words may be cut off
    positions = positions_of(next(words, None) if torch.is_tensor(token) else None for token in tokens)
    return Subject(tuple(positions.values()), tuple(range(1, end)))


def _padding(chunk) -> int:
    """Number of padding tokens at the end of a chunk."""
    same = 0
    while same < len(chunk) - 1 and chunk[-1 - same][0] == chunk[-2 - same][0]:
        same += 1
    return same


def concept_clip(clip, bank: ConceptBank):
    """Returns a CLIP that also accepts the bank's placeholders. If names clash with embedding files, the
    bank's concept is used.

    The given CLIP is not changed. For an empty bank it is returned itself.
    """
    if not len(bank):
        return clip
    tokenizer, encoder, encoders = clip.tokenizer, clip.cond_stage_model, encoder_names(clip)
    concepts = dict(tokenizer.concepts) if isinstance(tokenizer, _Tokenizer) else {}
    concepts |= {concept.name: (concept.info, concept.tokens) for concept in bank}
    original = tokenizer.original if isinstance(tokenizer, _Tokenizer) else tokenizer
    inner = encoder.inner if isinstance(encoder, _Encoder) else encoder
    clone = clip.clone()
    clone.tokenizer = _Tokenizer(original, encoders, concepts)
    clone.cond_stage_model = _Encoder(inner, encoders, concepts, clip)
    return clone


def encode(clip, prompt: str):
    """Encodes like CLIP Text Encode. A placeholder raises an error if the CLIP has no concepts."""
    if not isinstance(clip.tokenizer, _Tokenizer):
        NO_CONCEPTS.parse(prompt)
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
