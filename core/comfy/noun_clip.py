"""CLIPs of models that read one row of text per T5 token: Anima, Cosmos Predict2, Flux.1 and Chroma; or per
Qwen token: Flux.2 Klein and Krea 2.

A concept is encoded as its class noun, repeated as often as it has words, by the host's own tokenizers and
encoders. What it has learned acts at the rows of these tokens. The CONDITIONING carries which rows they are,
beside the token ids, which the host carries there too. So no gradient passes through a text encoder, and the
prompt's states are those of the plain CLIP for the same words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bank.composition import Kind
from ..bank.grammar import Part, Placeholder, written
from ..conditioning.whole_prompts import repeated_noun
from ..errors import ConceptError
from ..model.backbone import TextPiece, WholePromptEncoder, WholeText
from .concept_encoder import Concepts, Wrapped
from .concept_tokenizer import ConceptTokenizer
from .prompt_states import PromptStates, with_strength
from .sites import STRENGTHS, WORDS, SlotCond
from .text import ROW_NAMES, cut_in_front, row_name, row_tokenizer, row_tokens, text_widths
from .token_lora import code

ROW_COUNT = 512      # rows of a text, at least: the host fills shorter ones up
# Noncharacters of Unicode around a noun; no prompt contains them. Tokenizers do not see them.
_BEGIN, _END = "\ufdd5", "\ufdd6"
_ADAPTED = "t5xxl_ids"      # in the dictionary of a CONDITIONING whose rows an adapter of the model makes


class NounId(int):
    """The id of a token of a class noun that stands for a concept.

    weight: The concept's, where the host's tokenizer takes weights as text; None = the host's weight holds.
    """

    concept: str
    weight: float | None = None

    @classmethod
    def of(cls, token: int, concept: str, weight: float | None = None) -> NounId:
        made = cls(token)
        made.concept, made.weight = concept, weight
        return made


def marked(noun: str) -> str:
    """A noun whose tokens become `NounId`s, see `tokenized`."""
    return f"{_BEGIN}{noun}{_END}"


def tokenized(original, text: str, concepts: Sequence[tuple[str, float | None]], *args, **kwargs) -> dict:
    """What the host's tokenizer makes of a text, with `NounId`s at the marked nouns.

    Args:
        original: The CLIP's tokenizer.
        text: With marked nouns.
        concepts: The concept of each marked noun, in order, and its weight as of a `NounId`.
    """
    inner, remaining = copy.copy(original), iter(concepts)
    for name, part in vars(original).items():
        if hasattr(part, "tokenizer"):
            own = copy.copy(part)
            own.tokenizer = _Unmarked(part.tokenizer, remaining if name.endswith(ROW_NAMES) else None)
            setattr(inner, name, own)
    return inner.tokenize_with_weights(text, *args, **kwargs)


class _Unmarked:
    """A tokenizer that takes marks out of texts. concepts: of the marked nouns; None = plain ids."""

    def __init__(self, inner, concepts) -> None:
        self.inner, self.concepts = inner, concepts

    def __getattr__(self, name: str):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, text: str, *args, **kwargs):
        plain, spans = _unmarked(text)
        if self.concepts is None or not spans:
            return self.inner(plain, *args, **kwargs)
        if not self.inner.is_fast:
            raise ConceptError(f"the tokenizer {type(self.inner).__name__} does not tell where words are; "
                               "update the package transformers to version 5 or newer")
        encoded = self.inner(plain, *args, return_offsets_mapping=True, **kwargs)
        ids, places = list(encoded["input_ids"]), encoded["offset_mapping"]
        for start, end in spans:
            concept, weight = next(self.concepts)
            for i, (first, last) in enumerate(places):
                if max(first, start) < min(last, end):
                    ids[i] = NounId.of(ids[i], concept, weight)
        return {"input_ids": ids}


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the places of the nouns in it."""
    plain, spans = "", []
    for piece in text.split(_BEGIN):
        noun, end, rest = piece.partition(_END)
        if end:
            spans.append((len(plain), len(plain) + len(noun)))
        plain += noun + rest
    return plain, spans


