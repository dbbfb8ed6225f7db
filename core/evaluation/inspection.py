"""Inspects a bank: facts of every concept, similarity of concepts, and collisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.concepts import Concept, ConceptInfo
from ..bank.terms import Terms
from ..data.reading import to_pixels
from ..data.report import counted
from ..errors import ConceptError
from ..images import opened
from ..model.deltas import Deltas, LowRankDelta, SparseDelta
from ..model.slots import SlotDelta
from .bankcheck import Encode
from .collisions import Collision, collisions_of, composition_of, header_warnings
from .likeness import delta_cosines, word_cosines

CROP = 0.8      # share of a thumbnail's sides
# maximum number of concepts for full similarity tables in the JSON report, which would be megabytes
WHOLE = 100
ACTS = {"bound": "word-bound", "routed": "prompt-activated", "summed": "always on", "averaged": "averaged"}


@dataclass(frozen=True)
class Facts:
    """Facts of one concept.

    composes: how it acts together with others, a value of `collisions.COMPOSES`; stores: the form of its
    deltas; copies: layer copies of its words; nbytes: size of its tensors; fault: why it could not be read.
    With a fault, fields that need the tensors are empty. terms: licence and author.
    """

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
    nbytes: int = 0
    thumbnail: bytes = b""
    fault: str = ""
    terms: Terms = Terms()

    @property
    def way(self) -> str:
        """The method, and how its concepts act if the name does not say so."""
        return self.method if self.method == self.composes else f"{self.method}, {ACTS[self.composes]}"

    def to_json(self) -> dict:
        names = {"nbytes": "bytes", "thumbnail": "cover"}
        facts = {names.get(key, key): value for key, value in asdict(self).items() if key != "terms"}
        return facts | {"cover": bool(self.thumbnail)} | self.terms.to_json()


@dataclass(frozen=True)
class Nearest:
    """The most similar concept, the measure, and the similarity."""

    name: str
    measure: str
    cosine: float


@dataclass(frozen=True)
class Inspection:
    """Results of `inspect`.

    likeness: measure (covers, deltas, words) -> cosines `[K, K]`, NaN for pairs that cannot be compared. The
    diagonal of covers compares each thumbnail with its own crop. warnings: sentences, including collisions.
    made_on: describes the base that all concepts of the bank are for. fixed_words: concepts whose words are
    their class noun's: two dogs have the same ones, which says nothing about their likeness.
    """

    facts: tuple[Facts, ...]
    likeness: Mapping[str, Tensor]
    collisions: tuple[Collision, ...]
    warnings: tuple[str, ...]
    made_on: str = ""
    fixed_words: frozenset[str] = frozenset()

    def partners(self, name: str) -> list[str]:
        """The concepts that a concept collides with, without repetition."""
        pairs = [pair for c in self.collisions for pair in ((c.one, c.other), (c.other, c.one))]
        return list(dict.fromkeys(other for concept, other in pairs if concept == name))

    def nearest(self, name: str, measure: str = "") -> Nearest | None:
        """The most similar other concept by the given measure, or by the first measure that compares the
        concept with any other.
        """
        row = [facts.name for facts in self.facts].index(name)
        for chosen in [measure] if measure else list(self.likeness):
            cosines = self.likeness[chosen][row].clone().nan_to_num(-math.inf)
            cosines[row] = -math.inf
            if chosen == "words":
                fixed = [facts.name in self.fixed_words for facts in self.facts]
                cosines[torch.tensor(fixed) | fixed[row]] = -math.inf
            column = int(cosines.argmax())
            if cosines[column] > -math.inf:
                return Nearest(self.facts[column].name, chosen, float(cosines[column]))
        return None

    def to_json(self) -> dict:
        concepts = []
        for facts in self.facts:
            nearest = [n for measure in self.likeness if (n := self.nearest(facts.name, measure)) is not None]
            most_like = {n.measure: {"name": n.name, "cosine": round(n.cosine, 4)} for n in nearest}
            concepts.append({**facts.to_json(), "most_like": most_like})
        report = {"concepts": concepts, "collisions": [asdict(c) for c in self.collisions],
                  "warnings": list(self.warnings), **({"made_on": self.made_on} if self.facts else {})}
        if len(self.facts) <= WHOLE:
            report["likeness"] = {measure: _table(cosines) for measure, cosines in self.likeness.items()}
        return report


def _table(cosines: Tensor) -> list[list[float | None]]:
    """A matrix as JSON, with null for NaN."""
    return [[None if math.isnan(x) else round(x, 4) for x in row] for row in cosines.tolist()]


def _form(deltas: Deltas) -> str:
    """Describes the deltas, such as `rank 4`, `8 slots and rank 4`, `ranks 2 to 8 and 1,200 weights` or
    `words only`.
    """
    ranks = sorted({delta.up.shape[1] for delta in deltas.values() if isinstance(delta, LowRankDelta)})
    places = sum(delta.indices.numel() for delta in deltas.values() if isinstance(delta, SparseDelta))
    slots = max((delta.shape[0] for delta in deltas.values() if isinstance(delta, SlotDelta)), default=0)
    parts = [f"{slots} slots"] if slots else []
    parts += [f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"] if ranks else []
    return " and ".join([*parts, f"{places:,} weights"] if places else parts) or "words only"


def facts_of(info: ConceptInfo, concept: Concept | None = None, fault: str = "") -> Facts:
    """Facts from the header, and from the tensors if the concept is given."""
    origin = info.provenance
    facts = Facts(info.name, info.placeholder, str(info.class_noun), info.kind, str(info.method),
                  composition_of(info), len(info.words),
                  len(origin.images), origin.steps, str(origin.date)[:10], fault=fault, terms=info.terms)
    if concept is None:
        return facts
    return replace(facts, stores=_form(concept.deltas), copies=concept.tokens.copies, nbytes=concept.nbytes(),
                   thumbnail=concept.thumbnail)


def _read(bank: ConceptBank) -> tuple[dict[str, Concept], dict[str, str]]:
    """The readable concepts by name, and the errors of the others."""
    concepts, faults = {}, {}
    for name in bank.names:
        try:
            concepts[name] = bank[name]
        except ConceptError as error:
            faults[name] = str(error)
    return concepts, faults


def crop_of(picture: Tensor) -> Tensor:
    """The mirrored centre crop of a picture `[3, H, W]`, as a second picture of the same thing."""
    top, left = (int(side * (1 - CROP) / 2) for side in picture.shape[1:])
    return picture[:, top : picture.shape[1] - top, left : picture.shape[2] - left].flip(-1)


def _thumbnail_cosines(concepts: Sequence[Concept], encode: Encode) -> Tensor:
    """Cosines of thumbnails `[n, n]`. The diagonal compares each thumbnail with its own crop. NaN without a
    readable thumbnail.
    """
    cosines = torch.full((len(concepts), len(concepts)), math.nan, dtype=torch.float64)
    opened_thumbnails = ((i, opened(concept.thumbnail)) for i, concept in enumerate(concepts))
    pictures = {i: to_pixels(picture) for i, picture in opened_thumbnails if picture is not None}
    if pictures:
        features = encode([*pictures.values(), *map(crop_of, pictures.values())]).double()
        if features.ndim != 2 or len(features) != 2 * len(pictures) or not features.isfinite().all():
            raise ConceptError("the vision model gives no finite vector per picture; choose another one")
        whole, crops = features.chunk(2)
        places = torch.tensor(list(pictures))
        cosines[places[:, None], places] = whole @ whole.T
        cosines[places, places] = (whole * crops).sum(1)
    return cosines


def likeness(concepts: Sequence[Concept], encode: Encode | None = None,
             rows: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Cosines of concepts by several measures.

    Args:
        encode: If given, thumbnails are compared too, as the first measure.
        rows: Indices of m concepts to compare with all n; None = all.

    Returns:
        Measure (covers, deltas, words) -> `[m, n]`, NaN for pairs that cannot be compared.
    """
    rows = range(len(concepts)) if rows is None else rows
    if not concepts or not rows:
        return {}
    thumbnails = {} if encode is None else {"covers": _thumbnail_cosines(concepts, encode)[list(rows)]}
    deltas, groups = [concept.deltas for concept in concepts], [concept.tokens for concept in concepts]
    # comparing a list with itself is faster
    compared = deltas if len(rows) == len(deltas) else [deltas[i] for i in rows]
    words = word_cosines([groups[i] for i in rows], groups)
    return {**thumbnails, "deltas": delta_cosines(compared, deltas), "words": words}


