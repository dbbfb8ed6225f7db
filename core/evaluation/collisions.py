"""When two concepts of a bank collide, and what is to be said before one more is learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.composition import PROMPT
from ..bank.concepts import ConceptInfo
from ..bank.tokens import check_name, default_words
from ..methods import METHODS

COMPOSES = {"bound": "bound", "route": "routed", "sum": "summed", "average": "averaged"}
STANDING = ("summed", "averaged")      # in the weights whatever a prompt says
NAMED = 3      # so many names are said one by one
SHARED_PHOTOS = 0.5      # of the photos of the concept with fewer of them
COPY = 0.98

# What was measured on the embedded base, and what follows from it.
#
# One dog learned twice, 300 steps, beside another dog. From the same photos its deltas had a cosine of 0.46 (bound), 0.49 (lora_m) and
# 0.00 (CIDM, which makes them orthogonal); from other photos of it 0.06 (bound) and 0.05 (lora_m), and the other dog's 0.09 and 0.22.
# Among the benchmark's ten different concepts it goes up to 0.26 (lora_m), 0.64 (EWC, C-LoRA) and 0.99 (CCDM). Word vectors: from the
# same photos 0.53 (bound), 0.59 (lora_m) and 0.75 (CIDM), from others 0.38 and 0.24, the other dog's 0.36 and 0.37; two of one class noun
# up to 0.97 (custom_diffusion_merge). So neither tells whether two concepts are one thing: they are said, and no threshold judges by
# them. Only where both are 0.98 or more, which none of 7,379 pairs of different concepts of 17 methods reached, it is one record twice.
#
# Thumbnails, compared with the world's encoder. A threshold on their cosine would be another one for every encoder, so the yardstick is
# how like a thumbnail is to its own crop (see inspection). Of 4,992 pairs of photos of different things of one class noun 1 was as alike
# as that, of 1,120 pairs of photos of one thing 41 %. Of 156 pairs of thumbnails drawn from one seed for different things of one class
# noun there was none. Of drawings in different styles 2 % were, so styles are not judged.


@dataclass(frozen=True)
class Collision:
    """Two concepts and why; kind: "photos", "copy" or "covers"."""

    one: str
    other: str
    kind: str
    why: str

    @property
    def sentence(self) -> str:
        return f"<{self.one}> and <{self.other}> collide: {self.why}"


def composition_of(concept: ConceptInfo) -> str:
    """How a concept acts beside others."""
    return COMPOSES[concept.composes.kind]


def composition_of_method(method: str) -> str:
    """How concepts of a method act beside others; those of an unknown method are prompt-activated."""
    known = METHODS[str(method)].method.composition if str(method) in METHODS else PROMPT
    return COMPOSES[known.kind]


def plain(noun: str) -> str:
    """A class noun whatever its capitals and spaces."""
    return " ".join(str(noun).casefold().split())


def noun_of(info: ConceptInfo) -> str:
    return plain(info.class_noun)


def listed(names: Sequence[str]) -> str:
    """`<a>, <b>, <c> and 4 more`."""
    text = ", ".join(f"<{name}>" for name in names[:NAMED])
    return f"{text} and {len(names) - NAMED} more" if len(names) > NAMED else text


def _digests(info: ConceptInfo) -> set[str]:
    return {digest for digest in info.provenance.images if digest and isinstance(digest, str)}


def _are_same_photos(left: Collection[str], right: Collection[str]) -> bool:
    """Whether two concepts share enough of the photos of the one with fewer."""
    return bool(left and right) and len(set(left) & set(right)) >= SHARED_PHOTOS * min(len(left), len(right))


def _same_photos(infos: Sequence[ConceptInfo]) -> list[Collision]:
    """Concepts of one kind and noun that were learned from the same photos, each with the earlier one that it shares most with. With
    another noun it may be something else on the same photos."""
    owners: dict[str, list[int]] = {}
    found = []
    for j, info in enumerate(infos):
        mine = _digests(info)
        counts = Counter(i for digest in mine for i in owners.get(digest, ())
                         if (infos[i].kind, noun_of(infos[i])) == (info.kind, noun_of(info)))
        for i, count in counts.most_common(1):
            whole = min(len(mine), len(_digests(infos[i])))
            if count >= SHARED_PHOTOS * whole:
                found.append(Collision(infos[i].name, info.name, "photos", f"they were learned from the same photos ({count} of {whole})"))
        for digest in mine:
            owners.setdefault(digest, []).append(j)
    return found


def _found(infos: Sequence[ConceptInfo], kind: str, close: Tensor, cosines: Tensor, why: str) -> list[Collision]:
    """Every concept with the earlier one that it is most like among those that are close. close `[K, K]` bool, cosines `[K, K]`."""
    found = []
    for j in close.tril(-1).any(1).nonzero().flatten().tolist():
        i = int(cosines[j, :j].masked_fill(~close[j, :j], -2).argmax())
        found.append(Collision(infos[i].name, infos[j].name, kind, f"{why} (cosine {float(cosines[j, i]):.2f})"))
    return found


def _copies(alike: Mapping[str, Tensor]) -> Tensor:
    """`[K, K]` bool: whose words and deltas are the same, or words alone where both have no deltas."""
    deltas, words = alike["deltas"], alike["words"]
    bare = deltas.diagonal().isnan()
    return (words >= COPY) & ((deltas >= COPY) | (bare & bare[:, None]))


def _as_its_own_crop(infos: Sequence[ConceptInfo], thumbnails: Tensor) -> Tensor:
    """`[K, K]` bool: objects of one class noun whose thumbnails are as alike as one is to its own crop, which the diagonal holds."""
    nouns = {}
    groups = torch.tensor([nouns.setdefault(noun_of(info), len(nouns)) for info in infos])
    objects = torch.tensor([info.kind == "object" for info in infos])
    own = thumbnails.diagonal()
    return (groups == groups[:, None]) & objects & objects[:, None] & (thumbnails >= (own + own[:, None]) / 2 - 1e-6)


def collisions_of(infos: Sequence[ConceptInfo], alike: Mapping[str, Tensor] = MappingProxyType({})) -> tuple[Collision, ...]:
    """The collisions of a bank's concepts, each with an earlier one; alike: as of `inspection.likeness`, measure -> `[K, K]`, NaN = not
    compared. Without it, what the headers alone tell."""
    found = _same_photos(infos)
    if "deltas" in alike:
        found += _found(infos, "copy", _copies(alike), alike["words"], "one is a copy of the other")
    if "covers" in alike:
        found += _found(infos, "covers", _as_its_own_crop(infos, alike["covers"]), alike["covers"], "their thumbnails look alike")
    return tuple(found)


def _mixing(nouns: str, names: Sequence[str]) -> str:
    return f"{listed(names)} share the class noun '{nouns}' and the weights: in pictures of one the others act as well"


def header_warnings(bank: ConceptBank) -> tuple[str, ...]:
    """What a bank's headers tell, but for collisions: which of its concepts mix. A line for every class noun."""
    groups: dict[tuple[str, str], list[str]] = {}
    cases: dict[str, list[str]] = {}
    for name, info in bank.infos.items():
        cases.setdefault(name.casefold(), []).append(name)
        if composition_of(info) in STANDING and noun_of(info):
            groups.setdefault((noun_of(info), info.kind), []).append(name)
    mixing = [_mixing(noun, names) for (noun, _), names in groups.items() if len(names) > 1]
    return (*mixing, *(f"{listed(names)} differ in upper and lower case only" for names in cases.values() if len(names) > 1))


