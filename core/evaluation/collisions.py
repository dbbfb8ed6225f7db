"""Finds concepts of a bank that collide, and warns before another one is learned."""

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
from ..bank.tokens import check_name, default_words, listed
from ..methods import DEFAULT, METHODS, make

# names in JSON reports
COMPOSES = {"bound": "bound", "route": "routed", "sum": "summed", "average": "averaged"}
ALWAYS_ON = ("summed", "averaged")      # in the weights for every prompt
SHARED_PHOTOS = 0.5      # share of the photos of the concept with fewer photos
COPY = 0.98

# Photos and thumbnails decide, not cosines of deltas and words, because of these measurements on the embedded
# base. One dog was learned twice for 300 steps, beside another dog. Cosines of deltas: from the same photos
# 0.46 (bound), 0.49 (lora_m) and 0.00 (CIDM, which makes deltas orthogonal); from other photos of the dog
# 0.06 (bound) and 0.05 (lora_m); with the other dog 0.09 and 0.22. Among the benchmark's ten different
# concepts they reach 0.26 (lora_m), 0.64 (EWC, C-LoRA) and 0.99 (CCDM). Cosines of word vectors: from the
# same photos 0.53 (bound), 0.59 (lora_m) and 0.75 (CIDM); from other photos 0.38 and 0.24; with the other dog
# 0.36 and 0.37. Two concepts of one class noun reach 0.97 (custom_diffusion_merge). Neither cosine tells
# whether two concepts are the same, so they are reported and not thresholded. None of 7,379 pairs of
# different concepts of 17 methods had both at 0.98 or more, so such a pair is a copy. Thumbnails are compared
# with an image encoder. A threshold on their cosine would depend on the encoder, so a thumbnail is compared
# with its own crop instead (see inspection). Pairs above this threshold: 1 of 4,992 pairs of photos of
# different things with one class noun; 41 % of 1,120 pairs of photos of one thing; none of 156 pairs of
# thumbnails of different things with one class noun, drawn from one seed. 2 % of drawings in different styles
# exceed it, so styles are not compared.


@dataclass(frozen=True)
class Collision:
    """Two concepts that are probably the same thing under two names.

    one, other: their names, the earlier one first; kind: "photos", "copy" or "covers"; why: the reason, as
    part of a sentence.
    """

    one: str
    other: str
    kind: str
    why: str

    @property
    def sentence(self) -> str:
        return f"<{self.one}> and <{self.other}> collide: {self.why}"


def composition_of(concept: ConceptInfo) -> str:
    """How a concept acts together with others, as named in JSON reports."""
    return COMPOSES[concept.composes.kind]


def composition_of_method(method: str, kind: str = "object") -> str:
    """How a method's concepts of a kind act together with others. An unknown method counts as
    prompt-activated.
    """
    composition = make(str(method)).composition_of_kind(kind) if str(method) in METHODS else PROMPT
    return COMPOSES[composition.kind]


def plain(noun: str) -> str:
    """Normalises a class noun: lower case, without extra spaces."""
    return " ".join(str(noun).casefold().split())


def noun_of(info: ConceptInfo) -> str:
    return plain(info.class_noun)


def _digests(info: ConceptInfo) -> set[str]:
    return {digest for digest in info.provenance.images if digest and isinstance(digest, str)}


def _are_same_photos(left: Collection[str], right: Collection[str]) -> bool:
    """Whether the photos of two concepts overlap enough, relative to the smaller set."""
    return bool(left and right) and len(set(left) & set(right)) >= SHARED_PHOTOS * min(len(left), len(right))


def _same_photos(infos: Sequence[ConceptInfo]) -> list[Collision]:
    """Concepts learned from the same photos, each with the earlier concept that shares most photos.

    Only concepts of the same kind and class noun collide. With another noun, the concept may be another
    object in the same photos.
    """
    owners: dict[str, list[int]] = {}
    collisions = []
    for j, info in enumerate(infos):
        digests = _digests(info)
        counts = Counter(i for digest in digests for i in owners.get(digest, ())
                         if (infos[i].kind, noun_of(infos[i])) == (info.kind, noun_of(info)))
        for i, shared in counts.most_common(1):
            if _are_same_photos(digests, _digests(infos[i])):
                fewer = min(len(digests), len(_digests(infos[i])))
                why = f"they were learned from the same photos ({shared} of {fewer})"
                collisions.append(Collision(infos[i].name, info.name, "photos", why))
        for digest in digests:
            owners.setdefault(digest, []).append(j)
    return collisions


def _most_similar(infos: Sequence[ConceptInfo], kind: str, collides: Tensor, cosines: Tensor,
                  why: str) -> list[Collision]:
    """Pairs each concept that collides with earlier ones with the most similar of them.

    Args:
        collides: `[K, K]` bool.
        cosines: `[K, K]`.
    """
    collisions = []
    for j in collides.tril(-1).any(1).nonzero().flatten().tolist():
        i = int(cosines[j, :j].masked_fill(~collides[j, :j], -2).argmax())
        collisions.append(Collision(infos[i].name, infos[j].name, kind,
                                    f"{why} (cosine {float(cosines[j, i]):.2f})"))
    return collisions


def _copies(likeness: Mapping[str, Tensor]) -> Tensor:
    """Pairs with the same words and deltas, or with the same words and no deltas, `[K, K]` bool."""
    deltas, words = likeness["deltas"], likeness["words"]
    bare = deltas.diagonal().isnan()
    return (words >= COPY) & ((deltas >= COPY) | (bare & bare[:, None]))


