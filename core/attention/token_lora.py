"""Word-bound deltas: a concept's deltas act through the concept's own words and nowhere else. Ours.

At a site with frozen projections, a text position n that belongs to concept i has query, key, value and output maps of its own:

    logit(x, n) = ((W_q + dQ_i) x) . ((W_k + dK_i) c_n)        value(n) = (W_out + dO_i) (W_v + dV_i) c_n

Every other position has the frozen ones. So a prompt without the concept is the base's, bit for bit, and two concepts in one prompt have
no weights in common: they meet in the softmax only. It is one attention call: dQ_i is low rank, `dQ_i x . k = (D x) . (U^T k)`, so the
query is made longer by D x and the keys of the concept's words by U^T k; the values of its words are made longer by D_o v, and what comes
out of these columns, times U_o, is added after to_out. With rank r and K concepts a head of width d is r K wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptError
from ..model.backbone import AttentionProcessor, Context, HostAttention, SiteCall
from ..model.deltas import Delta, Deltas, LowRankDelta
from ..model.sites import Site


def own_positions(context: Context, name: str) -> Tensor:
    """`[B, N]` float: 1 where a token is one of the concept's words."""
    found = torch.zeros(len(context), context.hidden.shape[2])
    for row, words in enumerate(context.words):
        found[row, list(words.get(name, ()))] = 1.0
    return found.to(context.hidden.device)


@dataclass(frozen=True)
class TokenAdapter:
    """A concept at a site: `own [B, N]`, 1 at its words, and its deltas of to_q and to_out, None where it has none."""

    own: Tensor
    query: LowRankDelta | None
    out: LowRankDelta | None


@dataclass(frozen=True)
class HeadExtension:
    """What bound concepts add to attention at a site, ranks side by side; each pair is None where no concept has such a delta.

    asks `[x, b]`: makes the query of an input `[..., b]` longer, the same for every head; key `[B, N, H, x]`: so much longer are the keys;
    value `[B, N, H, p]`: the values; behind `[a, p]`: from these columns, summed over heads, to what is added after to_out.
    """

    asks: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    behind: Tensor | None = None


def head_extension(heads: int, key: Tensor, value: Tensor, bindings: Sequence[TokenAdapter]) -> HeadExtension:
    """key, value `[B, N, a]`, the concepts' dK and dV in them already."""
    k, v = (x.unflatten(-1, (heads, -1)) for x in (key, value))
    asks, keys, values, behind = [], [], [], []
    for one in bindings:
        own = one.own.to(k)[:, :, None, None]
        if one.query is not None:
            asks.append(one.query.scale * one.query.down)
            keys.append(torch.einsum("bnhd,hdr->bnhr", k, one.query.up.to(k).unflatten(0, (heads, -1))) * own)
        if one.out is not None:
            values.append(torch.einsum("bnhd,rhd->bnhr", v, one.out.down.to(v).unflatten(1, (heads, -1))) * own)
            behind.append(one.out.scale * one.out.up)
    return HeadExtension(*(torch.cat(parts, dim) if parts else None for parts, dim in ((asks, 0), (keys, -1), (values, -1), (behind, 1))))


def longer_attention(heads: int, query: Tensor, key: Tensor, value: Tensor, longer: Tensor | None, key_more: Tensor | None,
                     value_more: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Attention of wider heads: query `[B, S, a]` and longer `[B, S, x]`, the same for every head; key, value `[B, N, a]`, key_more
    `[B, N, H, x]`, value_more `[B, N, H, p]`. Returns `[B, S, a]`, and what came through the further values, over all heads `[B, S, p]`."""
    return attend_longer(heads, query, with_columns(heads, key, key_more), with_columns(heads, value, value_more), longer)


def with_columns(heads: int, x: Tensor, more: Tensor | None) -> Tensor:
    """Keys or values `[..., N, a]`, and `[..., N, H, p]` or None, as heads `[..., H, N, d + p]`."""
    split = x.unflatten(-1, (heads, -1))
    return (split if more is None else torch.cat([split, more.to(split)], -1)).transpose(-3, -2)


def attend_longer(heads: int, query: Tensor, key: Tensor, value: Tensor, longer: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As `longer_attention`, of heads with their columns: key `[B, H, N, d + x]`, value `[B, H, N, d + p]`."""
    q = query.unflatten(-1, (heads, -1))      # [B, S, H, d]
    width = q.shape[-1]
    if longer is not None:
        q = torch.cat([q, longer.to(q).unsqueeze(2).expand(-1, -1, heads, -1)], dim=-1)
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), key, value, scale=width**-0.5).transpose(1, 2)
    return attended[..., :width].flatten(2), attended[..., width:].sum(2) if attended.shape[-1] > width else None


