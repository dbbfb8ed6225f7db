"""Computes from a prompt and a bank which concepts act, how strongly and at which site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.composition import Kind
from ..bank.concepts import Concept, ConceptInfo
from ..bank.prompts import Prompt, words_prompt
from ..bank.tokens import TokenGroup
from ..errors import ConceptError
from ..model import aggregation
from ..model.backbone import Backbone
from ..model.deltas import Delta, DeltaKey, Deltas, weighted_sum
from ..model.sites import SiteLayout
from .encoding import encode_prompts, encode_words

MODES = ("sharp", "paper", "released", "equal")
SiteWeights = Mapping[str, Sequence[float]]      # concept -> its weight at every site


@dataclass(frozen=True)
class Aggregation:
    """weights: `[sites, g]` for `names` in bank order. deltas: the weighted sum of their deltas, ready to
    fold. folded: concept -> its weight at every site, for the concepts in that sum.
    """

    names: tuple[str, ...]
    weights: Tensor
    deltas: Deltas
    folded: SiteWeights


def weighted_deltas(bank: ConceptBank, weights: SiteWeights, load: Callable[[str], Concept] | None = None,
                    word_bound: bool = True) -> dict[DeltaKey, list[tuple[float, Delta]]]:
    """The deltas to sum at every site and projection, with their weights.

    Concepts with weight 0 at every site are not loaded.

    Args:
        weights: The concepts' weights.
        load: Loads a concept; None = `bank[name]`, which caches the concept.
        word_bound: Whether to include the deltas that act through words alone.
    """
    parts: dict[DeltaKey, list[tuple[float, Delta]]] = {}
    for name, per_site in weights.items():
        if any(per_site):
            concept = bank[name] if load is None else load(name)
            for key, delta in concept.deltas.items():
                if per_site[key[0]] and (word_bound or not concept.info.composes.is_word_bound(key[1])):
                    parts.setdefault(key, []).append((per_site[key[0]], delta))
    return parts


def folded_deltas(bank: ConceptBank, weights: SiteWeights) -> Deltas:
    """The weighted sum of the concepts' deltas, without the word-bound ones."""
    parts = weighted_deltas(bank, weights, word_bound=False)
    return {key: weighted_sum(deltas) for key, deltas in parts.items()}


def _shares(bank: ConceptBank, *kinds: Kind) -> dict[str, float]:
    """Concept -> factor on its deltas, for the concepts of these kinds of composition."""
    infos = {name: info for name, info in bank.infos.items() if info.composes.kind in kinds}
    counts = Counter(info.method for info in infos.values())
    return {name: info.composes.share(counts[info.method]) for name, info in infos.items()}


def prompt_activated_names(bank: ConceptBank) -> list[str]:
    """Concepts with deltas that act because a prompt names them, on all its words."""
    return [name for name, info in bank.infos.items() if info.composes.acts_on_all_words]


def always_on_shares(bank: ConceptBank) -> dict[str, float]:
    """Concept -> factor on its deltas, for always-on concepts whose deltas are summed."""
    return _shares(bank, Kind.SUM)


def averaged_names(bank: ConceptBank) -> list[str]:
    """Concepts of methods that average predictions, with one model per concept."""
    return list(_shares(bank, Kind.AVERAGE))


def always_on_deltas(bank: ConceptBank, averages: bool = False) -> Deltas:
    """The deltas that act for every prompt. A bank of prompt-activated concepts has none.

    Args:
        averages: Whether to include averaged deltas of methods that average predictions, see `aggregate`.
    """
    shares = _shares(bank, Kind.SUM, Kind.AVERAGE) if averages else always_on_shares(bank)
    return folded_deltas(bank, {name: [share] * len(bank.layout) for name, share in shares.items()})


class _LazyDeltas(Mapping[str, Deltas]):
    """Name -> deltas of a concept times a strength, loaded from the bank on access.

    names: name -> concept. word_bound: whether these are the deltas that act through the concept's own words,
    or the others.
    """

    def __init__(self, bank: ConceptBank, names: Mapping[str, str], strength: float,
                 word_bound: bool) -> None:
        self.bank, self.names, self.strength = bank, names if strength else {}, strength
        self.word_bound = word_bound

    def __getitem__(self, name: str) -> Deltas:
        concept = self.bank[self.names[name]]
        return {key: delta.scaled(self.strength) for key, delta in concept.deltas.items()
                if concept.info.composes.is_word_bound(key[1]) is self.word_bound}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def token_lora_deltas(bank: ConceptBank, strength: float = 1.0,
                      names: Sequence[str] | None = None) -> Mapping[str, Deltas]:
    """Concept -> its word-bound deltas. These deltas are never folded into the weights.

    Args:
        strength: Factor on the deltas; 0 gives an empty mapping.
        names: Only these concepts; None = all.
    """
    word_bound = {name: name for name in _shares(bank, Kind.WORDS) if names is None or name in names}
    return _LazyDeltas(bank, word_bound, strength, word_bound=True)


