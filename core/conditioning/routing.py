"""From a prompt and a bank to the deltas that the weights get: which concepts, how strong, at which site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.prompts import named_concepts
from ..errors import ConceptError
from ..model import aggregation
from ..model.backbone import Backbone
from ..model.deltas import DeltaKey, Deltas, weighted_sum
from .encoding import encode_prompts, encode_words

MODES = ("sharp", "paper", "released", "equal")


@dataclass(frozen=True)
class Aggregation:
    """weights: `[sites, g]` for `names` in bank order; deltas: their weighted sum, ready to fold."""

    names: tuple[str, ...]
    weights: Tensor
    deltas: Deltas


def _sum(bank: ConceptBank, weights: Mapping[str, Sequence[float]]) -> dict[DeltaKey, object]:
    """Weighted deltas of the concepts in `weights` (name -> one weight per site). Concepts of weight 0 everywhere are not even read."""
    parts: dict[DeltaKey, list] = {}
    for name, per_site in weights.items():
        if not any(per_site):
            continue
        for key, delta in bank[name].deltas.items():
            if per_site[key[0]]:
                parts.setdefault(key, []).append((per_site[key[0]], delta))
    return {key: weighted_sum(group) for key, group in parts.items()}


def _composed(bank: ConceptBank, methods: Mapping, *compositions: str) -> dict[str, float]:
    """Concepts of the methods with these compositions -> their share."""
    found = {n: i.method for n, i in bank.infos.items() if i.method in methods and methods[i.method].composition in compositions}
    counts = Counter(found.values())
    return {name: methods[method].method.share(counts[method]) for name, method in found.items()}


def standing_shares(bank: ConceptBank, methods: Mapping) -> dict[str, float]:
    """Concepts of methods that make all tasks one set of weights, always on -> the share of their deltas in it."""
    return _composed(bank, methods, "sum")


def averaged_names(bank: ConceptBank, methods: Mapping) -> list[str]:
    """Concepts of methods that average the predictions of all their concepts' models."""
    return list(_composed(bank, methods, "average"))


def standing_deltas(bank: ConceptBank, methods: Mapping) -> Deltas:
    """What is on whatever the prompt says; nothing in a bank of routed concepts."""
    return _sum(bank, {name: [share] * len(bank.layout) for name, share in standing_shares(bank, methods).items()})


