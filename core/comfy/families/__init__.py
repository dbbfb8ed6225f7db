"""One file per family of models; everything else in core/comfy is blind to them."""

from __future__ import annotations

from ...errors import ConceptError
from .base import Family
from .flux import Flux
from .krea2 import Krea2
from .predict2 import Predict2
from .unet import UNet

FAMILIES: tuple[type[Family], ...] = (UNet, Predict2, Flux, Krea2)

SUPPORTED = ", ".join(family.names for family in FAMILIES)


def find_sites(model, text_widths: tuple[tuple[str, int], ...]) -> Family:
    """The sites of a MODEL. Raises ConceptError if no family knows it.

    Args:
        text_widths: Of the CLIP beside it, see `SiteLayout`.
    """
    for family in FAMILIES:
        if family.knows(model):
            return family(model, text_widths)
    raise ConceptError(f"the model's class is {type(model.model).__name__}, which is not supported; allowed: "
                       f"checkpoints of {SUPPORTED}")
