"""Encodes prompts of text and learned words, once per layer copy of the words."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..bank.prompts import Prompt, WordRef, filled_templates
from ..bank.tokens import TokenGroup
from ..errors import ConceptError
from ..model.backbone import Backbone, TextEncoder, TextPiece, WholePromptEncoder, WholeText
from ..model.context import Context, strengths_or_none
from .placeholder_nouns import encoded_apart, noun_ids, positions_of, with_words
from .rows import Row, chunks_of, groups_of, row_of
from .whole_prompts import encode_whole

REPEATS = 4      # a prompt is repeated to the length of others at most so often, as in ComfyUI

class TextMemory:
    """Cache of encoded texts, for callers that repeat them, such as training.

    Texts with words that are being trained are not cached. Each text is encoded alone, so that its states do
    not depend on a batch.
    """

    LIMIT = 512     # capacity in texts; further texts are not cached

    def __init__(self) -> None:
        self._encoded: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor | None]] = {}
        self._words: dict[tuple, Tensor] = {}
        self.whole: dict[tuple[TextPiece, ...], WholeText] = {}

    @torch.no_grad()
    def get(self, encoder: TextEncoder, row: Row, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Cached or new states `[1, N, D]` and pooled output `[1, P]` or None."""
        key = encoder.name, tuple(row.ids)
        if key in self._encoded:
            return self._encoded[key]
        hidden, pooled = _EncoderPass(encoder, {}, device).encode([row], 1)
        encoded = hidden[0], None if pooled is None else pooled[0]
        if len(self._encoded) < self.LIMIT:
            self._encoded[key] = encoded
        return encoded

    @torch.no_grad()
    def words(self, encoding: _EncoderPass, row: Row, copies: int) -> Tensor:
        """Cached or new states `[L, N, D]` of a row for its words, which are not being trained."""
        key = encoding.encoder.name, tuple(row.ids), tuple(row.words), copies
        if key in self._words:
            return self._words[key]
        states = encoding.words_only([row], copies)[0]
        if len(self._words) < self.LIMIT:
            self._words[key] = states
        return states


