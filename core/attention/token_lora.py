"""Word-bound deltas: a concept's deltas act only through the concept's own words. This is our own method.

At a site with frozen projections, a text position n that belongs to concept i has its own query, key, value
and output maps:

    logit(x, n) = ((W_q + dQ_i) x) . ((W_k + dK_i) c_n)        value(n) = (W_out + dO_i) (W_v + dV_i) c_n

Every other position has the frozen maps. A prompt without the concept therefore gives the base's output bit
for bit, and two concepts in one prompt share no weights. They interact only in the softmax.

One attention call computes this. dQ_i = U D is low rank, so `dQ_i x . k = (D x) . (U^T k)`: the query is
extended by D x and the keys of the concept's words by U^T k. The values of its words are extended by D_o v.
The attended columns of this extension, times U_o, are added after to_out. With rank r and K concepts, a head
of width d becomes r K wider.

Some models normalise queries and keys per head. There dK acts before the norm, as a folded delta does, and dQ
acts behind it: dQ_i x is added to the normalised query. The norm of a query is one for all words, so a delta
before it would need a second query for every concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptError
from ..model.context import Context
from ..model.deltas import Delta, Deltas, LowRankDelta
from ..model.processor import AttentionProcessor, HostAttention, JointRows, SiteCall
from ..model.sites import Site
from ..model.slots import SLOTS, SlotDelta, of_one_length, with_slots

# The attention of a whole picture must run in a kernel that keeps no matrix of weights. Such kernels take
# queries, keys and values of one width, a multiple of this.
_ALIGNED = 8


def word_mask(context: Context, name: str) -> Tensor:
    """`[B, N]` float: the concept's strength where a token is one of its words, 1 by default; else 0."""
    mask = torch.zeros(len(context), context.hidden.shape[2])
    for row, words in enumerate(context.words):
        strengths = context.strengths[row].get(name) if context.strengths else None
        mask[row, list(words.get(name, ()))] = 1.0 if strengths is None else torch.tensor(strengths)
    return mask.to(context.hidden.device)


@dataclass(frozen=True)
class TokenAdapter:
    """A word-bound concept at one site.

    Attributes:
        mask: `[B, N]`, its strength at its words, see `word_mask`.
        query: Its delta of to_q, or None.
        out: Its delta of to_out, or None.
        slots: Its slots, or None.
    """

    mask: Tensor
    query: LowRankDelta | None
    out: LowRankDelta | None
    slots: SlotDelta | None = None


@dataclass(frozen=True)
class HeadExtension:
    """Extension of a site's heads by word-bound concepts, with the ranks of all concepts concatenated.

    Attributes:
        query_down: `[x, b]`, maps the input of to_q to the extension of the query, the same for every head.
        key: `[B, N, H, x]`, the extension of the keys. None, like `query_down`, if no concept has a delta of
            to_q.
        value: `[B, N, H, p]`, the extension of the values.
        out_up: `[a, p]`, maps the attended extension, summed over heads, to the addition after to_out. None,
            like `value`, if no concept has a delta of to_out.
        mass: `[B, N, C]`, the masks of the C concepts with slots. Attended like a value, they give the
            attention that is paid to the concepts' words. None for C = 0.
        slots: The slots of these concepts.
    """

    query_down: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    out_up: Tensor | None = None
    mass: Tensor | None = None
    slots: tuple[SlotDelta, ...] = ()

    def columns(self, heads: int) -> Tensor | None:
        """The extension of the values and the masks, `[B, N, H, p + C]`; None for no columns."""
        mass = None if self.mass is None else self.mass.unsqueeze(2).expand(-1, -1, heads, -1)
        parts = [part for part in (self.value, mass) if part is not None]
        return torch.cat(parts, -1) if parts else None


