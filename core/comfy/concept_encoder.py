"""The text model of a CLIP with concepts: encodes prompts whose tokens may be learned words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.composition import Kind
from ..bank.concepts import ConceptInfo
from ..bank.prompts import WordRef
from ..bank.tokens import TokenGroup
from ..conditioning.placeholder_nouns import encoded_apart, noun_for, noun_ids, positions_of, with_words
from ..errors import ConceptError
from .prompt_states import PromptStates, conditions_of
from .text import ComfyText, text_widths
from .token_lora import code


@dataclass(frozen=True)
class KnownConcept:
    """A concept of the CLIP. by_strength: whether its weights in prompts are factors on its deltas."""

    info: ConceptInfo
    tokens: TokenGroup
    by_strength: bool


Concepts = dict[str, KnownConcept]


KEY_LENGTH = 9      # numbers that identify a learned word, see `_numbers`


class Wrapped:
    """A part of a CLIP with some methods replaced. All other attributes come from the original."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        if name == "inner":     # not set yet while being copied
            raise AttributeError(name)
        return getattr(self.inner, name)


_Row = list[tuple[WordRef | None, float]]      # the learned word and the weight at every token


class ConceptEncoder(Wrapped):
    """A CLIP's text model that encodes prompts once per layer copy; the CONDITIONING carries all copies.

    The CONDITIONING itself is the mean over the copies, for nodes without layer support (ControlNet, other
    MODELs). The copies' differences from the mean and the strengths of word-bound concepts are model
    conditions, see `prompt_states`. Words with a placeholder noun are encoded separately, see
    `conditioning.placeholder_nouns`.
    """

    def __init__(self, inner, encoders: tuple[str, ...], concepts: Concepts, clip,
                 acting: Mapping[str, float] | None = None) -> None:
        """clip: Provides the tokenizers for the placeholder nouns. acting: See `concept_clip`."""
        super().__init__(inner)
        groups = {name: known.tokens for name, known in concepts.items()}
        self.copies = max(tokens.copies for tokens in groups.values())
        self.nouns = {encoder: noun_ids(ComfyText(encoder, clip), groups) for encoder in encoders}
        self.word_bound = {name for name, known in concepts.items()
                           if known.info.composes.kind is Kind.WORDS}
        self.by_strength = {name for name, known in concepts.items() if known.by_strength}
        self.acting = acting
        self.encoders, self.widths = encoders, [width for _, width in text_widths(clip)]
        refs = [WordRef(name, i) for name, group in groups.items() for i in range(len(group.words))]
        self.words = {_numbers(ref): ref for ref in refs}

    def encode_token_weights(self, tokens):
        rows = [self._row(tokens[encoder.removeprefix("clip_")]) for encoder in self.encoders]
        merged = _merged(rows)
        tokens = self._without_strengths(tokens)
        nouns = next(iter(self.nouns.values()))
        apart = encoded_apart([word for word, _ in merged], nouns)
        output, hidden = self._layers(self._with_nouns(tokens) if apart else tokens)
        for name in apart:
            _, own_states = self._layers(self._with_nouns(tokens, but=name))
            hidden = self._with_words(hidden, own_states, rows, name)
        if self.copies == 1 and not self.word_bound:
            return (hidden[:, 0], *output[1:])
        hidden = hidden.expand(-1, self.copies, -1, -1) if hidden.shape[1] == 1 else hidden
        mean = hidden[:, 0] + (hidden - hidden[:, :1]).mean(1)      # exact where all copies are equal
        return self._output(output, mean, hidden - mean.unsqueeze(1), merged)

    def _row(self, chunks) -> _Row:
        return [(self.words.get(_key(token)), weight) for chunk in chunks for token, weight, *_ in chunk]

    def _without_strengths(self, tokens):
        """Gives words the weight 1 where the weight is a factor on deltas. ComfyUI would scale their states.
        """
        def weight_of(token, weight: float) -> float:
            word = self.words.get(_key(token))
            if word is None or word.concept not in self.by_strength:
                return weight
            if word.concept in self.word_bound or self.acting is None:
                return 1.0
            return 1.0 if self.acting.get(word.concept) == weight else weight

        return {key: [[(token, weight_of(token, weight), *rest) for token, weight, *rest in chunk]
                      for chunk in chunks] for key, chunks in tokens.items()}

    def _with_words(self, rest: Tensor, own: Tensor, rows: Sequence[_Row], name: str) -> Tensor:
        """Inserts the separately encoded states of a concept at its words, for each encoder at its own."""
        places = [positions_of(word for word, _ in row).get(name, ()) for row in rows]
        if all(found == places[0] for found in places):
            return with_words(rest, own, places[0])
        length = rest.shape[2]
        parts = zip(rest.split(self.widths, -1), own.split(self.widths, -1), places, strict=True)
        return torch.cat([with_words(r, o, [place for place in found if place < length])
                          for r, o, found in parts], -1)

    def _layers(self, tokens):
        """Encodes tokens once per layer copy.

        Returns:
            The text model's output, with the pooled output averaged over copies, and hidden states `[B, L, N,
            D]`. L = 1 without layer-wise words.
        """
        layers = max((token.shape[0] - 1 for token in _learned(tokens)), default=1)
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

    def _output(self, output, mean: Tensor, offsets: Tensor, merged: _Row) -> tuple:
        """The text model's output with what the concepts add, see `prompt_states`."""
        extra = dict(output[2]) if len(output) > 2 else {}
        strengths: dict[int, Tensor] = {}
        for name, places in positions_of(word for word, _ in merged).items():
            if name in self.word_bound:
                strength = torch.zeros(mean.shape[:2])
                strength[:, list(places)] = torch.tensor([merged[place][1] for place in places])
                strengths[code(name)] = strength.to(mean.device)
        conditions = conditions_of(offsets, strengths if self.word_bound else None)
        names_any = any(word is not None for word, _ in merged)
        states = PromptStates.of(mean, offsets, strengths) if names_any else mean
        return states, output[1], extra | {"model_conds": {**extra.get("model_conds", {}), **conditions}}


