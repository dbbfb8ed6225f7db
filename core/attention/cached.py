"""Bound concepts of prompts that stay the same from step to step: what a site reads is laid out in the first step and kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.backbone import Context, HostAttention, SiteCall
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

    def prepare(self, context: Context) -> None:
        """The text is known."""

    def enter(self, call: SiteCall) -> None:
        call.reads_text = call.site.index not in self._stacks

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
        site = call.site
        if site.index not in self._stacks:
            columns = head_extension(site.heads, key, value, self.concepts.bindings(site))
            self._stacks[site.index] = Stack([Reading(key, value, columns)])
        stack = self._stacks[site.index]
        flat = (x.reshape(1, -1, x.shape[-1]) for x in (query, call.hidden))
        out, low = stack.attended(*flat, self._rows, site.heads, attention)
        if low is not None:
            call.after_out = lambda y: stack.added(low, y.reshape(1, -1, y.shape[-1])).view_as(y)
        return out.view(query.shape)
