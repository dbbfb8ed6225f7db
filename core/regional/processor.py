"""The attention processor for pictures with regions: one UNet evaluation per step for any number of regions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..attention.packed import KeysValues, PackedKeysValues
from ..attention.token_lora import TokenLora, head_extension, plus, token_lora_attention, with_delta
from ..errors import ConceptError
from ..model.backbone import Projections
from ..model.context import Context
from ..model.deltas import Deltas
from ..model.processor import AttentionFunction, AttentionProcessor, HostAttention, SiteCall
from ..model.sites import Site, grid_of
from .attention import isolated_attention, mixed_query, region_attention
from .cover import Cover, cover_of
from .permuted import PermutedCells
from .regions import Region, region_mask, shares


@dataclass(frozen=True)
class Part:
    """A region, or the scene.

    Attributes:
        context: The negative and the positive prompt, two rows.
        deltas: Deltas that act on every word of this part.
        word_bound: Concept -> the deltas that act through the concept's words in the context.
    """

    context: Context
    deltas: Deltas
    word_bound: Mapping[str, Deltas] = field(default_factory=dict)


def _keys_values(backbone: Projections, site: Site, part: Part, length: int) -> KeysValues:
    """Keys and values of a part at a site. The context is repeated to `length` tokens, which does not change
    softmax attention.
    """
    context = part.context if part.context.hidden.shape[2] == length else part.context.repeated(length)
    concepts, text = TokenLora(part.word_bound, context), context.at(site)

    def projected(name: str) -> Tensor:
        return concepts.project(site, name, text,
                                with_delta(part.deltas, site, name, text, backbone.project(site, name, text)))

    key, value = backbone.normalised(site, "to_k", projected("to_k")), projected("to_v")
    query, out = part.deltas.get((site.index, "to_q")), part.deltas.get((site.index, "to_out"))
    return KeysValues(key, value, head_extension(site.heads, key, value, concepts.adapters(site)), query, out)


def keys_values_of(backbone: Projections, parts: Sequence[Part]) -> dict[int, list[KeysValues]]:
    """Site index -> keys and values of each part, all of one length."""
    length = math.lcm(*(part.context.hidden.shape[2] for part in parts))
    return {site.index: [_keys_values(backbone, site, part, length) for part in parts]
            for site in backbone.layout.sites}


class RegionProcessor(AttentionProcessor):
    """Region attention with every region's own deltas, see attention.py.

    The regions' keys and values depend on the text alone, so they are computed once per sampling. The output
    that other nodes' attention adds to the scene is added everywhere.

    Args:
        backbone: Provides the frozen projections.
        scene: The prompt of the whole picture.
        regions: Where and when each part acts.
        parts: One per region.
        rows: `[B]`, the half of guidance of each row of the UNet's batch: 0 negative, 1 positive.
        latent: Height and width of the latent.
        overlap: As in `regions.shares`.
        isolation: Share of the first steps with self-attention isolation between regions.

    Attributes:
        progress: Share of the completed steps; the caller sets it before every step.
        scene_concepts: The scene's word-bound concepts in the present call, if the host provides them; else
            the context's words are used.
    """

    def __init__(self, backbone: Projections, scene: Part, regions: Sequence[Region], parts: Sequence[Part],
                 rows: Tensor, latent: tuple[int, int], overlap: str = "average",
                 isolation: float = 0.0) -> None:
        self.scene, self.regions, self.parts = scene, list(regions), list(parts)
        self.rows, self.latent = rows, latent
        self.progress, self.overlap, self.isolation = 0.0, overlap, isolation
        self.scene_concepts: TokenLora | None = None
        self._concepts_of_context = TokenLora(scene.word_bound, scene.context)
        self._backbone = backbone
        self.read_again()
        self._covers: dict[tuple, Cover] = {}

    def read_again(self) -> None:
        """Computes the regions' keys and values anew, for a host that has changed its weights."""
        self.keys_values = keys_values_of(self._backbone, self.parts)
        self._packed: dict[tuple, PackedKeysValues] = {}

    def masks(self, grid: tuple[int, int]) -> Tensor:
        """`[U, h, w]` or `[U, b, h, w]` of the active regions, times their strengths; zeros for the others.
        """
        if not self.regions:
            return torch.zeros(0, *grid)
        return torch.stack([region.strength * region.active(self.progress) * region_mask(region, *grid)
                            for region in self.regions])

    def phase(self) -> tuple:
        """Key of the set of active regions. Masks are cached per grid and phase."""
        return tuple(region.active(self.progress) for region in self.regions)

    def cover(self, cells: int, device: torch.device) -> Cover:
        """The cover of a site's grid for the active regions."""
        key = (cells, self.phase())
        if key not in self._covers:
            region_share, scene_share = shares(self.masks(grid_of(cells, *self.latent)), self.overlap)
            self._covers[key] = cover_of(region_share.flatten(-2).to(device),
                                         scene_share.flatten(-2).to(device))
        return self._covers[key]

    def packed(self, site: Site, members: tuple[int, ...]) -> PackedKeysValues:
        """Packed keys and values of the regions with these numbers at a site."""
        key = (site.index, members)
        if key not in self._packed:
            self._packed[key] = PackedKeysValues([self.keys_values[site.index][u] for u in members],
                                                 partial(self._backbone.normalised, site, "to_q"))
        return self._packed[key]

    def enter(self, call: SiteCall) -> None:
        site, cover = call.site, self.cover(call.hidden.shape[1], call.hidden.device)
        if not cover.is_partition:
            return
        packed = [self.packed(site, group.members) for group in cover.groups]
        members = [len(group.members) for group in cover.groups]
        cells = PermutedCells(cover.order(len(call.hidden)), members, packed, call.hidden)

        def attend(query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
            def scene(own_query: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
                own_query = self._scene_query(site, hidden, own_query)
                return self._scene(site, own_query, hidden, key, value, attention)

            return cells.attend(query, self.rows, site.heads, attention,
                                scene if cover.needs_scene else None)

        call.reorder(cells.hidden, attend, cells.restore)
        call.reads_text = cover.needs_scene

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        if projection not in ("to_k", "to_v"):      # regions add their deltas to the frozen query
            return y
        return self._concepts().project(site, projection, x,
                                        with_delta(self.scene.deltas, site, projection, x, y))

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        site, hidden, plain = call.site, call.hidden, attention.plain
        cover = self.cover(query.shape[1], query.device)
        packed = [self.packed(site, group.members) for group in cover.groups]
        query = call.before_norm(query)
        scene_query = self._scene_query(site, hidden, query)
        others = base = added = None
        if attention.replaced is not None:
            asked = mixed_query(query, hidden, scene_query, packed, cover)
            others = attention.added_by_others(asked, key, value)
        if cover.needs_scene:
            base, added = self._scene(site, scene_query, hidden, key, value, plain, others)
            added = None if added is None else added * cover.scene.to(added.dtype).unsqueeze(-1)
        mixed, region_added = region_attention(query, hidden, base, packed, cover, self.rows, site.heads,
                                               plain, others)
        added = region_added if added is None else added if region_added is None else region_added + added
        if added is not None:
            call.after_out = partial(plus, added)
        return mixed

    @property
    def changes_self_attention(self) -> bool:
        return self.progress < self.isolation

    def self_attention(self, site: Site, query: Tensor, key: Tensor, value: Tensor,
                       attention: AttentionFunction) -> Tensor:
        try:
            cover = self.cover(query.shape[1], query.device)
        # another node has merged or tiled the cells, so regions cannot be located
        except ConceptError:
            return attention(query, key, value)
        return isolated_attention(query, key, value, cover, site.heads, attention)

    def _scene_query(self, site: Site, hidden: Tensor, query: Tensor) -> Tensor:
        """The scene's query behind the norm, from the frozen one before it: hidden `[B, S, b]`, query
        `[B, S, a]`.
        """
        query = with_delta(self.scene.deltas, site, "to_q", hidden, query)
        return self._backbone.normalised(site, "to_q", query)

    def _scene(self, site: Site, query: Tensor, hidden: Tensor, key: Tensor, value: Tensor,
               attention: AttentionFunction,
               others: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The scene's attended values `[B, S, a]`, and its addition after to_out (None for none)."""
        concepts, added = self._concepts(), None
        if concepts:
            base, added = token_lora_attention(site.heads, hidden, query, key, value, concepts.adapters(site))
        else:
            base = attention(query, key, value)
        base = base if others is None else base + others
        delta = self.scene.deltas.get((site.index, "to_out"))
        if delta is not None:
            from_delta = delta.apply(base)
            added = from_delta if added is None else added + from_delta
        return base, added

    def _concepts(self) -> TokenLora:
        return self._concepts_of_context[self.rows] if self.scene_concepts is None else self.scene_concepts
