"""Prompts to contexts: text and learned words through a backbone's text encoders, one copy per layer where words have layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.prompts import Prompt, WordRef
from ..bank.tokens import TokenGroup
from ..errors import ConceptError
from ..model.backbone import Backbone, Context, TextEncoder

SLOT_ID = 0     # stands in the id row where a learned vector goes; never the end token, whose place some encoders look up


@dataclass(frozen=True)
class _Row:
    """One prompt for one encoder: ids over all chunks, and which position holds which learned word."""

    ids: list[int]
    slots: dict[int, WordRef]


def _units(encoder: TextEncoder, prompt: Prompt) -> list[int | WordRef]:
    units: list[int | WordRef] = []
    for piece in prompt.pieces:
        units += [piece] if isinstance(piece, WordRef) else encoder.ids(piece)
    return units


def _row(encoder: TextEncoder, units: list[int | WordRef], chunks: int) -> _Row:
    """Chunks of `length - 2` units, each between begin and end, padded (as ComfyUI and A1111 do with long prompts)."""
    room = encoder.length - 2
    ids, slots = [], {}
    for start in range(0, chunks * room, room):
        ids.append(encoder.start)
        for unit in units[start:start + room]:
            if isinstance(unit, WordRef):
                slots[len(ids)] = unit
            ids.append(SLOT_ID if isinstance(unit, WordRef) else unit)
        ids.append(encoder.end)
        ids += [encoder.pad] * (-len(ids) % encoder.length)
    return _Row(ids, slots)


class TextMemory:
    """Texts without learned words, encoded once. For who encodes the same ones again and again, as learning does; each is encoded alone,
    so that what comes out does not depend on the company it was first met in."""

    LIMIT = 512     # texts; beyond it they are encoded anew each time

    def __init__(self) -> None:
        self._known: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor | None]] = {}

    @torch.no_grad()
    def get(self, encoder: TextEncoder, row: _Row, device) -> tuple[Tensor, Tensor | None]:
        """hidden `[1, N, D]`, pooled `[1, P]` or None."""
        key = encoder.name, tuple(row.ids)
        found = self._known.get(key)
        if found is None:
            hidden, pooled = _encode_rows(encoder, [row], {}, 1, device)
            found = hidden[0], None if pooled is None else pooled[0]
            if len(self._known) < self.LIMIT:
                self._known[key] = found
        return found


def _encode_remembered(encoder: TextEncoder, rows: list[_Row], tokens: Mapping[str, TokenGroup], copies: int, device,
                       memory: TextMemory) -> tuple[Tensor, Tensor | None]:
    """As `_encode_rows`; rows without learned words come from the memory."""
    worded = [row for row in rows if row.slots]
    fresh = iter(zip(*_some(_encode_rows(encoder, worded, tokens, copies, device)), strict=True) if worded else ())
    found = [next(fresh) if row.slots else _some(memory.get(encoder, row, device)) for row in rows]
    stacked = [torch.stack([part.expand(copies, *part.shape[1:]) for part in parts]) for parts in zip(*found, strict=True)]
    return stacked[0], stacked[1] if len(stacked) > 1 else None


def _some(parts: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    return [part for part in parts if part is not None]


def _encode_rows(encoder: TextEncoder, rows: list[_Row], tokens: Mapping[str, TokenGroup], copies: int,
                 device, chunk: int = 0) -> tuple[Tensor, Tensor | None]:
    """hidden `[B, L, N, D]`, pooled `[B, L, P]` or None. One batch over prompts, copies and chunks of the encoder's length (or `chunk`)."""
    batch, length, chunk = len(rows), len(rows[0].ids), chunk or encoder.length
    ids = torch.tensor([row.ids for row in rows], device=device)
    slots = torch.zeros(ids.shape, dtype=torch.bool, device=device)
    vectors = []
    for b, row in enumerate(rows):
        for position in sorted(row.slots):
            slots[b, position] = True
            ref = row.slots[position]
            vectors.append(tokens[ref.concept].word(ref.position, encoder.name).float().to(device).expand(copies, -1))
    # Row order of the batch below: prompt, copy, chunk; the vectors follow it, so they are laid out per prompt and copy.
    counts = [len(row.slots) for row in rows]
    per_prompt = torch.stack(vectors).split(counts) if vectors else []
    ordered = [group.transpose(0, 1).reshape(-1, encoder.width) for group in per_prompt]
    flat = torch.cat(ordered) if ordered else torch.zeros(0, encoder.width, device=device)
    chunked = ids.unsqueeze(1).expand(-1, copies, -1).reshape(-1, chunk)
    chunked_slots = slots.unsqueeze(1).expand(-1, copies, -1).reshape(-1, chunk)
    hidden, pooled = encoder.encode(chunked, chunked_slots, flat)
    hidden = hidden.view(batch, copies, length, -1)
    if pooled is not None:      # of the first chunk, as both hosts do
        pooled = pooled.view(batch, copies, length // chunk, -1)[:, :, 0]
    return hidden, pooled


def placeholder_noun_ids(encoder: TextEncoder, text: str, words: int) -> list[int]:
    """As many token ids as a concept has words: the last of "a <stand-in>", the first of them repeated where there are too few."""
    ids = (encoder.ids(f"a {text}") or [encoder.pad])[-words:]
    return [ids[0]] * (words - len(ids)) + ids


def _standing_in(encoder: TextEncoder, row: _Row, tokens: Mapping[str, TokenGroup], but: str = "") -> _Row:
    """The row with stand-ins for the words that have one, those of the concept `but` excepted."""
    ids, slots = list(row.ids), dict(row.slots)
    for position, ref in row.slots.items():
        group = tokens[ref.concept]
        if group.placeholder_noun and ref.concept != but:
            ids[position] = placeholder_noun_ids(encoder, group.placeholder_noun, len(group.words))[ref.position]
            del slots[position]
    return _Row(ids, slots)


def _encode_apart(encoder: TextEncoder, rows: list[_Row], tokens: Mapping[str, TokenGroup], copies: int,
                  device, memory: TextMemory | None) -> tuple[Tensor, Tensor | None]:
    """As `_encode_rows`, with the words that have stand-ins encoded apart."""
    def encode(rows: list[_Row], copies: int) -> tuple[Tensor, Tensor | None]:
        if memory is None:
            return _encode_rows(encoder, rows, tokens, copies, device)
        return _encode_remembered(encoder, rows, tokens, copies, device, memory)

    apart = [(b, name) for b, row in enumerate(rows) for name in dict.fromkeys(ref.concept for ref in row.slots.values())
             if tokens[name].placeholder_noun]
    if not apart:
        return encode(rows, copies)
    rest = [_standing_in(encoder, row, tokens) for row in rows]
    layers = max([tokens[ref.concept].copies for row in rest for ref in row.slots.values()], default=1)
    hidden, pooled = encode(rest, layers)
    own = _words_apart(encoder, [_standing_in(encoder, rows[b], tokens, but=name) for b, name in apart], tokens, copies, device)
    found = list(hidden.expand(-1, copies, -1, -1))
    for (b, name), words in zip(apart, own, strict=True):
        places = torch.zeros(hidden.shape[2], 1, dtype=torch.bool, device=hidden.device)
        places[[position for position, ref in rows[b].slots.items() if ref.concept == name]] = True
        found[b] = torch.where(places, words, found[b])
    return torch.stack(found), pooled


def _words_apart(encoder: TextEncoder, rows: list[_Row], tokens: Mapping[str, TokenGroup], copies: int, device) -> Tensor:
    """Hidden states `[B, L, N, D]` of rows of which only the learned words are wanted; behind the last of them there may be zeros."""
    length = len(rows[0].ids)
    needed = 1 + max(max(row.slots) for row in rows)
    if not encoder.encodes_prefixes or length > encoder.length:
        return _encode_rows(encoder, rows, tokens, copies, device)[0]
    short = [_Row(row.ids[:needed], row.slots) for row in rows]      # causal: what comes later does not reach the words
    hidden = _encode_rows(encoder, short, tokens, copies, device, needed)[0]
    return torch.nn.functional.pad(hidden, (0, 0, 0, length - needed))


def encode_prompts(backbone: Backbone, prompts: Sequence[Prompt], tokens: Mapping[str, TokenGroup],
                   chunks: int = 1, memory: TextMemory | None = None) -> Context:
    """Encodes prompts as one batch.

    tokens: token groups by concept name; gradients flow into their vectors. chunks: at least so many chunks per prompt. memory: where
    texts without learned words are kept from call to call, while the text encoders stay what they are.
    Words with a stand-in are encoded apart: everything else of the prompt is encoded with their stand-in in their place, and each such
    concept's words with the others' stand-ins. Nothing else then changes because a concept is named, and no concept because of another.
    With several text encoders hidden states lie side by side (SDXL); their pooled output is the mean over layer copies, since the
    UNet takes one.
    """
    used = {name for prompt in prompts for name in prompt.concepts}
    missing = sorted(used - set(tokens))
    if missing:
        raise ConceptError(f"the words of concept '{missing[0]}' are not loaded")
    copies = max([tokens[name].copies for name in used], default=1)
    hiddens, pooled = [], None
    units = [[_units(encoder, prompt) for prompt in prompts] for encoder in backbone.text]
    longest = max((len(u) / (encoder.length - 2) for group, encoder in zip(units, backbone.text, strict=True) for u in group), default=0)
    chunks = max(chunks, -int(-longest // 1))
    for encoder, group in zip(backbone.text, units, strict=True):
        rows = [_row(encoder, u, chunks) for u in group]
        hidden, own_pooled = _encode_apart(encoder, rows, tokens, copies, backbone.device, memory)
        hiddens.append(hidden)
        pooled = own_pooled if own_pooled is not None else pooled
    words = tuple(_positions(row) for row in rows)
    return Context(torch.cat(hiddens, dim=-1), None if pooled is None else pooled.mean(1), words)


def encode_words(backbone: Backbone, tokens: Mapping[str, TokenGroup]) -> list[Tensor]:
    """Every concept's words as a prompt of them alone has them, `[L, words, D]` each. One batch for all concepts, no longer than their
    words where the encoder allows that: a hundred concepts cost what a few prompts do."""
    names = list(tokens)
    found: list[list[Tensor]] = [[] for _ in names]
    for encoder in backbone.text:
        rows = [_row(encoder, [WordRef(name, i) for i in range(len(group.words))], 1) for name, group in tokens.items()]
        for copies in {tokens[name].copies for name in names}:
            of = [i for i, name in enumerate(names) if tokens[name].copies == copies]
            hidden = _words_apart(encoder, [rows[i] for i in of], tokens, copies, backbone.device)
            for i, states in zip(of, hidden, strict=True):
                found[i].append(states[:, sorted(rows[i].slots)])
    return [torch.cat(parts, dim=-1) for parts in found]


def text_positions(backbone: Backbone, prompt: Prompt) -> tuple[int, ...]:
    """Token positions of a prompt's own text and words; begin, end and padding left out."""
    encoder = backbone.text[-1]
    room = encoder.length - 2
    count = len(_units(encoder, prompt))
    return tuple(i // room * encoder.length + 1 + i % room for i in range(count))


def _positions(row: _Row) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for position, ref in row.slots.items():
        found.setdefault(ref.concept, []).append(position)
    return {name: tuple(places) for name, places in found.items()}
