"""From a prompt and a bank to the deltas that the weights get: which concepts, how strong, at which site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.composition import Kind
from ..bank.prompts import Prompt, words_prompt
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
    """Weighted deltas of the concepts in `weights` (name -> one weight per site). Concepts of weight 0
    everywhere are not even read."""
    parts: dict[DeltaKey, list] = {}
    for name, per_site in weights.items():
        if not any(per_site):
            continue
        for key, delta in bank[name].deltas.items():
            if per_site[key[0]]:
                parts.setdefault(key, []).append((per_site[key[0]], delta))
    return {key: weighted_sum(group) for key, group in parts.items()}


def _shares(bank: ConceptBank, *kinds: Kind) -> dict[str, float]:
    """Concepts that act in one of these ways -> their share of the deltas of their method."""
    found = {name: info for name, info in bank.infos.items() if info.composes.kind in kinds}
    counts = Counter(info.method for info in found.values())
    return {name: info.composes.share(counts[info.method]) for name, info in found.items()}


def always_on_shares(bank: ConceptBank) -> dict[str, float]:
    """Concepts that are on whatever the prompt says, all of them in one set of weights -> the share of their
    deltas in it."""
    return _shares(bank, Kind.SUM)


def averaged_names(bank: ConceptBank) -> list[str]:
    """Concepts of methods that average the predictions of all their concepts' models."""
    return list(_shares(bank, Kind.AVERAGE))


def always_on_deltas(bank: ConceptBank, averages: bool = False) -> Deltas:
    """What is on whatever the prompt says; nothing in a bank of prompt-activated concepts.

    averages: also the averaged weights of methods that average predictions, see `aggregate`.
    """
    shares = _shares(bank, Kind.SUM, Kind.AVERAGE) if averages else always_on_shares(bank)
    return _sum(bank, {name: [share] * len(bank.layout) for name, share in shares.items()})


class _TokenLoraDeltas(Mapping):
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


def token_lora_deltas(bank: ConceptBank, strength: float = 1.0, names: Sequence[str] | None = None) -> Mapping[str, Deltas]:
    """Concept -> its deltas, for all word-bound concepts (or those named): they act through their own words,
    so there is nothing to fold. Empty at strength 0."""
    found = [name for name in _shares(bank, Kind.WORDS) if names is None or name in names]
    return _TokenLoraDeltas(bank, found if strength else [], strength)


def learning_names(bank: ConceptBank, method: str, builds_on_sum: bool) -> list[str]:
    """The always-on concepts on top of which a method learns: all, but for its own when it learns each task
    on the base alone."""
    return [name for name in always_on_shares(bank) if builds_on_sum or bank.infos[name].method != method]


def learning_deltas(bank: ConceptBank, method: str, builds_on_sum: bool) -> Deltas:
    """What is in the weights while this method learns its next task."""
    shares = always_on_shares(bank)
    return _sum(bank, {name: [shares[name]] * len(bank.layout) for name in learning_names(bank, method, builds_on_sum)})


def _word_states(backbone: Backbone, bank: ConceptBank, names: Sequence[str]) -> list[Tensor]:
    """Encoded words of every concept, each on its own: a list of `[L, words, D]`."""
    return encode_words(backbone, bank.token_groups(names))


def _word_states_together(backbone: Backbone, bank: ConceptBank, names: Sequence[str]) -> list[Tensor]:
    """As the released code: all words in one prompt, so that later concepts see earlier ones; `[L, words, D]`
    each."""
    context = encode_prompts(backbone, [words_prompt([bank.infos[name] for name in names])], bank.token_groups(names))
    return [context.hidden[0][:, list(context.words[0][name])] for name in names]


