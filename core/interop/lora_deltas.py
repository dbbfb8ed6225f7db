"""The part of a LoRA file that a concept can hold: its changes of the text cross-attention, as deltas."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import ConceptError
from ..model.backbone import Backbone, Projections
from ..model.deltas import DeltaKey, LowRankDelta
from ..model.sites import Site, SiteLayout
from .lora_file import Layer, LoraFile, layers_of
from .lora_forms import Change, Matrix, change_of, full_rank, is_complete, with_magnitudes
from .lora_names import (
    BIAS,
    CUSTOM_DIFFUSION,
    DIFF,
    DORA,
    FORMS,
    LOHA,
    LOKR,
    LORA,
    NORM,
    kind_of,
    shown,
    site_names,
)

MOST_ENTRIES = 1 << 33      # SDXL has less than half
_ADDED = (LORA, LOHA, LOKR, DIFF)      # changes that are added to a weight; their size is known without it


@dataclass(frozen=True)
class Left:
    """Layers of one kind that were left out. share: of the LoRA's squared norm; None if it is not known."""

    layers: int
    share: float | None


@dataclass(frozen=True)
class Taken:
    """The imported part of a LoRA.

    Args:
        deltas: Deltas of the sites.
        share: Their share of the LoRA's squared Frobenius norm, 0 to 1. DoRA's magnitudes do not count.
        left: Kind of layer -> what was left out.
        forms: Form -> number of imported layers.
        used_base: Whether they were computed from the base's weights.
        remarks: Further notes.
    """

    deltas: Mapping[DeltaKey, LowRankDelta]
    share: float
    left: Mapping[str, Left]
    forms: Mapping[str, int] = field(default_factory=dict)
    used_base: bool = False
    remarks: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Sentences on what was taken and what was left out."""
        forms = ", ".join(f"{count} {form}" for form, count in self.forms.items())
        kinds = f" ({forms})" if set(self.forms) - {LORA} else ""
        notes = [f"taken: {len(self.deltas)} text cross-attention layers{kinds}, {_percent(self.share)} of "
                 "what the LoRA changes"]
        left = [f"{kind} ({some.layers} layer{'s' * (some.layers > 1)}"
                + ("" if some.share is None else f", {_percent(some.share)}") + ")"
                for kind, some in sorted(self.left.items(), key=lambda item: -(item[1].share or 0))]
        if left:
            notes.append(f"left out: {', '.join(left)}; the concept does not have these changes")
        return [*notes, *self.remarks]


def _percent(share: float) -> str:
    return "less than 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def lora_deltas(file: LoraFile, layout: SiteLayout, owner: str, which: str = "",
                backbone: Backbone | None = None) -> Taken:
    """Extracts the text cross-attention of a LoRA.

    Args:
        owner: The file, for messages.
        which: See `layers_of`.
        backbone: The base, whose weights DoRA and Custom Diffusion's files need.

    Raises:
        ConceptError: The LoRA has none, is damaged, is in a form that cannot be imported, or belongs to
            another model family.
    """
    reader = _Reader(file, layout, owner, backbone)
    for layer in layers_of(file, which, owner):
        reader.add(layer)
    return reader.taken()


class _Reader:
    """Collects the layers of one file."""

    def __init__(self, file: LoraFile, layout: SiteLayout, owner: str, backbone: Backbone | None) -> None:
        self.file, self.layout, self.owner, self.backbone = file, layout, owner, backbone
        self.places = site_names(layout)
        self.deltas: dict[DeltaKey, LowRankDelta] = {}
        self.inside = 0.0
        self.left: dict[str, list[float | None]] = {}
        self.forms: Counter[str] = Counter()
        self.alphas_of_zero = 0
        self.used_base = False
        self.entries = 0
        self.configs: dict[str, None] = {}      # what was said about scales, once each

    def add(self, layer: Layer) -> None:
        place = None if layer.is_text else self.places.get(layer.module)
        if place is None:
            self._leave(kind_of(layer.module, layer.is_text), layer)
            return
        if BIAS in layer.forms:
            self._note_left("biases of text cross-attention", None)
        sums = [form for form in layer.forms if form in (*_ADDED, CUSTOM_DIFFUSION)]
        odd = [form for form in layer.forms if form not in (*FORMS, BIAS)]
        where = f"{self.owner}: {layer.module}"
        if odd or len(sums) > 1:
            named = " and ".join((odd or sums)[:3])
            raise ConceptError(f"{self.owner} changes text cross-attention by {named} ({layer.module}); "
                               f"allowed: one of {', '.join(FORMS)}")
        if sums:
            self._take(layer, sums[0], place, where)
        elif DORA in layer.forms:
            raise ConceptError(f"{where} has DoRA magnitudes and no factors; allowed: both")

    def _take(self, layer: Layer, form: str, place: DeltaKey, where: str) -> None:
        site, projection = self.layout.sites[place[0]], place[1]
        change = self._change(layer, form, where)
        if change.shape != site.shape(projection):
            has, needs = ("x".join(map(str, shape)) for shape in (change.shape, site.shape(projection)))
            raise ConceptError(f"{self.owner} has a {has} change for {projection} of site {site.index}; this "
                               f"base needs {needs}: it was made for another family of models")
        if place in self.deltas:
            raise ConceptError(f"{self.owner} changes {projection} of site {site.index} under two names, one "
                               f"is {shown(layer.path)}; allowed: one")
        if form == CUSTOM_DIFFUSION:
            change = replace(change, first=Matrix(change.first.left - self._weight(site, projection, form)))
        delta = change.delta()
        if DORA in layer.forms:
            delta = self._with_magnitudes(layer.forms[DORA], delta, site, projection, where)
            form = DORA if form == LORA else f"{form} with DoRA"
        self.forms[form] += 1
        self.inside += _finite(change.energy(), where)
        self.deltas[place] = delta

    def _change(self, layer: Layer, form: str, where: str) -> Change:
        def scale(rank: int | None) -> float:
            if layer.alpha is None:
                found = self.file.config_of(layer.path)
                if found is None:
                    return 1.0
                self.configs[found[0].told()] = None
                return found[0].scale(found[1], rank)
            if layer.alpha.numel() != 1 or not layer.alpha.dtype.is_floating_point:
                raise ConceptError(f"{where} has an alpha of shape {tuple(layer.alpha.shape)} and type "
                                   f"{layer.alpha.dtype}; allowed: one floating-point number")
            alpha = float(layer.alpha)
            self.alphas_of_zero += alpha == 0
            return 1.0 if rank is None or alpha == 0 else alpha / rank

        change = change_of(form, layer.forms[form], scale, where)
        self.entries += math.prod(change.shape)
        if self.entries > MOST_ENTRIES:
            raise ConceptError(f"{self.owner} changes more numbers than these models have; allowed: up to "
                               f"{MOST_ENTRIES}")
        return change

    def _weight(self, site: Site, projection: str, form: str) -> Tensor:
        if self.backbone is None:
            raise ConceptError(f"{self.owner} is in the form {form}, which needs the weights of the base; "
                               "allowed: an import that loads the base")
        self.used_base = True
        return frozen_weight(self.backbone, site, projection, self.backbone.device)

    def _with_magnitudes(self, sides: Mapping[str, Tensor], delta: LowRankDelta, site: Site, projection: str,
                         where: str) -> LowRankDelta:
        if len(sides) > 1:
            raise ConceptError(f"{where} has {' and '.join(sorted(sides))}; allowed: one of them")
        (name, magnitude), = sides.items()
        weight = self._weight(site, projection, DORA)
        return full_rank(with_magnitudes(weight, delta.dense(), magnitude, name != "dora_scale", where))

    def _leave(self, kind: str, layer: Layer) -> None:
        """Notes a layer that is no site, with its squared norm where its form is a plain sum."""
        for form, sides in layer.forms.items():
            if form in (BIAS, NORM):
                self._note_left("biases" if form == BIAS else kind, None)
            elif form in _ADDED and is_complete(form, sides):
                where = f"{self.owner}: {layer.module}"
                self._note_left(kind, _finite(self._change(layer, form, where).energy(), where))
            elif form != DORA:
                self._note_left(f"{kind} as {form}" if form not in FORMS else f"{kind}, incomplete", None)

    def _note_left(self, kind: str, energy: float | None) -> None:
        self.left.setdefault(kind, []).append(energy)

    def taken(self) -> Taken:
        """The result. Raises ConceptError if nothing was found that concepts can hold."""
        total = self.inside + sum(energy or 0.0 for group in self.left.values() for energy in group)
        left = {kind: Left(len(group), sum(e or 0.0 for e in group) / total if total else 0.0)
                if any(e is not None for e in group) else Left(len(group), None)
                for kind, group in self.left.items()}
        modules = {key.rsplit(".", 1)[0] for key in self.file.others}
        if modules:
            example = shown(min(self.file.others))
            left[f"names that are no LoRA's, such as '{example}'"] = Left(len(modules), None)
        if not self.deltas:
            found = ", ".join(f"{kind} ({some.layers})" for kind, some in sorted(left.items())) or "nothing"
            raise ConceptError(f"{self.owner} changes no text cross-attention of this base "
                               f"({self.layout.describe()}); it holds {found}; allowed: LoRA files "
                               f"with layers such as {self.layout.sites[0].name}")
        share = self.inside / total if total else 1.0
        return Taken(self.deltas, share, left, self.forms, self.used_base, tuple(self._remarks()))

    def _remarks(self) -> list[str]:
        remarks = [*self.configs, *(f"left out: {name}" for name in self.file.beside)]
        if self.file.lacks_config:
            remarks.append("its names are PEFT's and there is no adapter_config.json beside it, so alpha "
                           "counts as the rank; if the file is too weak or too strong, import its folder")
        if self.file.configs and not self.configs:
            source = next(iter(self.file.configs.values())).source
            remarks.append(f"{source} names none of its layers, so alpha counts as the rank")
        if self.alphas_of_zero:
            remarks.append(f"alpha is 0 in {self.alphas_of_zero} layers and counts as the rank there, as in "
                           "kohya's programs")
        if self.used_base:
            remarks.append("the changes were computed from the weights of this base; use the concept with "
                           "this base only")
        if not any(delta.scale and delta.up.any() and delta.down.any() for delta in self.deltas.values()):
            remarks.append("all imported changes are zero: the concept changes no weights, and only its "
                           "words act")
        return remarks


def _finite(energy: float, where: str) -> float:
    if not math.isfinite(energy):
        raise ConceptError(f"{where} makes numbers too large for a weight; allowed: finite numbers")
    return energy


def frozen_weight(base: Projections, site: Site, projection: str, device: torch.device) -> Tensor:
    """The weight of a projection as it is loaded, `[a, b]` float32 on the CPU."""
    _, width = site.shape(projection)
    with torch.no_grad():
        bias = base.project(site, projection, torch.zeros(1, width, device=device)).float()
        rows = base.project(site, projection, torch.eye(width, device=device)).float()
    return (rows - bias).T.cpu().contiguous()