class _BoundDeltas(Mapping):
    """Concept -> its deltas times a strength, read from the bank when asked for."""

    def __init__(self, bank: ConceptBank, names: Sequence[str], strength: float) -> None:
        self.bank, self.names, self.strength = bank, dict.fromkeys(names), strength

    def __getitem__(self, name: str) -> Deltas:
        if name not in self.names:
            raise KeyError(name)
        return {key: delta.scaled(self.strength) for key, delta in self.bank[name].deltas.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def bound_deltas(bank: ConceptBank, methods: Mapping, strength: float = 1.0, names: Sequence[str] | None = None) -> Mapping[str, Deltas]:
    """Concept -> its deltas, for all concepts (or those named) whose deltas act through their own words, so that
    there is nothing to fold. Empty at strength 0."""
    found = [name for name in _composed(bank, methods, "bound") if names is None or name in names]
    return _BoundDeltas(bank, found if strength else [], strength)


def learning_names(bank: ConceptBank, methods: Mapping, method: str) -> list[str]:
    """The standing concepts on top of which a method learns: all, but for its own when it learns each task on the base alone."""
    alone = not methods[method].method.builds_on_sum
    return [name for name in standing_shares(bank, methods) if not (alone and bank.infos[name].method == method)]


def learning_deltas(bank: ConceptBank, methods: Mapping, method: str) -> Deltas:
    """What is in the weights while this method learns its next task."""
    shares = standing_shares(bank, methods)
    return _sum(bank, {name: [shares[name]] * len(bank.layout) for name in learning_names(bank, methods, method)})


def _word_states(backbone: Backbone, bank: ConceptBank, names: Sequence[str]) -> list[Tensor]:
    """Encoded words of every concept, each on its own: a list of `[L, words, D]`."""
    return encode_words(backbone, names, bank.vocabulary, {name: bank[name].tokens for name in names})


def _word_states_together(backbone: Backbone, bank: ConceptBank, names: Sequence[str]) -> list[Tensor]:
    """As the released code: all words in one prompt, so that later concepts see earlier ones; `[L, words, D]` each."""
    tokens = {name: bank[name].tokens for name in names}
    context = encode_prompts(backbone, [" ".join(f"<{name}>" for name in names)], bank.vocabulary, tokens)
    return [context.hidden[0][:, list(context.words[0][name])] for name in names]


def _elastic(backbone: Backbone, bank: ConceptBank, names: Sequence[str], prompt: str, mode: str) -> Tensor:
    """EWA weights `[sites, g]` by the paper's or the released code's formula."""
    used = {n: bank[n].tokens for n in named_concepts(bank.vocabulary.parse(prompt))}
    states = (_word_states if mode == "paper" else _word_states_together)(backbone, bank, names)
    copies = max(s.shape[0] for s in states)
    states = [s.expand(copies, -1, -1) for s in states]
    hidden = encode_prompts(backbone, [prompt], bank.vocabulary, used).hidden[0]
    hidden = hidden.expand(copies, -1, -1) if hidden.shape[0] == 1 else hidden
    if mode == "paper":
        weights = aggregation.paper_weights(hidden, torch.stack([s.mean(1) for s in states], dim=1).expand(hidden.shape[0], -1, -1))
    else:
        words = torch.cat(states, dim=1).expand(hidden.shape[0], -1, -1)
        weights = aggregation.RELEASED_SCALE * aggregation.released_weights(hidden, words, [s.shape[1] for s in states])
    return torch.stack([weights[site.copy if weights.shape[0] > 1 else 0] for site in backbone.layout.sites]).cpu()


def aggregate(backbone: Backbone, bank: ConceptBank, prompt: str, methods: Mapping, mode: str = "sharp", strength: float = 1.0,
              standing: bool = True, only: str = "", without: Sequence[str] = ()) -> Aggregation:
    """The deltas for one prompt. standing=False leaves out what is on anyway (see `standing_deltas`), `without` these standing concepts.

    mode: sharp | paper | released | equal; only: one concept that acts alone, whatever prompt and mode say; strength: factor on routed
    concepts, 0 = the base. Concepts of folding methods (sequential finetuning, ...) have their share in every mode: that is what they
    mean. An average of predictions is none of weights: the nearest, all such concepts with their share, stands for it here. Bound concepts
    have their weight in the table but none in the deltas: they act through their words, see `bound_deltas`.
    """
    columns = site_weights(backbone, bank, prompt, methods, mode, strength, standing, only, without)
    bound = _composed(bank, methods, "bound")
    table = torch.tensor([columns[name] for name in bank.names]).T if bank.names else torch.zeros(len(bank.layout), 0)
    folded = {name: weights for name, weights in columns.items() if name not in bound}
    return Aggregation(tuple(bank.names), table, _sum(bank, folded))


@torch.no_grad()
def site_weights(backbone: Backbone, bank: ConceptBank, prompt: str, methods: Mapping, mode: str = "sharp", strength: float = 1.0,
                 standing: bool = True, only: str = "", without: Sequence[str] = ()) -> dict[str, list[float]]:
    """Concept -> its weight at every site, arguments as for `aggregate`. Of the backbone, sharp and equal need the layout alone."""
    if mode not in MODES:
        raise ConceptError(f"aggregation mode is {mode!r}; allowed: {', '.join(MODES)}")
    bank.check_fits(backbone.layout)
    named, always = named_concepts(bank.vocabulary.parse(prompt)), _composed(bank, methods, "sum", "average")
    bound = _composed(bank, methods, "bound")
    routed = [name for name in bank.names if name not in always and name not in bound]
    sites = len(bank.layout)
    if only:
        bank[only]      # an unknown name is an error, also in a bank of standing concepts
        weights = aggregation.sharp_weights(routed, [only], sites)
    elif not routed or mode == "sharp":
        weights = aggregation.sharp_weights(routed, named, sites)
    elif mode == "equal":
        weights = aggregation.equal_weights(len(routed), sites)
    else:
        weights = _elastic(backbone, bank, routed, prompt, mode)
    columns = dict(zip(routed, (strength * weights).T.tolist(), strict=True))
    columns |= {name: [share * standing * (name not in without)] * sites for name, share in always.items()}
    return columns | {name: [strength * (name in ([only] if only else named))] * sites for name in bound}