def _elastic(backbone: Backbone, bank: ConceptBank, names: Sequence[str], prompt: Prompt, mode: str) -> Tensor:
    """EWA weights `[sites, g]` by the paper's or the released code's formula."""
    states = (_word_states if mode == "paper" else _word_states_together)(backbone, bank, names)
    copies = max(s.shape[0] for s in states)
    states = [s.expand(copies, -1, -1) for s in states]
    hidden = encode_prompts(backbone, [prompt], bank.token_groups(prompt.concepts)).hidden[0]
    hidden = hidden.expand(copies, -1, -1) if hidden.shape[0] == 1 else hidden
    if mode == "paper":
        weights = aggregation.paper_weights(hidden, torch.stack([s.mean(1) for s in states], dim=1).expand(hidden.shape[0], -1, -1))
    else:
        words = torch.cat(states, dim=1).expand(hidden.shape[0], -1, -1)
        weights = aggregation.RELEASED_SCALE * aggregation.released_weights(hidden, words, [s.shape[1] for s in states])
    return torch.stack([weights[site.copy if weights.shape[0] > 1 else 0] for site in backbone.layout.sites]).cpu()


def aggregate(backbone: Backbone | None, bank: ConceptBank, prompt: Prompt, mode: str = "sharp", strength: float = 1.0,
              always_on: bool = True, only: str = "", without: Sequence[str] = ()) -> Aggregation:
    """The deltas for one prompt. always_on=False leaves out what is on anyway (see `always_on_deltas`),
    `without` these of it.

    backbone: only the modes paper and released need it, to encode the prompt. mode: sharp | paper | released
    | equal; only: one concept that acts alone, whatever prompt and mode say; strength: factor on
    prompt-activated concepts, 0 = the base. Always-on concepts have their share in every mode. Averaging
    predictions is not the same as averaging weights; the nearest, all such concepts with their share, stands
    for it here. Word-bound concepts have their weight in the table but none in the deltas, see
    `token_lora_deltas`. """
    columns = site_weights(backbone, bank, prompt, mode, strength, always_on, only, without)
    word_bound = _shares(bank, Kind.WORDS)
    table = torch.tensor([columns[name] for name in bank.names]).T if bank.names else torch.zeros(len(bank.layout), 0)
    folded = {name: weights for name, weights in columns.items() if name not in word_bound}
    return Aggregation(tuple(bank.names), table, _sum(bank, folded))


@torch.no_grad()
def site_weights(backbone: Backbone | None, bank: ConceptBank, prompt: Prompt, mode: str = "sharp", strength: float = 1.0,
                 always_on: bool = True, only: str = "", without: Sequence[str] = ()) -> dict[str, list[float]]:
    """Concept -> its weight at every site, arguments as for `aggregate`."""
    if mode not in MODES:
        raise ConceptError(f"aggregation mode is {mode!r}; allowed: {', '.join(MODES)}")
    if backbone is not None:
        bank.check_fits(backbone.layout)
    always = _shares(bank, Kind.SUM, Kind.AVERAGE)
    word_bound = _shares(bank, Kind.WORDS)
    by_prompt = [name for name in bank.names if name not in always and name not in word_bound]
    sites = len(bank.layout)
    if only:
        bank[only]      # an unknown name is an error, also in a bank of always-on concepts
        weights = aggregation.sharp_weights(by_prompt, [only], sites)
    elif not by_prompt or mode == "sharp":
        weights = aggregation.sharp_weights(by_prompt, prompt.concepts, sites)
    elif mode == "equal":
        weights = aggregation.equal_weights(len(by_prompt), sites)
    elif backbone is None:
        raise ConceptError(f"aggregation mode '{mode}' encodes the prompt, and there is no text encoder; allowed without: sharp, equal")
    else:
        weights = _elastic(backbone, bank, by_prompt, prompt, mode)
    columns = dict(zip(by_prompt, (strength * weights).T.tolist(), strict=True))
    columns |= {name: [share * always_on * (name not in without)] * sites for name, share in always.items()}
    return columns | {name: [strength * (name in ([only] if only else prompt.concepts))] * sites for name in word_bound}