def _similar_thumbnails(infos: Sequence[ConceptInfo], cosines: Tensor) -> Tensor:
    """Pairs of objects of one class noun whose thumbnails are as similar as a thumbnail and its own crop,
    `[K, K]` bool.

    Args:
        cosines: `[K, K]` of thumbnails. The diagonal compares each thumbnail with its own crop.
    """
    numbers: dict[str, int] = {}
    nouns = torch.tensor([numbers.setdefault(noun_of(info), len(numbers)) for info in infos])
    objects = torch.tensor([info.kind == "object" for info in infos])
    crops = cosines.diagonal()
    same_noun = (nouns == nouns[:, None]) & objects & objects[:, None]
    return same_noun & (cosines >= (crops + crops[:, None]) / 2 - 1e-6)


def collisions_of(infos: Sequence[ConceptInfo],
                  likeness: Mapping[str, Tensor] = MappingProxyType({})) -> tuple[Collision, ...]:
    """The collisions of a bank's concepts, each with an earlier one.

    Args:
        likeness: measure -> cosines `[K, K]`, NaN = not compared; see `inspection.likeness`. Without it the
        headers alone decide.
    """
    collisions = _same_photos(infos)
    if "deltas" in likeness:
        collisions += _most_similar(infos, "copy", _copies(likeness), likeness["words"],
                                    "one is a copy of the other")
    if "covers" in likeness:
        similar = _similar_thumbnails(infos, likeness["covers"])
        collisions += _most_similar(infos, "covers", similar, likeness["covers"],
                                    "their thumbnails look alike")
    return tuple(collisions)


def header_warnings(bank: ConceptBank) -> tuple[str, ...]:
    """Warnings from a bank's headers, except collisions: concepts that share weights, and names that differ
    only in case.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    cases: dict[str, list[str]] = {}
    for name, info in bank.infos.items():
        cases.setdefault(name.casefold(), []).append(name)
        if composition_of(info) in ALWAYS_ON and noun_of(info):
            groups.setdefault((noun_of(info), info.kind), []).append(name)
    mixing = [f"{listed(names)} share the class noun '{noun}' and the weights: in pictures of one the others "
              "act as well" for (noun, _), names in groups.items() if len(names) > 1]
    same_letters = [f"{listed(names)} differ in upper and lower case only"
                    for names in cases.values() if len(names) > 1]
    return (*mixing, *same_letters)


def warnings_before(bank: ConceptBank | None, name: str, class_noun: str, method: str = "",
                    kind: str = "object", digests: Collection[str] = ()) -> tuple[str, ...]:
    """Warnings before a concept is learned into a bank.

    Args:
        bank: The bank; None for a new one.
        method: Method of the new concept, empty = not known yet.
        digests: Digests of its photos, empty = not known yet.

    Raises:
        ConceptError: The name is not allowed.
    """
    check_name(name)
    if bank is None:
        return ()
    others = {other: info for other, info in bank.infos.items() if other != name}
    warnings = [f"the bank holds <{name}> already"] if name in bank else []
    taken = [word for word in (name, *default_words(name, 2)) if bank.vocabulary.entries.get(word, ())]
    owners = {bank.vocabulary.entries[word][0].concept for word in taken} - {name}
    if owners:
        warnings.append(f"<{taken[0]}> is a placeholder of {listed(sorted(owners))} already; choose another "
                        "name")
    case = [other for other in others if other.casefold() == name.casefold()]
    part = [other for other in others if other not in case
            and (other.casefold() in name.casefold() or name.casefold() in other.casefold())]
    if case:
        warnings.append(f"<{name}> and {listed(case)} differ in upper and lower case only; other programs "
                        "take them for one")
    if part:
        warnings.append(f"one of the names <{name}> and {listed(part)} is a part of the other; programs "
                        "without < > confuse them")
    photos = set(filter(None, digests))
    same = [other for other, info in others.items() if (info.kind, noun_of(info)) == (kind, plain(class_noun))
            and _are_same_photos(photos, _digests(info))]
    if same:
        warnings.append(f"{listed(same)} {'was' if len(same) == 1 else 'were'} learned from the same photos; "
                        "two concepts of one thing collide")
    return (*warnings, *_shared_weights(others, class_noun, method, kind))


def _shared_weights(infos: Mapping[str, ConceptInfo], class_noun: str, method: str,
                    kind: str) -> list[str]:
    """Warnings about concepts with the same noun that share weights with the new one, always or in prompts
    that name both.
    """
    same_noun = [info for info in infos.values() if plain(class_noun) and noun_of(info) == plain(class_noun)]
    new = composition_of_method(method, kind) if method else "bound"
    always = [info.name for info in same_noun if {composition_of(info), new} & set(ALWAYS_ON)]
    together = [info.name for info in same_noun if {composition_of(info), new} == {"routed"}]
    noun, warnings = " ".join(class_noun.split()), []
    if always:
        warnings.append(f"{listed(always)}: a {noun} as well, and the two will share the weights in every "
                        f"picture; concepts of the method '{DEFAULT}' stay separate")
    if together:
        warnings.append(f"{listed(together)}: a {noun} as well; named in one prompt they share the weights "
                        f"and are confused more often than those of the method '{DEFAULT}'")
    return warnings
