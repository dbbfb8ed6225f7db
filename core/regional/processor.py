"""What sites do while a picture with regions is sampled: one UNet evaluation per step, whatever the number of regions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..attention.packed import Reading, Stack
from ..attention.token_lora import TokenLora, TokenLoraProcessor, head_extension, plus, token_lora_attention
from ..errors import ConceptError
from ..model.backbone import AttentionFunction, AttentionProcessor, Backbone, Context, HostAttention, SiteCall
from ..model.deltas import Delta, Deltas
from ..model.sites import Site, grid_of
from .attention import attention_within, mixed_query, region_attention
from .cover import Cover, cover_of
from .permuted import ByRegion
from .regions import Region, region_mask, shares


class DeltaProcessor(AttentionProcessor):
    """Deltas as activations instead of folded weights: for prompts that share a batch with others."""

    def __init__(self, deltas: Deltas) -> None:
        self.deltas = deltas

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        delta = self.deltas.get((site.index, projection))
        return y if delta is None else y + delta.apply(x).to(y.dtype)


@dataclass(frozen=True)
class Part:
    """A region, or the scene: its context of two rows (negative, positive), its own deltas, and those bound to words of its context."""

    context: Context
    deltas: Deltas
    bound: Mapping[str, Deltas] = field(default_factory=dict)


class DeltaAndTokenLoraProcessor(TokenLoraProcessor):
    """Deltas as activations, and bound concepts: a part alone over the whole picture, or one model of an average."""

    def __init__(self, deltas: Deltas, bound: Mapping[str, Deltas]) -> None:
        super().__init__(bound)
        self.plain = DeltaProcessor(deltas)

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        return super().project(site, projection, x, self.plain.project(site, projection, x, y))


def reading_of(backbone: Backbone, site: Site, part: Part, length: int) -> Reading:
    """What a part reads at a site; its context is repeated up to `length` tokens (softmax does not see repetition)."""
    context = part.context if part.context.hidden.shape[2] == length else part.context.repeated(length)
    bound, plain = TokenLora(part.bound, context), DeltaProcessor(part.deltas)
    hidden = context.at(site)
    key, value = (bound.project(site, name, hidden, plain.project(site, name, hidden, backbone.project(site, name, hidden)))
                  for name in ("to_k", "to_v"))
    own = (part.deltas.get((site.index, name)) for name in ("to_q", "to_out"))
    return Reading(key, value, head_extension(site.heads, key, value, bound.bindings(site)), *own)


def readings_of(backbone: Backbone, parts: Sequence[Part]) -> dict[int, list[Reading]]:
    """Site index -> what each of the parts reads there, all of one length."""
    length = math.lcm(*(part.context.hidden.shape[2] for part in parts))
    return {site.index: [reading_of(backbone, site, part, length) for part in parts] for site in backbone.layout.sites}


class RegionProcessor(AttentionProcessor):
    """Region attention with per-region deltas, see attention.py.

    What regions read depends on text only: it is computed here, once per sampling. `rows` says for each row of the UNet's batch whether it
    is the negative (0) or the positive (1) half of guidance; `latent` is the latent's height and width; `overlap` as in regions.shares;
    `isolation`: share of the first steps in which regions do not see each other in self-attention either. What other people's attention
    adds to the scene's is added everywhere.
    """

    def __init__(self, backbone: Backbone, scene: Part, regions: Sequence[Region], parts: Sequence[Part], rows: Tensor,
                 latent: tuple[int, int], overlap: str = "average", isolation: float = 0.0) -> None:
        self.scene, self.regions, self.parts, self.rows, self.latent = scene, list(regions), list(parts), rows, latent
        self.progress, self.overlap, self.isolation = 0.0, overlap, isolation
        self.scene_concepts: TokenLora | None = None      # where the host knows better than the scene's context which words a call has
        self._scene_bound = TokenLora(scene.bound, scene.context)
        self.readings = readings_of(backbone, parts)
        self._stacks: dict[tuple, Stack] = {}
        self._covers: dict[tuple, Cover] = {}

    def masks(self, grid: tuple[int, int]) -> Tensor:
        """`[U, h, w]` or `[U, b, h, w]` for the regions that are on now, each times its strength; zeros for the others."""
        return torch.stack([region.strength * region.active(self.progress) * region_mask(region, *grid) for region in self.regions])

    def phase(self) -> tuple:
        """What the masks depend on beside the grid: they are computed once for each."""
        return tuple(region.active(self.progress) for region in self.regions)

    def cover(self, cells: int, device) -> Cover:
        """The cover of a site's grid for the regions that are on now."""
        key = (cells, self.phase())
        if key not in self._covers:
            region_share, scene_share = shares(self.masks(grid_of(cells, *self.latent)), self.overlap)
            self._covers[key] = cover_of(region_share.flatten(-2).to(device), scene_share.flatten(-2).to(device))
        return self._covers[key]

    def _stacks_of(self, site: Site, cover: Cover) -> list[Stack]:
        return [self._stack(site, group.members) for group in cover.groups]

    def _stack(self, site: Site, members: tuple[int, ...]) -> Stack:
        key = (site.index, members)
        if key not in self._stacks:
            self._stacks[key] = Stack([self.readings[site.index][u] for u in members])
        return self._stacks[key]

    def _scene_delta(self, site: Site, projection: str) -> Delta | None:
        return self.scene.deltas.get((site.index, projection))

    def enter(self, call: SiteCall) -> None:
        site, x = call.site, call.hidden
        cover = self.cover(x.shape[1], x.device)
        if not cover.is_partition:
            return
        members = [len(group.members) for group in cover.groups]
        cells = ByRegion(cover.order(len(x)), members, self._stacks_of(site, cover), len(x), cover.needs_scene)

        def attend(query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
            def scene(own: Tensor, asked: Tensor) -> tuple[Tensor, Tensor | None]:
                return self._scene(site, self._asking(site, own, asked), asked, key, value, attention)

            return cells.attend(query, self.rows, site.heads, attention, scene)

        call.reorder(cells.enter(x), attend, cells.leave)
        call.reads_text = cells.reads_text

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        if projection not in ("to_k", "to_v"):      # every region starts from the frozen query
            return y
        delta = self._scene_delta(site, projection)      # keys and values: the scene's own; the regions' are known
        y = y if delta is None else y + delta.apply(x).to(y.dtype)
        return self._concepts().project(site, projection, x, y)

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
        site, asked, cover = call.site, call.hidden, self.cover(query.shape[1], query.device)
        stacks, plain = self._stacks_of(site, cover), attention.plain
        asking = self._asking(site, query, asked)
        others = None
        if attention.replaced is not None:
            others = attention.added_by_others(mixed_query(query, asked, asking, stacks, cover), key, value)
        base, more = self._scene(site, asking, asked, key, value, plain, others) if cover.needs_scene else (None, None)
        more = None if more is None else more * cover.scene.to(more.dtype).unsqueeze(-1)
        mixed, added = region_attention(query, asked, base, stacks, cover, self.rows, site.heads, plain, others)
        added = added if more is None else more if added is None else more + added
        if added is not None:
            call.after_out = partial(plus, added)
        return mixed

    @property
    def changes_self_attention(self) -> bool:
        return self.progress < self.isolation

    def self_attention(self, site: Site, query: Tensor, key: Tensor, value: Tensor, attention: AttentionFunction) -> Tensor:
        try:
            cover = self.cover(query.shape[1], query.device)
        except ConceptError:      # another node has merged or tiled the cells: there are no regions in them
            return attention(query, key, value)
        base = attention(query, key, value) if cover.needs_scene or not cover.groups else None
        return attention_within(query, key, value, base, cover, site.heads, attention)

    def _asking(self, site: Site, query: Tensor, asked: Tensor) -> Tensor:
        """The scene's query."""
        delta = self._scene_delta(site, "to_q")
        return query if delta is None else query + delta.apply(asked).to(query.dtype)

    def _scene(self, site: Site, query: Tensor, asked: Tensor, key: Tensor, value: Tensor, plain,
               others: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The scene's attended values `[B, S, a]`, and what it adds behind to_out."""
        concepts, more = self._concepts(), None
        if concepts:
            base, more = token_lora_attention(site.heads, asked, query, key, value, concepts.bindings(site))
        else:
            base = plain(query, key, value)
        base = base if others is None else base + others
        delta = self._scene_delta(site, "to_out")
        if delta is not None:
            own = delta.apply(base)
            more = own if more is None else more + own
        return base, more

    def _concepts(self) -> TokenLora:
        return self._scene_bound[self.rows] if self.scene_concepts is None else self.scene_concepts