def _merged(rows: Sequence[_Row]) -> _Row:
    """The words of a prompt with a text per encoder: a place is a concept's word if it is in either text.

    Raises:
        ConceptError: The texts name different concepts, or give different weights, at one place.
    """
    merged: _Row = []
    for place, entries in enumerate(zip(*rows, strict=False)):
        named = {(word.concept, weight): (word, weight) for word, weight in entries if word is not None}
        if len(named) > 1:
            (one, its_weight), (other, other_weight) = list(named)[:2]
            difference = (f"name <{one}> and <{other}>" if one != other
                          else f"give <{one}> the weights {its_weight:g} and {other_weight:g}")
            raise ConceptError(f"the texts for the two encoders {difference} at the same place, token "
                               f"{place}; name the same concepts in the same order in both, or in one of "
                               "them alone")
        merged.append(next(iter(named.values()), (None, 1.0)))
    return merged


def _numbers(word: WordRef) -> tuple[int, ...]:
    """Identifies a learned word by numbers of 0 to 255, which every float type holds exactly."""
    return (*code(word.concept).to_bytes(8, "big"), word.position)


def word_token(vectors: Tensor, word: WordRef) -> Tensor:
    """A learned word as a token of ComfyUI's tokenizer, `[L + 1, D]`: its vectors `[L, D]`, then a row that
    says which word it is. The tokenizer passes only tensors on, and words of several concepts may have the
    same vectors: those of a class noun.
    """
    row = vectors.new_zeros(1, vectors.shape[1])
    row[0, :KEY_LENGTH] = torch.tensor(_numbers(word))
    return torch.cat([vectors, row])


def _key(token) -> tuple[int, ...]:
    """Identifies a learned word; empty for other tokens."""
    return tuple(map(int, token[-1, :KEY_LENGTH].tolist())) if _is_learned(token) else ()


def _is_learned(token) -> bool:
    return torch.is_tensor(token) and token.ndim == 2


def _learned(tokens) -> list[Tensor]:
    return [token for chunks in tokens.values() for chunk in chunks for token, *_ in chunk
            if _is_learned(token)]


def _at(tokens, layer: int):
    """The tokens for one layer copy: learned words `[L + 1, D]` become `[D]`."""
    def pick(token):
        if not _is_learned(token):
            return token
        return token[layer if token.shape[0] > 2 else 0]

    return {name: [[(pick(token), *rest) for token, *rest in chunk] for chunk in chunks]
            for name, chunks in tokens.items()}