class NounTokenizer(ConceptTokenizer):
    """A CLIP's tokenizer with placeholders, which become class nouns.

    Args:
        original, concepts, acting, tell: As for `ConceptTokenizer`.
        reads_weights: As of a `Family`. If not, only the weights of concepts act.
    """

    def __init__(self, original, concepts: Concepts, acting: Mapping[str, float] | None,
                 tell: Callable[[str], None], reads_weights: bool) -> None:
        super().__init__(original, (), concepts, acting, tell)
        self.reads_weights = reads_weights

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        prompt = self.vocabulary.parse(text)     # raises for an unknown placeholder
        self._tell(prompt)
        found = [(self.vocabulary.entries[name][0].concept, None if self.reads_weights else weight)
                 for name, weight in zip(prompt.placeholders, prompt.placeholder_weights, strict=True)]

        def noun_of(name: str) -> str:
            words = self.vocabulary.entries[name]
            known = self.concepts[words[0].concept].info
            return marked(repeated_noun(known.name, known.class_noun, len(words)))

        plain = (prompt.substituted(noun_of) if self.reads_weights
                 else self.vocabulary.literal(prompt, noun_of))
        return tokenized(self.original, plain, found, *args, **kwargs)


class NounEncoder(Wrapped):
    """A CLIP's text model whose CONDITIONING says at which rows concepts act.

    Args:
        inner: The CLIP's text model.
        concepts: The concepts.
        acting: See `concept_clip`.
    """

    def __init__(self, inner, concepts: Concepts, acting: Mapping[str, float] | None = None) -> None:
        super().__init__(inner)
        self.word_bound = {name for name, known in concepts.items()
                           if known.info.composes.kind is Kind.WORDS}
        self.by_strength = {name for name, known in concepts.items() if known.by_strength}
        self.acting = acting

    def encode_token_weights(self, tokens):
        output = self.inner.encode_token_weights(self._plain(tokens))
        if not self.word_bound:
            return output
        weights: dict[str, dict[int, float]] = {}
        cut, row = cut_in_front(tokens, output[0]), row_tokens(tokens)
        for name, places in noun_rows(row, cut).items():
            if name in self.word_bound:
                weights[name] = {place: _weight(*row[place + cut][:2]) for place in places}
        states, extra = output[0], dict(output[2]) if len(output) > 2 else {}
        conditions = row_conditions(weights, max(ROW_COUNT, len(row) - cut), states.device)
        if weights and _ADAPTED not in extra:      # the rows of the text are those of the states
            states = PromptStates.of(states, states.new_zeros(len(states), 0, *states.shape[1:]),
                                     {code(name): _strengths(states, places)
                                      for name, places in weights.items()})
        return states, output[1], extra | {"model_conds": {**extra.get("model_conds", {}), **conditions}}

    def _plain(self, tokens):
        """The host's tokens. Nouns get the weight 1 where a weight is a factor on deltas."""
        def weight_of(token, weight: float) -> float:
            if not isinstance(token, NounId) or token.concept not in self.by_strength:
                return weight
            if token.concept in self.word_bound or self.acting is None:
                return 1.0
            return 1.0 if self.acting.get(token.concept) == weight else weight

        return _plain_ids({key: [[(token, weight_of(token, weight), *rest) for token, weight, *rest in chunk]
                                 for chunk in chunks] for key, chunks in tokens.items()})


def _weight(token: NounId, weight: float) -> float:
    """The weight of a noun's token. weight: the host's."""
    return weight if token.weight is None else token.weight


def _strengths(states: Tensor, places: Mapping[int, float]) -> Tensor:
    """The strength of a concept at every row of states `[B, N, D]`, `[B, N]`. places: row -> strength."""
    strengths = torch.zeros(states.shape[:2])
    strengths[:, list(places)] = torch.tensor(list(places.values()))
    return strengths.to(states.device)


def noun_rows(row: Sequence[tuple], cut: int) -> dict[str, tuple[int, ...]]:
    """Concept -> the rows of its noun. row: the tokens; cut: see `cut_in_front`."""
    rows: dict[str, tuple[int, ...]] = {}
    for place, (token, *_) in enumerate(row):
        if isinstance(token, NounId) and place >= cut:
            rows[token.concept] = *rows.get(token.concept, ()), place - cut
    return rows


