"""The rows of a joint attention: only those of the picture see a concept.

The attention that the picture's rows pay to the rows of a concept's words is divided among its slots. The
rows of the text keep the host's attention; otherwise other words would read the concept. So do those of
reference pictures, which stand behind the picture's own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConceptError
from .processor import NEVER, AttentionProcessor, HostAttention, JointRows, SiteCall
from .sites import Site


def attend_picture(processor: AttentionProcessor, site: Site, query: Tensor,
                   turned: tuple[Tensor, Tensor, Tensor], rows: tuple[int, int],
                   mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Attends from the picture's rows.

    Args:
        processor: Attends from them.
        site: The block.
        query: `[B, H, L, d]`, normalised, without positions. Rows are text, picture, reference pictures.
        turned: Query and key with positions, and value, each `[B, H, L, d]`. Keys and values may have fewer
            heads; each is then read by as many neighbouring heads of the query.
        rows: First row of the picture, and the row behind its last one.
        mask: The host's attention mask; None = all rows may be read.

    Returns:
        The attended picture `[B, S, H d]`, and the mask of all other rows.
    """
    start, end = rows
    turned_query, key, value = turned[0], *(_for_heads(x, query.shape[1]) for x in turned[1:])
    for_others, for_picture = _split(_biased(processor, mask, query, start, end), start, end)
    joint = JointRows(flat(turned_query[:, :, start:end]), flat(key[:, :, start:]),
                      flat(value[:, :, start:]), for_picture)
    own, text_key, text_value = (flat(x) for x in (query[:, :, start:end], key[:, :, :start],
                                                   value[:, :, :start]))
    call = SiteCall(processor, site, own, text_key, text_value, joint=joint)
    plain = HostAttention(partial(_plain, site.heads, joint))
    return call.attend(own, text_key, text_value, plain), for_others


def without_picture(x: Tensor, rows: tuple[int, int]) -> Tensor:
    """Rows `[..., L, d]` without those of the picture; rows: as in `attend_picture`."""
    start, end = rows
    return x[..., :start, :] if end == x.shape[-2] else torch.cat([x[..., :start, :], x[..., end:, :]], -2)


def fill_bias(fills: Tensor, others: int) -> Tensor:
    """A bias on the logits `[B, 1, 1, N + others]` by which no row reads those that fill a text up.

    It holds numbers, because not all attention functions of hosts take True and False.

    Args:
        fills: `[B, N]`, see `Context.fills`.
        others: Number of rows behind the text.
    """
    bias = torch.zeros(fills.shape, device=fills.device).masked_fill(fills, NEVER)
    return F.pad(bias, (0, others))[:, None, None]


def put_together(others: Tensor, picture: Tensor, start: int) -> Tensor:
    """All attended rows `[B, L, a]`. others: without the picture; start: the picture's first row."""
    return torch.cat([others[:, :start], picture.to(others), others[:, start:]], 1)


def restarted(positions: Tensor, prompts: tuple[int, ...], dimension: int) -> Tensor:
    """Rotary positions that begin anew at every text.

    Args:
        positions: Of all rows, along the dimension.
        prompts: Numbers of rows of the texts; none or one changes nothing.
        dimension: Of the rows.
    """
    if len(prompts) < 2:
        return positions
    total = sum(prompts)
    rest = positions.narrow(dimension, total, positions.shape[dimension] - total)
    return torch.cat([*(positions.narrow(dimension, 0, count) for count in prompts), rest], dimension)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values `[B, h, L, d]`, repeated for the heads of the query."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def flat(x: Tensor) -> Tensor:
    """`[B, H, S, d]` to `[B, S, H d]`."""
    return x.transpose(1, 2).flatten(2)


def _plain(heads: int, joint: JointRows, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the picture's rows without a concept. Positions are in the query of `joint`."""
    def split(*rows: Tensor) -> Tensor:
        return torch.cat(rows, 1).unflatten(-1, (heads, -1)).transpose(1, 2)

    return flat(F.scaled_dot_product_attention(split(joint.query), split(key, joint.key),
                                               split(value, joint.value), joint.mask))


def _biased(processor: AttentionProcessor, mask: Tensor | None, query: Tensor, start: int,
            end: int) -> Tensor | None:
    """The host's attention mask, or the processor's bias instead."""
    bias = processor.joint_bias(end - start, query.shape[2] - end, query.device)
    if bias is not None and mask is not None:
        raise ConceptError("a prompt has an attention mask, and regions on this model allow none; take out "
                           "the node that made it, such as Apply Style Model")
    return mask if bias is None else bias.to(query.dtype)


def _split(mask: Tensor | None, start: int, end: int) -> tuple[Tensor | None, Tensor | None]:
    """The attention mask for all rows but those from start to end, and for these."""
    if mask is None:
        return None, None
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    mask = mask.unsqueeze(1) if mask.ndim == 3 else mask      # for all heads
    if mask.shape[-2] == 1:
        return mask, mask
    return without_picture(mask, (start, end)), mask[..., start:end, :]