def head_extension(heads: int, key: Tensor, value: Tensor, adapters: Sequence[TokenAdapter]) -> HeadExtension:
    """Head extension for key and value `[B, N, a]`, which already contain the concepts' dK and dV."""
    k, v = (x.unflatten(-1, (heads, -1)) for x in (key, value))
    downs, keys, values, ups, masses = [], [], [], [], []
    for adapter in adapters:
        mask = adapter.mask.to(k)[:, :, None, None]
        if adapter.slots is not None:
            masses.append(mask[..., 0])
        if adapter.query is not None:
            up = adapter.query.up.to(k).unflatten(0, (heads, -1))
            downs.append(adapter.query.scale * adapter.query.down)
            keys.append(torch.einsum("bnhd,hdr->bnhr", k, up) * mask)
        if adapter.out is not None:
            down = adapter.out.down.to(v).unflatten(1, (heads, -1))
            values.append(torch.einsum("bnhd,rhd->bnhr", v, down) * mask)
            ups.append(adapter.out.scale * adapter.out.up)
    columns = ((downs, 0), (keys, -1), (values, -1), (ups, 1), (masses, -1))
    down, extended_key, extended_value, up, mass = (torch.cat(parts, dim) if parts else None
                                                    for parts, dim in columns)
    slots = tuple(adapter.slots for adapter in adapters if adapter.slots is not None)
    return HeadExtension(down, extended_key, extended_value, up, mass, slots)


def extended_heads(heads: int, x: Tensor, extension: Tensor | None) -> Tensor:
    """Concatenates keys or values `[..., N, a]` and their extension `[..., N, H, p]` (or None) to heads
    `[..., H, N, d + p]`.
    """
    split = x.unflatten(-1, (heads, -1))
    return (split if extension is None else torch.cat([split, extension.to(split)], -1)).transpose(-3, -2)