def row_conditions(weights: Mapping[str, Mapping[int, float]], rows: int,
                   device: torch.device | str) -> dict[str, SlotCond]:
    """Model conditions that say where word-bound concepts act. weights: concept -> row -> strength."""
    codes, strengths = torch.zeros(1, 1, rows, 1, dtype=torch.long), torch.zeros(1, 1, rows, 1)
    for name, places in weights.items():
        for place, weight in places.items():
            codes[0, 0, place], strengths[0, 0, place] = code(name), weight
    return {WORDS: SlotCond(codes.to(device)), STRENGTHS: SlotCond(strengths.to(device))}


def on_all_rows(conditioning, own_code: int, strength: float):
    """Returns a CONDITIONING in which a concept's deltas act at every row; as `with_strength`."""
    def changed(states: Tensor, extra: dict) -> list:
        if isinstance(states, PromptStates):
            return with_strength([[states, extra]], own_code, strength)[0]
        conditions = extra.get("model_conds", {})
        if WORDS not in conditions:
            conditions = {**conditions, **row_conditions({}, ROW_COUNT, states.device)}

        def added(key: str, value: float) -> SlotCond:
            values = conditions[key].cond
            return SlotCond(torch.cat([values, torch.full_like(values[:, :1], value)], 1))

        own = {WORDS: added(WORDS, own_code), STRENGTHS: added(STRENGTHS, strength)}
        return [states, {**extra, "model_conds": {**conditions, **own}}]

    return [changed(states, extra) for states, extra in conditioning]


class RowText(WholePromptEncoder):
    """The tokens of a CLIP whose text is read as rows.

    Args:
        clip: A CLIP; with concepts or without.
        vectors: The vectors of its tokens, `[vocabulary, D]`.
        rows: The text that the sites read, `[B, N, D]`, from the states of a CONDITIONING and its dictionary.
        reads_pooled: Whether the model reads the pooled text too.
    """

    def __init__(self, clip, vectors: Callable[[], Tensor],
                 rows: Callable[[Tensor, Mapping[str, Any]], Tensor], reads_pooled: bool = False) -> None:
        self.name, self.clip, self._vectors, self._rows = row_name(clip), clip, vectors, rows
        self.reads_pooled = reads_pooled
        (_, self.width), = text_widths(clip)
        tokenizer = row_tokenizer(clip)
        self.length, self.pad = tokenizer.max_length, tokenizer.pad_token
        self.start = self.end = self.pad if tokenizer.end_token is None else tokenizer.end_token
        self._ends = tokenizer.tokenizer_adds_end_token

    def ids(self, text: str) -> list[int]:
        ids = row_tokenizer(self.clip).tokenizer(text)["input_ids"]
        return ids[:-1] if self._ends else ids

    def vectors(self, ids: list[int]) -> Tensor:
        return self._vectors()[torch.tensor(ids, dtype=torch.long)].detach().float().cpu().clone()

    @torch.no_grad()
    def encode_pieces(self, pieces: Sequence[TextPiece]) -> WholeText:
        parts: list[Part] = [(Placeholder(str(i)) if piece.concept else piece.text, piece.weight)
                             for i, piece in enumerate(pieces)]
        text = written(parts, lambda number: marked(pieces[int(number)].text))
        original = getattr(self.clip.tokenizer, "original", self.clip.tokenizer)
        numbers = [str(i) for i, piece in enumerate(pieces) if piece.concept]
        tokens = tokenized(original, text, [(number, None) for number in numbers])
        extra = self.clip.encode_from_tokens(_plain_ids(tokens), return_dict=True)
        encoded = extra.pop("cond")
        rows = noun_rows(row_tokens(tokens), cut_in_front(tokens, encoded))
        states = self._rows(encoded, extra)
        pooled = extra["pooled_output"].float() if self.reads_pooled else None
        return WholeText(states.float(), tuple(rows.get(number, ()) for number in numbers), pooled)


def _plain_ids(tokens) -> dict:
    return {key: [[(int(token) if isinstance(token, NounId) else token, *rest) for token, *rest in chunk]
                  for chunk in chunks] for key, chunks in tokens.items()}