def inspect(bank: ConceptBank | None, encode: Encode | None = None, only: str = "") -> Inspection:
    """Reads a whole bank and compares its concepts. A concept that cannot be read is reported and not
    compared.

    Args:
        encode: Encodes pictures to unit vectors `[n, D]`. If given, thumbnails are compared too.
        only: Compares only pairs with this concept. Empty = all pairs.
    """
    if bank is None or not len(bank):
        return Inspection((), {}, (), ())
    concepts, faults = _read(bank)
    facts = tuple(facts_of(info, concepts.get(name), faults.get(name, ""))
                  for name, info in bank.infos.items())
    readable = [i for i, entry in enumerate(facts) if not entry.fault]
    rows = [row for row, i in enumerate(readable) if only in ("", facts[i].name)]
    tables = {}
    for measure, cosines in likeness([concepts[facts[i].name] for i in readable], encode, rows).items():
        columns, compared = torch.tensor(readable), torch.tensor([readable[row] for row in rows])
        table = torch.full((len(facts), len(facts)), math.nan, dtype=torch.float64)
        table[compared[:, None], columns] = cosines
        table[columns[:, None], compared] = cosines.T
        if measure == "deltas":      # the diagonal shows which concepts have deltas
            diagonal = [1.0 if concepts[facts[i].name].deltas else math.nan for i in readable]
            table[columns, columns] = torch.tensor(diagonal).double()
        tables[measure] = table
    collisions = collisions_of(list(bank.infos.values()), tables)
    warnings = (*faults.values(), *(collision.sentence for collision in collisions), *header_warnings(bank))
    fixed = frozenset(name for name, info in bank.infos.items() if _has_fixed_words(info))
    return Inspection(facts, tables, collisions, warnings, bank.layout.describe(), fixed)


