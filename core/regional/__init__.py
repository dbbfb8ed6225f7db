"""Several concepts in one picture: regions, region attention, region noise estimation. Independent of any
host."""

from .regions import Region, box_mask, masks_of

__all__ = ["Region", "box_mask", "masks_of"]