@dataclass(frozen=True)
class _EncoderPass:
    """One text encoder with the learned words of the prompts to encode."""

    encoder: TextEncoder
    tokens: Mapping[str, TokenGroup]
    device: torch.device
    memory: TextMemory | None = None

    def encode(self, rows: Sequence[Row], copies: int, chunk: int = 0) -> tuple[Tensor, Tensor | None]:
        """Encodes rows as they are, in one batch over rows, layer copies and chunks.

        Args:
            rows: B rows of N ids each.
            copies: L, the number of layer copies.
            chunk: Tokens per chunk; 0 = the encoder's length.

        Returns:
            Hidden states `[B, L, N, D]` and the first chunks' pooled output `[B, L, P]` or None.
        """
        chunk = chunk or self.encoder.length
        ids = torch.tensor([row.ids for row in rows], device=self.device)
        slots = torch.tensor([[word is not None for word in row.words] for row in rows], device=self.device)
        batch, length = ids.shape
        vectors = [self._vectors(row, copies) for row in rows if row.has_words]
        flat = torch.cat(vectors) if vectors else torch.zeros(0, self.encoder.width, device=self.device)
        by_copy = [x.unsqueeze(1).expand(-1, copies, -1).reshape(-1, chunk) for x in (ids, slots)]
        hidden, pooled = self.encoder.encode(by_copy[0], by_copy[1], flat)
        if pooled is not None:      # pooled output of the first chunk, as in both hosts
            pooled = pooled.view(batch, copies, length // chunk, -1)[:, :, 0]
        return hidden.view(batch, copies, length, -1), pooled

    def _vectors(self, row: Row, copies: int) -> Tensor:
        """Vectors of a row's learned words in batch order: copy by copy, `[L * words, width]`."""
        words = [word for word in row.words if word is not None]
        vectors = [self.tokens[word.concept].word(word.position, self.encoder.name) for word in words]
        vectors = [vector.float().to(self.device).expand(copies, -1) for vector in vectors]
        return torch.stack(vectors).transpose(0, 1).reshape(-1, self.encoder.width)

    def remembered(self, rows: Sequence[Row], copies: int) -> tuple[Tensor, Tensor | None]:
        """Like `encode`. If there is a cache, it takes rows without learned words from there, and encodes
        equal rows once: the captions of a few photos repeat in a batch."""
        if self.memory is None:
            return self.encode(rows, copies)
        worded, memory = {row.key: row for row in rows if row.has_words}, self.memory
        fresh = zip(*_given(self.encode([*worded.values()], copies)), strict=True) if worded else ()
        states_of = dict(zip(worded, fresh, strict=True))
        encoded = [states_of[row.key] if row.has_words else _given(memory.get(self.encoder, row, self.device))
                   for row in rows]
        stacked = [torch.stack([part.expand(copies, *part.shape[1:]) for part in parts])
                   for parts in zip(*encoded, strict=True)]
        return stacked[0], stacked[1] if len(stacked) > 1 else None

    def apart(self, rows: Sequence[Row], copies: int) -> tuple[Tensor, Tensor | None]:
        """Like `encode`, but encodes words with placeholder nouns separately."""
        nouns = noun_ids(self.encoder, self.tokens)
        apart = [(b, name) for b, row in enumerate(rows) for name in encoded_apart(row.words, nouns)]
        if not apart:
            return self.remembered(rows, copies)
        rest = [row.with_nouns(nouns) for row in rows]
        together = {word.concept for row in rest for word in row.words if word is not None}
        layers = max([self.tokens[name].copies for name in together], default=1)
        hidden, pooled = self.remembered(rest, layers)
        own_states = self._apart_states([rows[b].with_nouns(nouns, but=name) for b, name in apart], copies)
        states = list(hidden.expand(-1, copies, -1, -1))
        for (b, name), words in zip(apart, own_states, strict=True):
            states[b] = with_words(states[b], words, positions_of(rows[b].words)[name])
        return torch.stack(states), pooled

    def _apart_states(self, rows: Sequence[Row], copies: int) -> list[Tensor]:
        """States `[L, N, D]` of each row for its words, from the cache where they are not being trained."""
        memory = self.memory
        if memory is None:
            return list(self.words_only(rows, copies))
        trained = [row for row in rows if self._is_trained(row)]
        fresh = iter(self.words_only(trained, copies) if trained else ())
        return [next(fresh) if self._is_trained(row) else memory.words(self, row, copies) for row in rows]

    def _is_trained(self, row: Row) -> bool:
        groups = {word.concept for word in row.words if word is not None}
        return any(self.tokens[name].vectors[self.encoder.name].requires_grad for name in groups)

    def words_only(self, rows: Sequence[Row], copies: int) -> Tensor:
        """States `[B, L, N, D]` of rows for their learned words; states of other tokens may be zero."""
        length = len(rows[0].ids)
        needed = 1 + max(i for row in rows for i, word in enumerate(row.words) if word is not None)
        if not self.encoder.encodes_prefixes or length > self.encoder.length:
            return self.encode(rows, copies)[0]
        # The encoder is causal: later tokens do not reach the words.
        short = [Row(row.ids[:needed], row.words[:needed]) for row in rows]
        return pad(self.encode(short, copies, needed)[0], (0, 0, 0, length - needed))

    def weighed(self, hidden: Tensor, rows: Sequence[Row], by_strength: Collection[str]) -> Tensor:
        """Moves the states of weighted tokens between those of the empty prompt and their own, as ComfyUI
        does.

        Args:
            hidden: States `[B, L, N, D]`.
            rows: B rows.
            by_strength: Concepts whose words keep their states, because their weights act on deltas.
        """
        weights = [[1.0 if word is not None and word.concept in by_strength else weight
                    for word, weight in zip(row.words, row.weights, strict=True)] for row in rows]
        if all(weight == 1.0 for row in weights for weight in row):
            return hidden
        empty = row_of(self.encoder, [], 1)
        if self.memory is None:
            plain = self.encode([empty], 1)[0]
        else:
            plain = self.memory.get(self.encoder, empty, self.device)[0].unsqueeze(0)
        plain = plain.repeat(1, 1, hidden.shape[2] // plain.shape[2], 1)
        factors = torch.tensor(weights, device=hidden.device, dtype=hidden.dtype)[:, None, :, None]
        return torch.where(factors == 1.0, hidden, (hidden - plain) * factors + plain)


def _given(parts: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    return [part for part in parts if part is not None]


def encode_prompts(backbone: Backbone, prompts: Sequence[Prompt], tokens: Mapping[str, TokenGroup],
                   chunks: int = 1, memory: TextMemory | None = None,
                   by_strength: Collection[str] = ()) -> Context:
    """Encodes prompts as one batch.

    What a site reads of a prompt does not depend on longer ones beside it: shorter ones are repeated, or
    filled up in a joint attention. Words with a placeholder noun are encoded separately, see
    `placeholder_nouns`. States of several text encoders are concatenated (SDXL). The pooled output is the
    mean over layer copies, because the UNet takes only one.

    Args:
        prompts: B parsed prompts.
        tokens: Concept -> its learned words, for all concepts in the prompts. Gradients reach their vectors.
        chunks: Minimum number of chunks per prompt.
        memory: Cache of texts. Valid while the text encoders, and words that are not being trained, do not
            change.
        by_strength: Concepts whose weights are factors on their deltas. All other weights act on states.

    Returns:
        Hidden states `[B, L, N, D]`, L = 1 if no word has layer copies, and the positions of every concept's
        words.

    Raises:
        ConceptError: `tokens` lacks a concept of the prompts.
    """
    used = {name: tokens.get(name) for prompt in prompts for name in prompt.concepts}
    missing = sorted(name for name, group in used.items() if group is None)
    if missing:
        raise ConceptError(f"the words of concept '{missing[0]}' are not loaded")
    groups = {name: group for name, group in used.items() if group is not None}
    encoder = backbone.text[0]
    if isinstance(encoder, WholePromptEncoder):
        return encode_whole(encoder, prompts, groups, by_strength, None if memory is None else memory.whole,
                            backbone.layout.is_joint)
    copies = max([group.copies for group in groups.values()], default=1)
    laid_out = [[chunks_of(encoder, groups_of(encoder, prompt)) for prompt in prompts]
                for encoder in backbone.text]
    counts = [max(chunks, *map(len, of_prompt)) for of_prompt in zip(*laid_out, strict=True)]
    if len(set(counts)) > 1 and (backbone.layout.is_joint or math.lcm(*counts) <= REPEATS * min(counts)):
        return _encoded_by_length(backbone, prompts, counts, tokens, memory, by_strength)
    chunks = max(counts)
    hiddens, pooled = [], None
    for encoder, of_encoder in zip(backbone.text, laid_out, strict=True):
        rows = [row_of(encoder, prompt, chunks) for prompt in of_encoder]
        encoding = _EncoderPass(encoder, groups, backbone.device, memory)
        hidden, own_pooled = encoding.apart(rows, copies)
        hiddens.append(encoding.weighed(hidden, rows, by_strength))
        pooled = own_pooled if own_pooled is not None else pooled
    words = tuple(positions_of(row.words) for row in rows)
    strengths = tuple({name: tuple(row.weights[place] for place in places)
                       for name, places in found.items() if name in by_strength}
                      for row, found in zip(rows, words, strict=True))
    return Context(torch.cat(hiddens, dim=-1), None if pooled is None else pooled.mean(1), words,
                   strengths_or_none(strengths),
                   (len(rows[0].ids),) * len(rows) if backbone.layout.is_joint else ())


def _encoded_by_length(backbone: Backbone, prompts: Sequence[Prompt], counts: Sequence[int],
                       tokens: Mapping[str, TokenGroup], memory: TextMemory | None,
                       by_strength: Collection[str]) -> Context:
    """`encode_prompts` of prompts with different numbers of chunks, each as without the others: a short
    prompt that was filled up with empty chunks would be attended less."""
    parts: dict[int, Context] = {}
    for count in set(counts):
        rows = [i for i, chunks in enumerate(counts) if chunks == count]
        context = encode_prompts(backbone, [prompts[i] for i in rows], tokens, count, memory, by_strength)
        parts |= {i: context[k:k + 1] for k, i in enumerate(rows)}
    return Context.cat([parts[i] for i in range(len(prompts))])


@torch.no_grad()
def encode_concept(backbone: Backbone, name: str, tokens: TokenGroup, prompts: Sequence[str]) -> Context:
    """Encodes prompts in which `{}` stands for a concept that need not be in a bank."""
    return encode_prompts(backbone, filled_templates(prompts, name, tokens.words), {name: tokens})


def encode_words(backbone: Backbone, tokens: Mapping[str, TokenGroup]) -> list[Tensor]:
    """Encodes each concept's words as a prompt of their own, to `[L, words, D]` per concept.

    Concepts with the same number of layer copies share one batch. If the encoder accepts short rows, the rows
    are only as long as the words, so a hundred concepts cost as much as a few prompts.
    """
    states_of: dict[str, list[Tensor]] = {name: [] for name in tokens}
    for encoder in backbone.text:
        encoding = _EncoderPass(encoder, tokens, backbone.device)
        rows = {name: row_of(encoder, [[(WordRef(name, i), 1.0) for i in range(len(group.words))]], 1)
                for name, group in tokens.items()}
        for copies in {group.copies for group in tokens.values()}:
            names = [name for name, group in tokens.items() if group.copies == copies]
            hidden = encoding.words_only([rows[name] for name in names], copies)
            for name, states in zip(names, hidden, strict=True):
                states_of[name].append(states[:, list(positions_of(rows[name].words)[name])])
    return [torch.cat(parts, dim=-1) for parts in states_of.values()]


def text_positions(backbone: Backbone, prompt: Prompt) -> tuple[int, ...]:
    """Token positions of a prompt's text and words, without begin, end and padding."""
    encoder = backbone.text[-1]
    if isinstance(encoder, WholePromptEncoder):
        return tuple(range(len(encoder.ids(prompt.text))))
    chunks = chunks_of(encoder, groups_of(encoder, prompt))
    return tuple(number * encoder.length + 1 + i for number, chunk in enumerate(chunks)
                 for i in range(len(chunk)))
