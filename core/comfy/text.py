"""ComfyUI's text encoders: for learning, and the CLIP that understands `<rex>` in the stock CLIP Text Encode node."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bank.bank import ConceptBank
from ..bank.composition import Kind
from ..bank.concepts import ConceptInfo
from ..bank.prompts import NO_CONCEPTS, Vocabulary, WordRef
from ..bank.tokens import TokenGroup
from ..conditioning.encoding import placeholder_noun_ids
from ..errors import ConceptError
from ..model.backbone import TextEncoder
from ..sampling.attention_guidance import Subject
from .sites import OFFSETS, WORDS, OffsetCond
from .token_lora import code

NAMES = ("clip_l", "clip_g", "clip_h")
_MARK = "concept."      # `embedding:concept.<name>` is what a placeholder becomes on its way through ComfyUI's tokenizer


def encoder_names(clip) -> tuple[str, ...]:
    """The CLIP text encoders that a CLIP consists of, in the order in which their outputs lie side by side."""
    found = tuple(name for name in NAMES if hasattr(clip.cond_stage_model, name) and hasattr(clip.tokenizer, name))
    if not found:
        raise ConceptError(f"the CLIP is a {type(clip.cond_stage_model).__name__}, which has no CLIP text encoder; "
                           "allowed: the CLIP of Stable Diffusion 1.x, 2.x and SDXL checkpoints")
    return found


def text_widths(clip) -> tuple[tuple[str, int], ...]:
    return tuple((name, _embedding(getattr(clip.cond_stage_model, name)).shape[1]) for name in encoder_names(clip))


def _embedding(model) -> Tensor:
    return model.transformer.get_input_embeddings().weight


class ComfyText(TextEncoder):
    """One of a CLIP's encoders (an SDClipModel and its SDTokenizer)."""

    encodes_prefixes = True

    def __init__(self, name: str, clip, load: Callable[[], None] = lambda: None) -> None:
        """load: called before every pass, to have the weights where they are needed."""
        self.name, self.clip, self.load = name, clip, load
        self.model, self.tokenizer = getattr(clip.cond_stage_model, name), getattr(clip.tokenizer, name)
        self.width, self.length = _embedding(self.model).shape[1], self.tokenizer.max_length
        self.start, self.end, self.pad = self.tokenizer.start_token, self.tokenizer.end_token, self.tokenizer.pad_token

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
    """ComfyUI's CLIP adds its table of positions as a whole, so rows have to be as long as it is; inside, it is as long as the rows."""
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


class _Around:
    """Something of a CLIP with something of ours before it."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        if name == "inner":     # not there yet: while being copied
            raise AttributeError(name)
        return getattr(self.inner, name)


class _Tokenizer(_Around):
    """A CLIP's tokenizer that knows placeholders. A learned word is a token `[L, D]`: its vector in every layer copy."""

    def __init__(self, original, names: tuple[str, ...], concepts: dict[str, tuple[ConceptInfo, TokenGroup]]) -> None:
        super().__init__(copy.copy(original))
        self.original, self.concepts, self.vocabulary = original, concepts, Vocabulary(info for info, _ in concepts.values())
        words = {WordRef(info.name, i): {encoder: tokens.word(i, encoder).float() for encoder in names}
                 for info, tokens in concepts.values() for i in range(len(tokens.words))}
        for name in names:
            setattr(self.inner, name, _with_words(getattr(original, name), name, self.vocabulary, words))

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        prompt = self.vocabulary.parse(text)     # an unknown placeholder is an error here, in one sentence
        marked = prompt.substituted(lambda name: f" embedding:{_MARK}{name} ")
        return self.inner.tokenize_with_weights(marked, *args, **kwargs)


def _with_words(tokenizer, name: str, vocabulary: Vocabulary, words: Mapping[WordRef, Mapping[str, Tensor]]):
    """A copy of an SDTokenizer whose `embedding:` look-up finds the bank's words before files."""
    clone = copy.copy(tokenizer)
    files = tokenizer._try_get_embedding
    clone.embedding_directory = []
    arity = len(clone._try_get_embedding("nothing"))      # (embedding, left over), since 0.33 with the name between them
    clone.embedding_directory = tokenizer.embedding_directory or []

    def look_up(embedding_name: str):
        first, _, rest = embedding_name.partition(" ")
        if not first.startswith(_MARK):
            return files(embedding_name)
        refs = vocabulary.entries[first.removeprefix(_MARK)]
        vectors = torch.stack([words[ref][name] for ref in refs])      # [words, L, D]
        return (vectors, rest.strip()) if arity == 2 else (vectors, first, rest.strip())

    clone._try_get_embedding = look_up
    return clone