def extended_attention(heads: int, query: Tensor, key: Tensor, value: Tensor,
                       query_extension: Tensor | None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of extended heads.

    Args:
        heads: H.
        query: `[B, S, a]`.
        key, value: `[B, H, N, d + x]` and `[B, H, N, d + p]`, see `extended_heads`.
        query_extension: `[B, S, x]`, the same for every head, or None.
        mask: As in `JointRows`.

    Returns:
        The attended values `[B, S, a]`, and the attended extension `[B, S, H, p]`, with p = 0 if values have
        no extension.
    """
    q = query.unflatten(-1, (heads, -1))      # [B, S, H, d]
    width = q.shape[-1]
    if query_extension is not None:
        q = torch.cat([q, query_extension.to(q).unsqueeze(2).expand(-1, -1, heads, -1)], dim=-1)
    if key.shape[-1] > q.shape[-1]:      # keys that were filled up
        q = F.pad(q, (0, key.shape[-1] - q.shape[-1]))
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), key, value, mask, scale=width**-0.5)
    attended = attended.transpose(1, 2)
    return attended[..., :width].flatten(2), attended[..., width:]


def token_lora_attention(heads: int, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor,
                         adapters: Sequence[TokenAdapter],
                         joint: JointRows | None = None) -> tuple[Tensor, Tensor | None]:
    """Attention with word-bound concepts.

    Args:
        heads: Number of heads of the site.
        hidden: Input of to_q, `[B, S, b]`.
        query: Output of the frozen to_q, `[B, S, a]`.
        key, value: `[B, N, a]`, with the concepts' dK and dV at their words.
        adapters: The concepts.
        joint: The picture's rows in a joint attention, which belong to no concept.

    Returns:
        The attended values `[B, S, a]`, the input of the frozen to_out, and the addition after to_out `[B, S,
        a]` (None for none).
    """
    extension = head_extension(heads, key, value, adapters)
    longer = None if extension.query_down is None else F.linear(hidden, extension.query_down.to(hidden))
    keys = extended_heads(heads, key, extension.key)
    values = extended_heads(heads, value, extension.columns(heads))
    if joint is None:
        attended, columns = extended_attention(heads, query, keys, values, longer)
    else:
        added = values.shape[-1] - value.shape[-1] // heads
        width = -(-max(keys.shape[-1], values.shape[-1]) // _ALIGNED) * _ALIGNED
        keys, values = (torch.cat([F.pad(text, (0, width - text.shape[-1])), _heads(heads, rows, width)], 2)
                        for text, rows in ((keys, joint.key), (values, joint.value)))
        attended, columns = extended_attention(heads, joint.query, keys, values, longer, joint.mask)
        columns = columns[..., :added]
    if extension.slots:
        mass = columns[..., columns.shape[-1] - len(extension.slots):]
        attended = with_slots(heads, attended, query, mass, *of_one_length(extension.slots))
    if extension.out_up is None:
        return attended, None
    low = columns[..., :extension.out_up.shape[1]].sum(2)
    return attended, F.linear(low, extension.out_up.to(low))


def _heads(heads: int, x: Tensor, width: int) -> Tensor:
    """Keys or values `[B, S, a]` as heads `[B, H, S, width]`, filled up with zeros."""
    split = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.pad(split, (0, width - split.shape[-1]))


class TokenLora:
    """The word-bound concepts of one encoded batch.

    Attributes:
        masks: Concept -> `[B, N]`, see `word_mask`, for the concepts whose words are in some row of the
            batch.
        deltas: Concept -> its deltas; low rank on to_q and to_out.
    """

    def __init__(self, deltas: Mapping[str, Deltas], context: Context) -> None:
        # sorted, so that sums do not depend on the order in which concepts were learned
        masks = {name: word_mask(context, name) for name in sorted(deltas)}
        self.masks = {name: mask for name, mask in masks.items() if bool(mask.any())}
        self.deltas = {name: deltas[name] for name in self.masks}

    @classmethod
    def at(cls, masks: Mapping[str, Tensor], deltas: Mapping[str, Deltas]) -> TokenLora:
        """Builds it from given masks `[B, N]` per concept."""
        concepts = cls.__new__(cls)
        concepts.masks, concepts.deltas = dict(sorted(masks.items())), {name: deltas[name] for name in masks}
        return concepts

    def __bool__(self) -> bool:
        return bool(self.masks)

    def __getitem__(self, rows: Tensor) -> TokenLora:
        """The same concepts for other rows `[B]` of the batch."""
        return self.at({name: mask[rows] for name, mask in self.masks.items()}, self.deltas)

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        """Adds the concepts' deltas to keys or values y `[B, N, a]` of a text x `[B, N, D]`, at the concepts'
        words.
        """
        for name, mask in self.masks.items():
            delta = self.deltas[name].get((site.index, projection))
            if delta is not None:
                y = y + (delta.apply(x) * mask.unsqueeze(-1).to(x)).to(y.dtype)
        return y

    def adapters(self, site: Site) -> list[TokenAdapter]:
        """The concepts at a site. Raises ConceptError if one has a sparse delta of to_q or to_out."""
        return [TokenAdapter(mask, self._low_rank(name, site, "to_q"), self._low_rank(name, site, "to_out"),
                             self._slots(name, site))
                for name, mask in self.masks.items()]

    def _slots(self, name: str, site: Site) -> SlotDelta | None:
        delta = self.deltas[name].get((site.index, SLOTS))
        return delta if isinstance(delta, SlotDelta) else None

    def _low_rank(self, name: str, site: Site, projection: str) -> LowRankDelta | None:
        delta: Delta | None = self.deltas[name].get((site.index, projection))
        if delta is None or isinstance(delta, LowRankDelta):
            return delta
        raise ConceptError(f"concept '{name}' has a sparse delta on to_q or to_out of site {site.index}; "
                           "allowed there: low rank")


class TokenLoraProcessor(AttentionProcessor):
    """Applies word-bound concepts, and deltas that act on every word, in training and in sampling without
    regions.

    Args:
        word_bound: Concept -> the deltas that act through its words.
        deltas: Deltas that act on every word, added as activations instead of folded into the weights. This
            allows prompts with different deltas in one batch.
    """

    def __init__(self, word_bound: Mapping[str, Deltas], deltas: Deltas | None = None) -> None:
        self.word_bound, self.deltas = word_bound, deltas or {}
        self.concepts = TokenLora.at({}, {})

    def prepare(self, context: Context) -> None:
        self.concepts = TokenLora(self.word_bound, context)

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        y = with_delta(self.deltas, site, projection, x, y)
        return self.concepts.project(site, projection, x, y) if projection in ("to_k", "to_v") else y

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        if not self.concepts:
            return attention(query, key, value)
        adapters = self.concepts.adapters(call.site)
        attended, added = token_lora_attention(call.site.heads, call.hidden, query, key, value, adapters,
                                               call.joint)
        if added is not None:
            call.after_out = partial(plus, added)
        others = attention.added_by_others(query, key, value)
        return attended if others is None else attended + others


def with_delta(deltas: Deltas, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
    """Adds the delta of a projection, if there is one, to the projection's output: x `[B, S, b]`, y `[B, S,
    a]`.
    """
    delta = deltas.get((site.index, projection))
    return y if delta is None else plus(delta.apply(x), y)


def plus(added: Tensor, y: Tensor) -> Tensor:
    """`y + added` in the type of y."""
    return y + added.to(y.dtype)
