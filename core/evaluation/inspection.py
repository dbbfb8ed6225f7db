"""What a bank holds: the facts of every concept, how alike concepts are, and which of them collide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.concepts import Concept, ConceptInfo
from ..data.photos import to_pixels
from ..errors import ConceptError
from ..images import opened
from ..model.deltas import Deltas, LowRankDelta
from .bankcheck import Encode
from .collisions import Collision, collisions_of, composition_of, header_warnings
from .likeness import delta_cosines, word_cosines

CROP = 0.8      # of a thumbnail's sides
WHOLE = 100      # of more concepts the report holds no tables of likeness, which are megabytes then


@dataclass(frozen=True)
class Facts:
    """What there is to say of one concept. composes: how it acts beside others; stores: the form of its deltas; fault: why it could not be
    read, then what only its tensors tell is empty."""

    name: str
    placeholder: str
    class_noun: str
    kind: str
    method: str
    composes: str
    words: int
    photos: int
    steps: int
    date: str
    stores: str = ""
    copies: int = 0
    bytes: int = 0
    thumbnail: bytes = b""
    fault: str = ""

    @property
    def way(self) -> str:
        """The method, and how it acts where its name does not say so."""
        return self.method if self.method == self.composes else f"{self.method}, {self.composes}"

    def to_json(self) -> dict:
        return {key: value for key, value in asdict(self).items() if key != "thumbnail"} | {"cover": bool(self.thumbnail)}


@dataclass(frozen=True)
class Nearest:
    """The concept that another is most like, by which measure, and how much."""

    name: str
    measure: str
    cosine: float


@dataclass(frozen=True)
class Inspection:
    """likeness: measure (thumbnails, deltas, words) -> `[K, K]` cosines, NaN where two cannot be compared; the diagonal of thumbnails says
    how like a thumbnail is to its own crop. warnings: sentences, collisions among them."""

    facts: tuple[Facts, ...]
    likeness: Mapping[str, Tensor]
    collisions: tuple[Collision, ...]
    warnings: tuple[str, ...]

    def partners(self, name: str) -> list[str]:
        """With which concepts one collides, each once."""
        return list(dict.fromkeys(other for c in self.collisions for own, other in ((c.one, c.other), (c.other, c.one)) if own == name))

    def nearest(self, name: str, measure: str = "") -> Nearest | None:
        """The most similar other concept; by the first measure that has anything to say, unless one is named."""
        row = [facts.name for facts in self.facts].index(name)
        for one in [measure] if measure else list(self.likeness):
            cosines = self.likeness[one][row].clone().nan_to_num(-math.inf)
            cosines[row] = -math.inf
            place = int(cosines.argmax())
            if cosines[place] > -math.inf:
                return Nearest(self.facts[place].name, one, float(cosines[place]))
        return None

    def to_json(self) -> dict:
        concepts = []
        for facts in self.facts:
            found = {measure: self.nearest(facts.name, measure) for measure in self.likeness}
            most = {measure: {"name": n.name, "cosine": round(n.cosine, 4)} for measure, n in found.items() if n is not None}
            concepts.append({**facts.to_json(), "most_like": most})
        whole = {"likeness": {measure: _table(cosines) for measure, cosines in self.likeness.items()}} if len(self.facts) <= WHOLE else {}
        return {"concepts": concepts, "collisions": [asdict(one) for one in self.collisions], "warnings": list(self.warnings), **whole}


def _table(cosines: Tensor) -> list[list[float | None]]:
    """NaN is not JSON."""
    return [[None if math.isnan(x) else round(x, 4) for x in row] for row in cosines.tolist()]


def _form(deltas: Deltas) -> str:
    ranks = sorted({delta.up.shape[1] for delta in deltas.values() if isinstance(delta, LowRankDelta)})
    places = sum(delta.indices.numel() for delta in deltas.values() if not isinstance(delta, LowRankDelta))
    parts = [f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"] if ranks else []
    return " and ".join([*parts, f"{places:,} weights"] if places else parts) or "words only"


def facts_of(info: ConceptInfo, concept: Concept | None = None, fault: str = "") -> Facts:
    """From the header alone, or with the tensors."""
    origin = info.provenance
    known = {"name": info.name, "placeholder": info.placeholder, "class_noun": str(info.class_noun), "kind": info.kind,
             "method": str(info.method), "composes": composition_of(info), "words": len(info.words), "photos": len(origin.images),
             "steps": origin.steps, "date": str(origin.date)[:10], "fault": fault}
    if concept is None:
        return Facts(**known)
    return Facts(**known, stores=_form(concept.deltas), copies=concept.tokens.copies, bytes=concept.nbytes(), thumbnail=concept.thumbnail)


def _read(bank: ConceptBank) -> tuple[dict[str, Concept], dict[str, str]]:
    """Concepts by name, and why others cannot be read: one that is damaged is no reason to see none."""
    concepts, faults = {}, {}
    for name in bank.names:
        try:
            concepts[name] = bank[name]
        except ConceptError as error:
            faults[name] = str(error)
    return concepts, faults


def _crop(picture: Tensor) -> Tensor:
    """The middle of a picture `[3, H, W]`, mirrored: another picture of the same thing, if ever there was one."""
    top, left = (int(side * (1 - CROP) / 2) for side in picture.shape[1:])
    return picture[:, top : picture.shape[1] - top, left : picture.shape[2] - left].flip(-1)


def _thumbnail_cosines(concepts: Sequence[Concept], encode: Encode) -> Tensor:
    """`[n, n]`: cosine of thumbnails, on the diagonal that of a thumbnail and its own crop; NaN for a concept without a readable one."""
    found = torch.full((len(concepts), len(concepts)), math.nan, dtype=torch.float64)
    pictures = {i: to_pixels(picture) for i, concept in enumerate(concepts) if (picture := opened(concept.thumbnail)) is not None}
    if pictures:
        features = encode([*pictures.values(), *map(_crop, pictures.values())]).double()
        if features.ndim != 2 or len(features) != 2 * len(pictures) or not features.isfinite().all():
            raise ConceptError("the vision model gives no finite vector per picture; choose another one")
        whole, crops = features.chunk(2)
        places = torch.tensor(list(pictures))
        found[places[:, None], places] = whole @ whole.T
        found[places, places] = (whole * crops).sum(1)
    return found


def likeness(concepts: Sequence[Concept], encode: Encode | None = None, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Measure -> `[m, n]`, of all concepts or those in `rows` with all; thumbnails come first, where there is an encoder for them."""
    rows = range(len(concepts)) if rows is None else rows
    if not concepts or not rows:
        return {}
    thumbnails = {} if encode is None else {"covers": _thumbnail_cosines(concepts, encode)[list(rows)]}
    deltas, groups = [concept.deltas for concept in concepts], [concept.tokens for concept in concepts]
    ours = deltas if len(rows) == len(deltas) else [deltas[i] for i in rows]      # the very list is compared with itself faster
    return {**thumbnails, "deltas": delta_cosines(ours, deltas), "words": word_cosines([groups[i] for i in rows], groups)}


