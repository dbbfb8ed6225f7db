"""Projections that are rows or columns of fused layers, as in Flux.

In a joint attention text and picture have projections of their own in double blocks: a site's to_q and to_out
are the picture's, its to_k and to_v the text's, as in cross-attention. In single blocks both share one layer,
so deltas of it act on the rows of both. In the picture that is where most of a style's look comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .sites import Site

Offset = tuple[int, int, int]      # dimension of the weight, first index, number of indices
Change = Callable[[Site, str, Tensor, Tensor], Tensor]      # as `AttentionProcessor.project`

_PLACES = {"to_q": 0, "to_k": 1, "to_v": 2}      # in a fused layer of queries, keys and values


def path_of(site: Site, projection: str) -> str:
    """Module path of the layer that contains a projection."""
    if site.name.startswith("single"):
        return f"{site.name}.{'linear2' if projection == 'to_out' else 'linear1'}"
    if projection == "to_out":
        return f"{site.name}.img_attn.proj"
    return f"{site.name}.{'img' if projection == 'to_q' else 'txt'}_attn.qkv"


def offset_of(site: Site, projection: str) -> Offset | None:
    """Where a projection is in the weight of its layer; None for all of it."""
    if projection == "to_out":
        return (1, 0, site.width) if site.name.startswith("single") else None
    return 0, _PLACES[projection] * site.width, site.width


@dataclass(frozen=True)
class Projection:
    """A projection of a site.

    Attributes:
        site, name: Which one.
        module: Its layer.
        offset: Where it is in the layer's weight; None for all of it.
    """

    site: Site
    name: str
    module: nn.Module
    offset: Offset | None = None


@contextmanager
def projecting(projections: Sequence[Projection], changes: Sequence[Change]) -> Iterator[None]:
    """Context manager around a call of a block, in which its projections are changed.

    Args:
        projections: Of the block.
        changes: Applied to the output of every projection, in order.
    """
    if not changes:
        yield
        return
    forwards: dict[nn.Module, Callable] = {}
    for module in dict.fromkeys(each.module for each in projections):
        own = [each for each in projections if each.module is module]
        forwards[module] = partial(projected, module.forward, own, changes)
    with running(forwards):
        yield


@contextmanager
def running(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Context manager in which modules run other functions instead of their `forward`."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own


def projected(forward: Callable[[Tensor], Tensor], projections: Sequence[Projection],
              changes: Sequence[Change], x: Tensor) -> Tensor:
    """The output of a fused layer with changed projections.

    Args:
        forward: The layer.
        projections: Those that it contains, in the order of its rows.
        changes: Applied to the output of every projection, in order.
        x: Input of the layer.
    """
    y, pieces, end = forward(x), [], 0
    for each in projections:
        dimension, start, size = each.offset or (1, 0, x.shape[-1])
        given, part = (x, y.narrow(-1, start, size)) if dimension == 0 else (x.narrow(-1, start, size), y)
        changed = part
        for change in changes:
            changed = change(each.site, each.name, given, changed)
        if dimension == 1:
            return changed
        pieces += [y[..., end:start], changed]
        end = start + size
    return torch.cat([*pieces, y[..., end:]], -1)
