"""Word-bound concepts with cached keys and values, for prompts that do not change between steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.context import Context
from ..model.processor import HostAttention, SiteCall
from .packed import KeysValues, PackedKeysValues
from .token_lora import TokenLora, TokenLoraProcessor, head_extension


class CachedTokenLora(TokenLoraProcessor):
    """`TokenLoraProcessor` with a cache, for one text and constant weights, as in one sampling. No gradients.

    From its second call on, a site reads no text and needs only two operations more than plain attention. The
    host must use a new processor when the text changes.
    """

    def __init__(self, concepts: TokenLora, rows: int, device: torch.device | str) -> None:
        super().__init__({})
        self.concepts = concepts
        self._rows = torch.arange(rows, device=device)
        self._packed: dict[int, PackedKeysValues] = {}

    def prepare(self, context: Context) -> None:
        """Does nothing, because the concepts of the text are already known."""

    def enter(self, call: SiteCall) -> None:
        call.reads_text = call.site.index not in self._packed

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        site = call.site
        if site.index not in self._packed:
            extension = head_extension(site.heads, key, value, self.concepts.adapters(site))
            self._packed[site.index] = PackedKeysValues([KeysValues(key, value, extension)])
        packed = self._packed[site.index]
        flat, hidden = (x.reshape(1, -1, x.shape[-1]) for x in (query, call.hidden))
        out, low = packed.attended(flat, hidden, self._rows, site.heads, attention)
        if low is not None:
            call.after_out = lambda y: packed.added(low, y.reshape(1, -1, y.shape[-1])).view_as(y)
        return out.view(query.shape)