def inspect(bank: ConceptBank | None, encode: Encode | None = None, only: str = "") -> Inspection:
    """Reads a whole bank. A concept that cannot be read is told of and compared with nothing. only: a concept that is compared with the
    others, not they with each other."""
    if bank is None or not len(bank):
        return Inspection((), {}, (), ())
    concepts, faults = _read(bank)
    facts = tuple(facts_of(info, concepts.get(name), faults.get(name, "")) for name, info in bank.infos.items())
    readable = [i for i, one in enumerate(facts) if not one.fault]
    rows = [row for row, i in enumerate(readable) if only in ("", facts[i].name)]
    alike = {}
    for measure, cosines in likeness([concepts[facts[i].name] for i in readable], encode, rows).items():
        all_of, ours = torch.tensor(readable), torch.tensor([readable[row] for row in rows])
        table = torch.full((len(facts), len(facts)), math.nan, dtype=torch.float64)
        table[ours[:, None], all_of] = cosines
        table[all_of[:, None], ours] = cosines.T
        if measure == "deltas":      # also of those that are compared with one alone: whether they have any
            table[all_of, all_of] = torch.tensor([1.0 if concepts[facts[i].name].deltas else math.nan for i in readable]).double()
        alike[measure] = table
    collisions = collisions_of(list(bank.infos.values()), alike)
    warnings = (*faults.values(), *(one.sentence for one in collisions), *header_warnings(bank))
    return Inspection(facts, alike, collisions, warnings)


def lines(found: Inspection) -> list[str]:
    """What is wrong first, then a line per concept."""
    told = []
    for facts in found.facts:
        layers = f"{facts.copies} layer copies" if facts.copies > 1 else "one copy"
        held = f"{facts.words} words in {layers}, {facts.stores}, {facts.bytes / 1e6:.2f} MB" if not facts.fault else "cannot be read"
        nearest = found.nearest(facts.name)
        like = f"; most like <{nearest.name}> ({nearest.measure} {nearest.cosine:.2f})" if nearest is not None else ""
        told.append(f"{facts.placeholder}  {facts.class_noun}, {facts.kind}, {facts.way}, {held}, "
                    f"{facts.photos} photos, {facts.steps} steps, {facts.date}{like}")
    return [*(f"warning: {warning}" for warning in found.warnings), *told] or ["the bank is empty"]
