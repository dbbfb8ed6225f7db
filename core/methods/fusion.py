"""Fusion of concepts into one set of weights that does on each concept's inputs what its own deltas do.

Custom Diffusion's merge and Mix-of-Show's gradient fusion share this. Per projection, concept i is described
by rows: inputs X_i `[s, b]` and targets T_i = X_i dW_i^T `[s, a]`. The fused weight is W_0 + D; W_0 is on
both sides and cancels. Fusion runs after a task, never inside a training step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.tokens import TokenGroup
from ..conditioning.encoding import encode_concept
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.compression import compressed, svd
from ..model.deltas import DeltaKey, LowRankDelta, concatenate, only_low_rank
from ..model.least_squares import Rows
from ..model.sites import SiteLayout
from ..model.storage import stored
from .base import Outcome

CONCEPT_PROMPTS = ("{}", "a photo of {}")      # of both papers' released code
Records = Mapping[str, Mapping[DeltaKey, LowRankDelta]]      # mark of a concept -> its record


def mark(tokens: TokenGroup, record: Mapping[DeltaKey, LowRankDelta]) -> str:
    """A checksum, 8 hex digits, that identifies a concept in shared state even after it is renamed."""
    digest, ups = 0, [delta.up for _, delta in sorted(record.items())[:4]]
    for tensor in (*(tokens.vectors[name] for name in sorted(tokens.vectors)), *ups):
        digest = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), digest)
    return f"{digest:08x}"


def text_rows(backbone: Backbone, tokens: TokenGroup, name: str,
              prompts: Sequence[str] = CONCEPT_PROMPTS) -> list[Tensor]:
    """Text features of a concept's words and the end token after them, in every prompt: per site `[s, b]`."""
    context = encode_concept(backbone, name, tokens, prompts)
    places = [[*row[name], row[name][-1] + 1] for row in context.words]
    features = (context.at(site).float().cpu() for site in backbone.layout.sites)
    return [torch.cat([row[chosen] for row, chosen in zip(hidden, places, strict=True)])
            for hidden in features]


def fused_record(fused: Mapping[DeltaKey, LowRankDelta], earlier: Records,
                 dtype: torch.dtype) -> dict[DeltaKey, LowRankDelta]:
    """The record of a task: fused deltas minus all earlier records, so that the records add up to them."""
    added, floors = {}, {}
    for key, delta in fused.items():
        old = [record[key].to("cpu", torch.float32) for record in earlier.values() if key in record]
        parts = [(1.0, delta),
                 *((-1.0, LowRankDelta(d.up.contiguous(), d.down.contiguous(), d.scale)) for d in old)]
        added[key] = concatenate(parts)
        if added[key].up.shape[1] > min(delta.shape):      # many records: the dense difference is smaller
            dense = [weight * part.dense() for weight, part in parts]
            added[key] = LowRankDelta(sum(dense[1:], dense[0]), torch.eye(delta.shape[1]))
        floors[key] = float(svd(delta)[1][0])
    return compressed(added, dtype, floors=floors)


def pack_rows(rows: Mapping[DeltaKey, Rows], dtype: torch.dtype) -> dict[str, Tensor]:
    """Packs rows of several projections, equally many in each, into two tensors of shared state."""
    packed = {"inputs": stored(torch.cat([r.inputs for r in rows.values()], dim=1), dtype),
              "targets": stored(torch.cat([r.targets for r in rows.values()], dim=1), dtype)}
    if not all(torch.isfinite(tensor).all() for tensor in packed.values()):
        raise ConceptError("what was learned makes NaN or infinity of the model's features, so it cannot be "
                           "fused with other concepts; lower the learning rates (lr, token_lr); the bank is "
                           "unchanged")
    return packed


def unpack_rows(packed: Mapping[str, Tensor], keys: Iterable[DeltaKey],
                layout: SiteLayout) -> dict[DeltaKey, Rows]:
    """Inverse of `pack_rows`, in float32."""
    keys = list(keys)
    shapes = [layout.sites[index].shape(projection) for index, projection in keys]
    ins = packed["inputs"].float().split([b for _, b in shapes], dim=1)
    outs = packed["targets"].float().split([a for a, _ in shapes], dim=1)
    return {key: Rows(i.contiguous(), o.contiguous()) for key, i, o in zip(keys, ins, outs, strict=True)}


def fused_concepts(bank: ConceptBank, method: str) -> Records:
    """The method's concepts that its shared state describes; others (of a merged bank) cannot be fused."""
    described = {name.split(".")[0] for name in bank.shared.get(method, {})}
    concepts = [bank[name] for name, info in bank.infos.items() if info.method == method]
    return {owner: deltas for concept in concepts
            if (owner := mark(concept.tokens, deltas := only_low_rank(concept.deltas))) in described}


def fused_outcome(bank: ConceptBank, method: str, words: TokenGroup,
                  own: Mapping[str, Mapping[DeltaKey, Rows]], solve: Callable[[Rows], LowRankDelta],
                  dtype: torch.dtype) -> Outcome:
    """Fuses a new concept with the method's present ones and records the difference.

    Args:
        own: the new concept's rows, in named groups of projections.
        solve: maps the rows of all concepts for one projection to its fused delta.
        dtype: the bank's type; rows are rounded to it once, the new ones too.

    Returns:
        The record, and shared state `<mark>.<group>.inputs` and `.targets` of the concepts in the bank.
    """
    state, earlier = bank.shared.get(method, {}), fused_concepts(bank, method)
    shared = {name: tensor for name, tensor in state.items() if name.split(".")[0] in earlier}
    new = {group: pack_rows(rows, dtype) for group, rows in own.items()}
    fused: dict[DeltaKey, LowRankDelta] = {}
    for group, rows in own.items():
        old = [{part: shared[f"{owner}.{group}.{part}"] for part in ("inputs", "targets")}
               for owner in earlier if f"{owner}.{group}.inputs" in shared]
        concepts = [unpack_rows(packed, rows, bank.layout) for packed in (*old, new[group])]
        fused |= {key: solve(Rows.stacked([concept[key] for concept in concepts])) for key in rows}
    record = fused_record(fused, earlier, dtype)
    owner = mark(words, record)
    for group, packed in new.items():
        shared |= {f"{owner}.{group}.{part}": tensor for part, tensor in packed.items()}
    return Outcome(words, record, shared)