def by_strength(bank: ConceptBank, names: Iterable[str]) -> set[str]:
    """The concepts whose weights in prompts are factors on their deltas: those that have deltas and act where
    prompts name them. The weights of all others act on their words, as on text.
    """
    kinds = (Kind.PROMPT, Kind.WORDS)
    return {name for name in names if bank.infos[name].composes.kind in kinds and bank[name].deltas}


def negative_only(infos: Mapping[str, ConceptInfo], negative: Prompt, positive: Sequence[Prompt],
                  mode: str) -> list[str]:
    """The concepts whose prompt-activated deltas act in the negative half of guidance alone: those that only
    the negative prompt names.

    The deltas of the positive prompt act in both halves. In the modes that weigh all concepts, every concept
    acts there already, except those that have word-bound deltas, too.
    """
    named = {name for prompt in positive for name in prompt.concepts}
    composes = {name: infos[name].composes for name in negative.concepts if name not in named}
    return [name for name, own in composes.items()
            if own.acts_on_all_words and (mode == "sharp" or own.kind is Kind.WORDS)]


def refuse_negative_only(layout: SiteLayout, names: Sequence[str]) -> None:
    """Raises ConceptError if the base has joint attention and there is a concept of `negative_only`: its
    deltas would act on the rows of the picture, too."""
    if names and layout.is_joint:
        raise ConceptError(f"the negative prompt names <{names[0]}>, which acts on every word; allowed on "
                           "this model: concepts that are learned as objects with 'slots', or that the "
                           "prompt names, too")


def name_on_all_words(info: ConceptInfo) -> str:
    """The name by which a context says that a concept's prompt-activated deltas act at its tokens. It is not
    the concept's own if its words have word-bound deltas, which act at other tokens.
    """
    return info.name if info.composes.kind is Kind.PROMPT else info.placeholder


def prompt_deltas(bank: ConceptBank, names: Sequence[str], strength: float) -> Mapping[str, Deltas]:
    """`name_on_all_words` -> the concept's prompt-activated deltas times a strength; 0 gives an empty
    mapping.
    """
    return _LazyDeltas(bank, {name_on_all_words(bank.infos[name]): name for name in names}, strength,
                       word_bound=False)


def learning_names(bank: ConceptBank, method: str, builds_on_sum: bool) -> list[str]:
    """The always-on concepts whose deltas are in the weights while a method learns.

    Args:
        builds_on_sum: False for a method that learns each task on the base alone. Its earlier concepts are
            then left out.
    """
    return [name for name in always_on_shares(bank) if builds_on_sum or bank.infos[name].method != method]


def learning_deltas(bank: ConceptBank, method: str, builds_on_sum: bool) -> Deltas:
    """The deltas in the weights while this method learns its next task."""
    shares = always_on_shares(bank)
    names = learning_names(bank, method, builds_on_sum)
    return folded_deltas(bank, {name: [shares[name]] * len(bank.layout) for name in names})


def _states_together(backbone: Backbone, bank: ConceptBank, groups: Mapping[str, TokenGroup]) -> list[Tensor]:
    """Encodes all words in one prompt, as in the released code, so later words see earlier ones. `[L, words,
    D]` each.
    """
    context = encode_prompts(backbone, [words_prompt([bank.infos[name] for name in groups])], groups)
    return [context.hidden[0][:, list(context.words[0][name])] for name in groups]


