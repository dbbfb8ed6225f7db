"""Bound concepts of prompts that stay the same from step to step: what a site reads is laid out in the first step and kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.backbone import Context
from ..model.sites import Site
from .packed import Reading, Stack
from .token_lora import TokenLora, TokenLoraProcessor, head_extension


class CachedTokenLora(TokenLoraProcessor):
    """A BoundProgram for one text under weights that do not change, as within one sampling; without gradients. After its first pass over a
    site it reads no text there, and a site has two operations more than a plain one. The host says when the text is another one: by taking
    another program."""

    def __init__(self, concepts: TokenLora, rows: int, device) -> None:
        super().__init__({})
        self.concepts = concepts
        self._rows = torch.arange(rows, device=device)
        self._stacks: dict[int, Stack] = {}

    def begin(self, context: Context) -> None:
        """The text is known."""

    def enter(self, site: Site, x: Tensor) -> tuple[Tensor, bool] | None:
        return (x, False) if site.index in self._stacks else None

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        if projection == "to_out":
            low, self._more = self._more, None
            return y if low is None else self._stacks[site.index].added(low, y.reshape(1, -1, y.shape[-1])).view_as(y)
        if projection in ("to_k", "to_v") and site.index in self._stacks:
            return y      # nobody reads it
        return super().project(site, projection, x, y)

    def attend(self, site: Site, query: Tensor, key: Tensor, value: Tensor, default) -> Tensor:
        if site.index not in self._stacks:
            columns = head_extension(site.heads, key, value, self.concepts.bindings(site))
            self._stacks[site.index] = Stack([Reading(key, value, columns)])
        flat = (x.reshape(1, -1, x.shape[-1]) for x in (query, self._asked))
        out, self._more = self._stacks[site.index].attended(*flat, self._rows, site.heads, default)
        return out.view(query.shape)