@dataclass(frozen=True)
class _Owner:
    """Whose word a learned token is: the concept's name; the ids that stand in for it, text encoder -> id, empty when it has none."""

    name: str
    is_bound: bool
    stand_ins: Mapping[str, int]


class _Encoder(_Around):
    """A CLIP's text model that encodes prompts once per layer copy and hands the copies on inside the CONDITIONING.

    The CONDITIONING itself is the mean over the copies, so that what knows nothing of layers (ControlNet, plain MODELs, averaging)
    has something sensible; each copy's difference from it travels as a model condition. Words with a stand-in are encoded apart, as
    core.encoding does it.
    """

    def __init__(self, inner, copies: int, owners: Mapping[bytes, _Owner]) -> None:
        super().__init__(inner)
        self.copies, self.owners = copies, owners

    def encode_token_weights(self, tokens):
        found = [self.owners.get(_key(token)) for chunk in next(iter(tokens.values())) for token, *_ in chunk]
        apart = list(dict.fromkeys(owner.name for owner in found if owner is not None and owner.stand_ins))
        output, hidden = self._layers(self._standing_in(tokens) if apart else tokens)
        for name in apart:
            _, own = self._layers(self._standing_in(tokens, but=name))
            places = torch.tensor([owner is not None and owner.name == name for owner in found], device=hidden.device)
            hidden = torch.where(places.view(1, 1, -1, 1), own, hidden)
        if self.copies == 1 and not any(owner.is_bound for owner in self.owners.values()):
            return (hidden[:, 0], *output[1:])
        hidden = hidden.expand(-1, self.copies, -1, -1) if hidden.shape[1] == 1 else hidden
        mean = hidden[:, 0] + (hidden - hidden[:, :1]).mean(1)      # exactly the copies' value where they are equal
        return mean, output[1], self._extra(output, hidden - mean.unsqueeze(1), found)

    def _layers(self, tokens):
        """The text model's output, pooled being the mean over copies, and hidden `[B, L, N, D]`, L = 1 without layer-wise words."""
        layers = max((token.shape[0] for token in _learned(tokens)), default=1)
        outputs = [self.inner.encode_token_weights(_at(tokens, layer)) for layer in range(layers)]
        hidden = torch.stack([output[0] for output in outputs], dim=1)
        pooled = None if outputs[0][1] is None else torch.stack([output[1] for output in outputs]).mean(0)
        return (outputs[0][0], outputs[0][1] if layers == 1 else pooled, *outputs[0][2:]), hidden

    def _standing_in(self, tokens, but: str = ""):
        """The tokens with stand-ins for the words that have one, those of the concept `but` excepted."""
        def pick(token, encoder: str):
            owner = self.owners.get(_key(token))
            return token if owner is None or not owner.stand_ins or owner.name == but else owner.stand_ins[encoder]

        return {key: [[(pick(token, f"clip_{key}"), *rest) for token, *rest in chunk] for chunk in chunks]
                for key, chunks in tokens.items()}

    def _extra(self, output, offsets: Tensor, found: list[_Owner | None]) -> dict:
        extra = dict(output[2]) if len(output) > 2 else {}
        conds = {**extra.get("model_conds", {}), OFFSETS: OffsetCond(offsets)}
        if any(owner.is_bound for owner in self.owners.values()):
            codes = [code(owner.name) if owner is not None and owner.is_bound else 0 for owner in found]
            conds[WORDS] = OffsetCond(torch.tensor(codes, device=offsets.device).view(1, 1, -1, 1).expand(offsets.shape[0], -1, -1, -1))
        return extra | {"model_conds": conds}


def _key(token) -> bytes:
    """A learned word by its numbers: the only thing of it that comes through ComfyUI's tokenizer."""
    return token.detach().float().cpu().contiguous().numpy().tobytes() if torch.is_tensor(token) else b""