def token_lora_attention(heads: int, asked: Tensor, query: Tensor, key: Tensor, value: Tensor,
                    bindings: Sequence[TokenAdapter]) -> tuple[Tensor, Tensor | None]:
    """Attention with bound concepts.

    asked `[B, S, b]`: what to_q read; query `[B, S, a]`; key, value `[B, N, a]`, the bound concepts' dK and dV in them already. Returns the
    attended values `[B, S, a]`, which go through the frozen to_out, and what is to be added behind it `[B, S, a]` (None: nothing).
    """
    columns = head_extension(heads, key, value, bindings)
    longer = None if columns.asks is None else F.linear(asked, columns.asks.to(asked))
    attended, low = longer_attention(heads, query, key, value, longer, columns.key, columns.value)
    return attended, None if low is None else F.linear(low, columns.behind.to(low))


class TokenLora:
    """Bound concepts of one encoded batch. deltas: concept -> its deltas, low rank on to_q and to_out."""

    def __init__(self, deltas: Mapping[str, Deltas], context: Context) -> None:
        masks = {name: own_positions(context, name) for name in sorted(deltas)}      # sums in one order, whoever learned first
        self.own = {name: mask for name, mask in masks.items() if bool(mask.any())}
        self.deltas = {name: deltas[name] for name in self.own}

    @classmethod
    def at(cls, own: Mapping[str, Tensor], deltas: Mapping[str, Deltas]) -> TokenLora:
        """With positions `[B, N]` per concept that are known already."""
        found = cls.__new__(cls)
        found.own, found.deltas = dict(sorted(own.items())), {name: deltas[name] for name in own}
        return found

    def __bool__(self) -> bool:
        return bool(self.own)

    def __getitem__(self, rows: Tensor) -> TokenLora:
        """The same concepts for other rows `[B]` of the batch."""
        return self.at({name: own[rows] for name, own in self.own.items()}, self.deltas)

    def _get(self, name: str, site: Site, projection: str) -> Delta | None:
        return self.deltas[name].get((site.index, projection))

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        """Keys or values `[B, N, a]` of a context x, with the concepts' own at their words."""
        for name, own in self.own.items():
            delta = self._get(name, site, projection)
            if delta is not None:
                y = y + (delta.apply(x) * own.unsqueeze(-1).to(x)).to(y.dtype)
        return y

    def bindings(self, site: Site) -> list[TokenAdapter]:
        found = [TokenAdapter(own, self._get(name, site, "to_q"), self._get(name, site, "to_out")) for name, own in self.own.items()]
        for name, one in zip(self.own, found, strict=True):
            if not all(delta is None or isinstance(delta, LowRankDelta) for delta in (one.query, one.out)):
                raise ConceptError(f"concept '{name}' has a sparse delta on to_q or to_out of site {site.index}; allowed there: low rank")
        return found


class TokenLoraProcessor(AttentionProcessor):
    """Bound concepts while training, or in prompts without regions. deltas: concept -> its deltas."""

    def __init__(self, deltas: Mapping[str, Deltas]) -> None:
        self.deltas = deltas
        self.concepts: TokenLora | None = None

    def prepare(self, context: Context) -> None:
        self.concepts = TokenLora(self.deltas, context)

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        return self.concepts.project(site, projection, x, y) if projection in ("to_k", "to_v") else y

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
        if not self.concepts:
            return attention(query, key, value)
        attended, added = token_lora_attention(call.site.heads, call.hidden, query, key, value, self.concepts.bindings(call.site))
        if added is not None:
            call.after_out = partial(plus, added)
        others = attention.added_by_others(query, key, value)
        return attended if others is None else attended + others


def plus(added: Tensor, y: Tensor) -> Tensor:
    """y with what a processor adds to it, in the type of y."""
    return y + added.to(y.dtype)