def _elastic(backbone: Backbone, bank: ConceptBank, names: Sequence[str], prompt: Prompt,
             mode: str) -> Tensor:
    """EWA weights `[sites, g]` by the paper's or the released code's formula, see `aggregation`."""
    groups = bank.token_groups(names)
    states = encode_words(backbone, groups) if mode == "paper" else _states_together(backbone, bank, groups)
    copies = max(s.shape[0] for s in states)
    states = [s.expand(copies, -1, -1) for s in states]      # `[L, words, D]`
    # `[L, N, D]`
    hidden = encode_prompts(backbone, [prompt], bank.token_groups(prompt.concepts),
                            by_strength=by_strength(bank, prompt.concepts)).hidden[0]
    hidden = hidden.expand(copies, -1, -1) if hidden.shape[0] == 1 else hidden
    if mode == "paper":
        means = torch.stack([s.mean(1) for s in states], dim=1)
        weights = aggregation.paper_weights(hidden, means.expand(hidden.shape[0], -1, -1))
    else:
        words = torch.cat(states, dim=1).expand(hidden.shape[0], -1, -1)
        released = aggregation.released_weights(hidden, words, [s.shape[1] for s in states])
        weights = aggregation.RELEASED_SCALE * released
    return torch.stack([weights[site.copy if weights.shape[0] > 1 else 0]
                        for site in backbone.layout.sites]).cpu()


def aggregate(backbone: Backbone | None, bank: ConceptBank, prompt: Prompt, mode: str = "sharp",
              strength: float = 1.0,
              always_on: bool = True, only: str = "", without: Sequence[str] = ()) -> Aggregation:
    """The weights and the summed deltas for one prompt.

    Word-bound concepts have a weight but are not in the summed deltas, see `token_lora_deltas`. Averaging
    predictions is not the same as averaging weights. As an approximation, the deltas of such concepts are
    averaged here.

    Args:
        backbone: Encodes the prompt in the modes paper and released; may be None for other modes.
        mode: sharp, paper, released or equal, see `aggregation`.
        strength: Factor on prompt-activated and word-bound concepts, 0 = the base.
        always_on: False leaves out the always-on concepts, which otherwise act in every mode.
        only: The only concept that acts, regardless of prompt and mode.
        without: Always-on concepts to leave out.

    Raises:
        ConceptError: Unknown mode or concept, a bank for another base, or a mode that needs a text encoder.
    """
    columns = site_weights(backbone, bank, prompt, mode, strength, always_on, only, without)
    # they are not loaded if all their deltas are word-bound
    word_bound = [name for name in _shares(bank, Kind.WORDS)
                  if not bank.infos[name].composes.acts_on_all_words]
    table = torch.tensor([columns[name]
                          for name in bank.names]).T if bank.names else torch.zeros(len(bank.layout), 0)
    folded = {name: weights for name, weights in columns.items() if name not in word_bound and any(weights)}
    return Aggregation(tuple(bank.names), table, folded_deltas(bank, folded), folded)


@torch.no_grad()
def site_weights(backbone: Backbone | None, bank: ConceptBank, prompt: Prompt, mode: str = "sharp",
                 strength: float = 1.0, always_on: bool = True, only: str = "",
                 without: Sequence[str] = ()) -> SiteWeights:
    """Concept -> its weight at every site; arguments and errors as for `aggregate`."""
    if mode not in MODES:
        raise ConceptError(f"aggregation mode is {mode!r}; allowed: {', '.join(MODES)}")
    if backbone is not None:
        bank.check_fits(backbone.layout)
    if only:
        bank[only]      # raises for an unknown name, also in a bank of always-on concepts
    named = (only,) if only else prompt.concepts
    always, word_bound = _shares(bank, Kind.SUM, Kind.AVERAGE), _shares(bank, Kind.WORDS)
    by_prompt = [name for name in bank.names if name not in always and name not in word_bound]
    sites = len(bank.layout)
    if only or not by_prompt or mode == "sharp":
        weights = aggregation.sharp_weights(by_prompt, named, sites)
    elif mode == "equal":
        weights = aggregation.equal_weights(len(by_prompt), sites)
    elif backbone is None:
        raise ConceptError(f"aggregation mode '{mode}' encodes the prompt, and there is no text encoder; "
                           "allowed without: sharp, equal (in the node: equal merge)")
    elif not bank.layout.takes_words:
        raise ConceptError(f"aggregation mode '{mode}' compares learned words with the prompt, and on this "
                           "base the words are class nouns; allowed: sharp, equal (in the node: equal "
                           "merge)")
    else:
        weights = _elastic(backbone, bank, by_prompt, prompt, mode)
    factors = {name: strength * prompt.strength_of(name) for name in (*by_prompt, *word_bound)}
    columns = {name: [factors[name] * weight for weight in column]
               for name, column in zip(by_prompt, weights.T.tolist(), strict=True)}
    columns |= {name: [share * always_on * (name not in without)] * sites for name, share in always.items()}
    return columns | {name: [factors[name] * (name in named)] * sites for name in word_bound}