def warnings_before(bank: ConceptBank | None, name: str, class_noun: str, method: str = "", kind: str = "object",
                    digests: Collection[str] = ()) -> tuple[str, ...]:
    """Warnings before a concept is learned into a bank.

    Args:
        bank: None for a new one.
        method: with which the concept will be learned, empty = not known yet.
        digests: of its photos, empty = not known yet.

    Raises:
        ConceptError: for a name that is not allowed.
    """
    check_name(name)
    infos = {} if bank is None else {known: info for known, info in bank.infos.items() if known != name}
    found = []
    if bank is not None:
        taken = [word for word in (name, *default_words(name, 2)) if bank.vocabulary.entries.get(word, ())]
        owners = {bank.vocabulary.entries[word][0].concept for word in taken} - {name}
        found += [f"the bank holds <{name}> already"] if name in bank else []
        found += [f"<{taken[0]}> is a placeholder of {listed(sorted(owners))} already; choose another name"] if owners else []
    case = [known for known in infos if known.casefold() == name.casefold()]
    part = [known for known in infos if known not in case and (known.casefold() in name.casefold() or name.casefold() in known.casefold())]
    if case:
        found.append(f"<{name}> and {listed(case)} differ in upper and lower case only; other programs take them for one")
    if part:
        found.append(f"one of the names <{name}> and {listed(part)} is a part of the other; programs that know no < > mistake them")
    same = [known for known, info in infos.items()
            if (info.kind, noun_of(info)) == (kind, plain(class_noun)) and _are_same_photos(set(digests), _digests(info))]
    if same:
        found.append(f"{listed(same)} was learned from the same photos; two concepts of one thing collide")
    return (*found, *_mixed_with(infos, class_noun, method))


def _mixed_with(infos: Mapping[str, ConceptInfo], class_noun: str, method: str) -> list[str]:
    """Concepts of the same noun with which the new one would share weights: always, or in a prompt that names both."""
    ways = {known: {composition_of(info), composition_of_method(method) if method else "bound"}
            for known, info in infos.items() if plain(class_noun) and noun_of(info) == plain(class_noun)}
    always = [known for known, both in ways.items() if both & set(STANDING)]
    routed = [known for known, both in ways.items() if both == {"routed"}]
    noun = " ".join(class_noun.split())
    return [*([f"{listed(always)}: a {noun} as well, and the two will share the weights in every picture; 'bound' ones keep apart"]
              if always else []),
            *([f"{listed(routed)}: a {noun} as well; named in one prompt they share the weights and get mistaken for each other more often "
               "than 'bound' ones"] if routed else [])]