def _owners(clip, concepts: Mapping[str, tuple[ConceptInfo, TokenGroup]]) -> dict[bytes, _Owner]:
    """Word vectors of any text encoder -> whose they are, for concepts that ComfyUI's encoder has to tell from others."""
    names, found = encoder_names(clip), {}
    for info, tokens in concepts.values():
        is_bound = info.composes.kind is Kind.WORDS
        noun, count = tokens.placeholder_noun, len(tokens.words)
        ids = {name: placeholder_noun_ids(ComfyText(name, clip), noun, count) for name in names} if noun else {}
        if is_bound or ids:
            for i in range(len(tokens.words)):
                owner = _Owner(info.name, is_bound, {name: own[i] for name, own in ids.items()})
                found |= {_key(tokens.word(i, name)): owner for name in names}
    return found


def _learned(tokens) -> list[Tensor]:
    return [token for chunks in tokens.values() for chunk in chunks for token, *_ in chunk if torch.is_tensor(token) and token.ndim == 2]


def _at(tokens, layer: int):
    """The tokens as one layer copy reads them: learned words `[L, D]` become `[D]`."""
    def pick(token):
        if not torch.is_tensor(token) or token.ndim != 2:
            return token
        return token[layer if token.shape[0] > 1 else 0]

    return {name: [[(pick(token), *rest) for token, *rest in chunk] for chunk in chunks] for name, chunks in tokens.items()}


def learned_positions(clip, prompt: str) -> tuple[int, ...]:
    """Positions of a prompt's learned words in its first chunk; of all its words when none is learned."""
    chunk = next(iter(clip.tokenize(prompt).values()))[0]
    learned = [i for i, (token, *_) in enumerate(chunk) if torch.is_tensor(token)]
    return tuple(learned) or tuple(range(1, max(2, len(chunk) - 1 - _padding(chunk))))


def subject_of(clip, prompt: str) -> Subject:
    """Where a prompt's concepts and its own tokens are, in the first chunk; no concepts in a CLIP that knows none."""
    if not isinstance(clip.tokenizer, _Tokenizer):
        return Subject((), ())
    chunk = next(iter(clip.tokenize(prompt).values()))[0]
    tokens = [token for token, *_ in chunk]
    end = getattr(clip.tokenizer, encoder_names(clip)[0]).end_token
    text = next((i for i, token in enumerate(tokens) if not torch.is_tensor(token) and token == end), len(tokens))
    names = [piece.concept for piece in clip.tokenizer.vocabulary.parse(prompt).pieces if isinstance(piece, WordRef)]
    found: dict[str, list[int]] = {}
    for name, place in zip(names, (i for i, token in enumerate(tokens) if torch.is_tensor(token)), strict=False):      # the rest: cut off
        found.setdefault(name, []).append(place)
    return Subject(tuple(tuple(places) for places in found.values()), tuple(range(1, text)))


def _padding(chunk) -> int:
    """How many of a chunk's last tokens repeat the one before them."""
    same = 0
    while same < len(chunk) - 1 and chunk[-1 - same][0] == chunk[-2 - same][0]:
        same += 1
    return same


def concept_clip(clip, bank: ConceptBank):
    """A CLIP that understands the bank's placeholders, beside those that it understands already (the bank's own go first); the one that
    came in stays as it is, and an empty bank gives it back."""
    if not len(bank):
        return clip
    tokenizer, encoder = clip.tokenizer, clip.cond_stage_model
    known = tokenizer.concepts if isinstance(tokenizer, _Tokenizer) else {}
    concepts = known | {concept.name: (concept.info, concept.tokens) for concept in bank}
    clone = clip.clone()
    clone.tokenizer = _Tokenizer(tokenizer.original if isinstance(tokenizer, _Tokenizer) else tokenizer, encoder_names(clip), concepts)
    clone.cond_stage_model = _Encoder(encoder.inner if isinstance(encoder, _Encoder) else encoder,
                                      max(tokens.copies for _, tokens in concepts.values()), _owners(clip, concepts))
    return clone


def encode(clip, prompt: str):
    """What CLIP Text Encode gives; a placeholder in a CLIP without concepts is an error, not text."""
    if not isinstance(clip.tokenizer, _Tokenizer):
        NO_CONCEPTS.parse(prompt)
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