def _has_fixed_words(info: ConceptInfo) -> bool:
    """Whether an object's words are those of its class noun, as `methods.slots` leaves them by default."""
    settings = info.provenance.settings.get("method")
    return (info.kind != "style" and bool(info.class_noun.strip()) and isinstance(settings, Mapping)
            and settings.get("learn_words") is False)


def nearest_text(nearest: Nearest) -> str:
    """Text such as `most like <mimi> (deltas 0.12)`."""
    measure = "thumbnails" if nearest.measure == "covers" else nearest.measure
    return f"most like <{nearest.name}> ({measure} {nearest.cosine:.2f})"


def lines(inspection: Inspection) -> list[str]:
    """The report as text: warnings first, then a line per concept."""
    rows = []
    for facts in inspection.facts:
        layers = f"{facts.copies} layer copies" if facts.copies > 1 else "one copy"
        stores = f"{facts.words} words in {layers}, {facts.stores}, {facts.nbytes / 1e6:.2f} MB"
        nearest = inspection.nearest(facts.name)
        row = (f"{facts.placeholder}  {facts.class_noun}, {facts.kind}, {facts.way}, "
               f"{'cannot be read' if facts.fault else stores}, {counted(facts.photos, 'photo')}, "
               f"{counted(facts.steps, 'step')}, "
               f"{facts.date}{f', {facts.terms}' if facts.terms else ''}")
        rows.append(row if nearest is None else f"{row}; {nearest_text(nearest)}")
    made_on = [f"made on {inspection.made_on}"] if rows else []
    warnings = [f"warning: {warning}" for warning in inspection.warnings]
    return [*warnings, *rows, *made_on] or ["the bank is empty"]
