"""A judge without learned weights: it compares drawn pictures with the drawing that defines a concept.

An individual is searched for in the picture at every place, in several sizes and in both directions. A
drawing style is compared by its colours. Neither uses an encoder, so their errors are independent of the
encoder's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.data.assignment import Assignment
from ...core.demo.judges import SIDE, at_encoder_size, to_tensor
from ...core.demo.render import EMPTY, ROLES, SUPERSAMPLING, role_map
from ...core.demo.scenes import Placed, SceneConcept, Thing
from ...core.errors import ConceptError

WIDTHS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.56, 0.63, 0.7)      # widths of the searched drawings, in pictures
COLOUR_SPREAD = 40.0      # RGB units; a colour that differs by this much counts 61 %
PADDED = 96      # side of the Fourier transforms: a picture and half a drawing, so that nothing wraps around
BRIGHT, DARK = 1.1, 0.82      # the render's shading, top and bottom
BINS = 6      # per colour channel
EDGE = 36.0      # RGB units: difference between neighbours at which a place is on a line
STYLE_PICTURES, STYLE_SEED = 64, 70_000


def _template(thing: Thing, width: float, flip: bool) -> Tensor:
    """Coverage `[roles, SIDE, SIDE]` of a drawing in the middle of a picture, 0..1."""
    drawn = role_map(Placed(thing, 0.5, 0.5, width, flip), SIDE * SUPERSAMPLING)
    roles = torch.from_numpy(drawn).long()
    covered = F.one_hot(roles, len(ROLES)).permute(2, 0, 1).float()
    return F.avg_pool2d(covered[None], SUPERSAMPLING)[0]


def _colours(thing: Thing) -> dict[tuple[int, int, int], list[int]]:
    """Colour -> its roles in a drawing of the thing. Roles of one colour are one layer of the template."""
    by_role = (None, thing.body, thing.body, thing.second, thing.pattern_colour, thing.accessory_colour,
               (245, 240, 228), (30, 28, 34))
    layers: dict[tuple[int, int, int], list[int]] = {}
    for role, colour in enumerate(by_role):
        if colour is not None:
            layers.setdefault(colour, []).append(role)
    return layers


class _Individual:
    """Finds a drawn thing: the share of its pixels that have the right colour in the right place."""

    def __init__(self, thing: Thing) -> None:
        covered = torch.stack([_template(thing, width, flip) for width in WIDTHS for flip in (False, True)])
        layers = _colours(thing)
        masks = torch.stack([covered[:, roles].sum(1) for roles in layers.values()], dim=1)
        used = masks.sum((0, 2, 3)) > 0      # a thing without an accessory has no pixels of that colour
        self._colours = torch.tensor(list(layers), dtype=torch.float32)[used]
        masks = masks[:, used] / (1 - covered[:, EMPTY]).sum((1, 2))[:, None, None, None]
        self._spectra = torch.fft.rfft2(masks, s=(PADDED, PADDED)).conj()
        fade = torch.linspace(BRIGHT, DARK, SIDE)[:, None]
        self._expected = (self._colours[:, :, None, None] * fade).clamp(0, 255)      # [layers, 3, SIDE, 1]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Scores `[B]` of pictures `[B, 3, SIDE, SIDE]` in 0..255: 1 = every pixel is right."""
        distance = (pixels[:, None] - self._expected).square().sum(2)
        alike = torch.fft.rfft2((-distance / (2 * COLOUR_SPREAD**2)).exp(), s=(PADDED, PADDED))
        best = []
        for spectrum in alike:      # one picture at a time, because the products are large
            product = (spectrum * self._spectra).sum(1)
            best.append(torch.fft.irfft2(product, s=(PADDED, PADDED)).amax())
        return torch.stack(best).clamp(0, 1)


def _histogram(pixels: Tensor) -> Tensor:
    """Colour histograms `[B, 2 * BINS^3]` of sum 1, of places on lines and of all others.

    A colour is divided between the neighbouring bins, so that a small change of colour changes it little.

    Args:
        pixels: `[B, 3, H, W]` in 0..255.
    """
    padded = F.pad(pixels, (0, 1, 0, 1), mode="replicate")
    steps = [(neighbours - pixels).abs().sum(1)
             for neighbours in (padded[..., 1:, :-1], padded[..., :-1, 1:])]
    on_line = (torch.stack(steps).amax(0) > EDGE).long().flatten(1)
    place = pixels.flatten(2) / 255 * (BINS - 1)      # [B, 3, N]
    below = place.floor().clamp(0, BINS - 2)
    above = place - below
    histogram = pixels.new_zeros(len(pixels), 2 * BINS**3)
    for corner in range(8):
        offset = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1])[None, :, None]
        share = torch.where(offset == 1, above, 1 - above).prod(1)
        red, green, blue = (below + offset).long().unbind(1)
        histogram.scatter_add_(1, ((on_line * BINS + red) * BINS + green) * BINS + blue, share)
    return histogram / histogram.sum(1, keepdim=True)


class _Style:
    """Compares colours with those of drawings in the style: the overlap of the histograms' square roots."""

    def __init__(self, concept: SceneConcept) -> None:
        drawn = concept.pictures(STYLE_PICTURES, STYLE_SEED)
        pixels = _pixels(to_tensor([picture for picture, _ in drawn]))
        self._usual = _histogram(pixels).mean(0).sqrt()

    def __call__(self, pixels: Tensor) -> Tensor:
        return _histogram(pixels).sqrt() @ self._usual


def _pixels(images: Tensor) -> Tensor:
    """Pictures `[B, 3, H, W]` in -1..1 as `[B, 3, SIDE, SIDE]` in 0..255."""
    return (at_encoder_size(images).float().cpu().clamp(-1, 1) + 1) * 127.5


@torch.no_grad()
def matched(thing: Thing, images: Tensor) -> Tensor:
    """Share `[B]` of a thing's drawing that has the right colour, where it fits best in pictures
    `[B, 3, H, W]`."""
    return _Individual(thing)(_pixels(images))


class TemplateJudge:
    """Scores relative to those of the concept's training pictures: 1 = as good as these.

    Args:
        concepts: The definitions of the concepts.
        tasks: The same concepts with their training pictures.
    """

    def __init__(self, concepts: Sequence[SceneConcept], tasks: Sequence[Assignment]) -> None:
        self._concepts: Mapping[str, SceneConcept] = {concept.name: concept for concept in concepts}
        self._references = {task.name: task.references for task in tasks}
        self._measures: dict[str, tuple[_Individual | _Style, float]] = {}

    def _measure(self, name: str) -> tuple[_Individual | _Style, float]:
        """The concept's measure and the mean score of its training pictures."""
        if name not in self._measures:
            if name not in self._concepts:
                raise ConceptError(f"no drawing defines the concept '{name}'; known: "
                                   f"{', '.join(sorted(self._concepts))}")
            concept = self._concepts[name]
            measure = _Individual(concept.thing) if concept.thing is not None else _Style(concept)
            self._measures[name] = measure, float(measure(_pixels(self._references[name])).mean())
        return self._measures[name]

    @torch.no_grad()
    def scores(self, images: Tensor, names: Sequence[str]) -> Tensor:
        pixels, columns = _pixels(images), []
        for name in names:
            measure, usual = self._measure(name)
            columns.append(measure(pixels) / usual)
        return torch.stack(columns, dim=1)

    def among_references(self, name: str) -> float:
        return 1.0
