"""What methods share that solve, after every task, for one set of weights that does on each concept's own
inputs what its own deltas do.

Per projection a concept i is known by rows: inputs X_i `[s, b]` that matter to it, and targets T_i = X_i
dW_i^T `[s, a]`. The fused weight is W_0 + D; W_0 is on both sides of every such problem and cancels. Nothing
of this happens inside a training step. """

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.concepts import ConceptInfo
from ..bank.prompts import Vocabulary
from ..bank.tokens import TokenGroup
from ..conditioning.encoding import encode_prompts
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.deltas import DeltaKey, LowRankDelta, concatenate
from ..model.sites import PROJECTIONS, SiteLayout
from ..model.storage import stored, stored_deltas
from .base import Outcome

# relative size below which singular values of fitted deltas are rounding, in single precision
NOISE = 1e-5
# the concept prompts of Custom Diffusion's and Mix-of-Show's released code
CONCEPT_PROMPTS = ("{}", "a photo of {}")


@dataclass(frozen=True)
class Rows:
    """inputs `[s, b]` and targets `[s, a]` of one projection."""

    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, inputs: Tensor, delta: LowRankDelta) -> Rows:
        """What a delta makes of inputs."""
        return cls(inputs, delta.apply(inputs))

    @staticmethod
    def stacked(parts: Sequence[Rows]) -> Rows:
        return Rows(torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts]))


def mark(tokens: TokenGroup, record: Mapping[DeltaKey, LowRankDelta]) -> str:
    """Eight hex digits that stand for a concept in its method's shared state: from what is stored of it, so
    that it may be renamed."""
    digest = 0
    for tensor in (*(tokens.vectors[name] for name in sorted(tokens.vectors)),
                   *(d.up for _, d in sorted(record.items())[:4])):
        digest = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), digest)
    return f"{digest:08x}"


@torch.no_grad()
def text_rows(backbone: Backbone, tokens: TokenGroup, name: str,
              prompts: Sequence[str] = CONCEPT_PROMPTS) -> list[Tensor]:
    """What keys and values read of a concept, per site `[s, b]` float32: its words and the end token after
    them, in every prompt."""
    vocabulary = Vocabulary([ConceptInfo(name, "", "", tokens.words)])
    parsed = vocabulary.parse_all([prompt.format(f"<{name}>") for prompt in prompts])
    context = encode_prompts(backbone, parsed, {name: tokens})
    places = [[*row[name], row[name][-1] + 1] for row in context.words]
    return [torch.cat([hidden[chosen] for hidden,
                       chosen in zip(context.at(site).float().cpu(), places, strict=True)])
            for site in backbone.layout.sites]


def fit(rows: Rows, ridge: float, metric: Tensor | None = None) -> LowRankDelta:
    """D = T^T (X P X^T + rho I)^-1 X P, rho = `ridge` times the mean diagonal; the smallest change that turns
    inputs into targets.

    metric: P `[b, b]` positive definite float64; None = identity, with which D minimises ||X D^T - T||^2 +
    rho ||D||^2. Otherwise the change is smallest in ||D P^-1/2||. The result has rank min(s, b), in float32;
    solved in double precision. """
    x, t = rows.inputs.double(), rows.targets.double()
    weighted = x if metric is None else x @ metric
    gram = weighted @ x.T
    rho = ridge * gram.diagonal().mean().clamp(min=1e-30)
    # the same by the push-through identity, in the smaller space
    if metric is None and len(x) > x.shape[1]:
        small = x.T @ x
        solved = torch.linalg.solve(small + rho * torch.eye(len(small), dtype=small.dtype), x.T @ t)
        return LowRankDelta(solved.T.float().contiguous(), torch.eye(x.shape[1]))
    solved = torch.linalg.solve(gram + rho * torch.eye(len(gram), dtype=gram.dtype), t)
    return LowRankDelta(solved.T.float().contiguous(), weighted.float().contiguous())


def _svd(delta: LowRankDelta) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a low-rank delta through its factors: `[a, k]`, `[k]`, `[k, b]` in double precision."""
    left, right = torch.linalg.qr(delta.up.double() * delta.scale), torch.linalg.qr(delta.down.double().T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ u, s, v @ right.Q.T


def _cut(factors: tuple[Tensor, Tensor, Tensor], rank: int) -> LowRankDelta:
    u, s, v = factors
    up, down = torch.zeros(u.shape[0], rank), torch.zeros(rank, v.shape[1])
    kept, root = min(rank, len(s)), s[:rank].sqrt()
    up[:, :kept], down[:kept] = u[:, :kept] * root, root.unsqueeze(1) * v[:kept]
    return LowRankDelta(up, down)


def compressed(deltas: Mapping[DeltaKey, LowRankDelta], dtype: torch.dtype, kept: float = 1.0,
               floors: Mapping[DeltaKey, float] | None = None) -> dict[DeltaKey, LowRankDelta]:
    """The same deltas at the smallest common rank per projection (a bank stores one rank each), factors
    balanced, in `dtype`.

    kept: share of the sum of singular values that has to remain, 1 = all that `dtype` can tell from rounding,
    relative to the largest one or to `floors` (key -> the size of what rounding comes from), whichever is
    more. """
    found, needed = {key: _svd(delta) for key, delta in deltas.items()}, dict.fromkeys(PROJECTIONS, 1)
    for key, (_, s, _) in found.items():
        floor = max(NOISE, torch.finfo(dtype).eps) * max(float(s[0]), (floors or {}).get(key, 0.0))
        rank = int((s > floor).sum())
        if kept < 1 and s.sum() > 0:
            rank = min(rank, 1 + int((s.cumsum(0) / s.sum() < kept).sum()))
        needed[key[1]] = max(needed[key[1]], rank)
    return stored_deltas({key: _cut(factors, needed[key[1]]) for key, factors in found.items()}, dtype)


def fused_record(fused: Mapping[DeltaKey, LowRankDelta], earlier: Sequence[Mapping[DeltaKey, LowRankDelta]],
                 dtype: torch.dtype) -> dict[DeltaKey, LowRankDelta]:
    """What a task adds: the fused deltas minus the sum of earlier records, so that all records together are
    the fused deltas."""
    added, floors = {}, {}
    for key, delta in fused.items():
        old = [record[key].to("cpu", torch.float32) for record in earlier if key in record]
        parts = [(1.0, delta),
                 *((-1.0, LowRankDelta(d.up.contiguous(), d.down.contiguous(), d.scale)) for d in old)]
        added[key] = concatenate(parts)
        # many records: the difference itself is the smaller form
        if added[key].up.shape[1] > min(delta.shape):
            added[key] = LowRankDelta(sum(weight * part.dense() for weight, part in parts),
                                      torch.eye(delta.shape[1]))
        floors[key] = float(_svd(delta)[1][0])
    return compressed(added, dtype, floors=floors)


def pack_rows(rows: Mapping[DeltaKey, Rows], dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows of several projections side by side, as many in each: two tensors of shared state whatever the
    number of sites."""
    found = {"inputs": stored(torch.cat([r.inputs for r in rows.values()], dim=1), dtype),
             "targets": stored(torch.cat([r.targets for r in rows.values()], dim=1), dtype)}
    if not all(torch.isfinite(tensor).all() for tensor in found.values()):
        raise ConceptError("what was learned makes NaN or infinity of the model's features, so it cannot be "
                           "fused with other concepts; lower the learning rates (lr, token_lr); the bank is "
                           "unchanged")
    return found


def unpack_rows(packed: Mapping[str, Tensor], keys: Iterable[DeltaKey],
                layout: SiteLayout) -> dict[DeltaKey, Rows]:
    """Inverse of `pack_rows`, in float32."""
    keys = list(keys)
    shapes = [layout.sites[index].shape(projection) for index, projection in keys]
    ins = packed["inputs"].float().split([b for _, b in shapes], dim=1)
    outs = packed["targets"].float().split([a for a, _ in shapes], dim=1)
    return {key: Rows(i.contiguous(), o.contiguous()) for key, i, o in zip(keys, ins, outs, strict=True)}


def fused_concepts(bank: ConceptBank, method: str) -> dict[str, Mapping[DeltaKey, LowRankDelta]]:
    """The method's concepts that its shared state knows: mark -> record. Others (of a merged bank) cannot be
    fused and stay as they are."""
    known = {name.split(".")[0] for name in bank.shared.get(method, {})}
    mine = [bank[name] for name, info in bank.infos.items() if info.method == method]
    return {owner: concept.deltas for concept in mine
            if (owner := mark(concept.tokens, concept.deltas)) in known}


def fused_outcome(bank: ConceptBank, method: str, words: TokenGroup,
                  own: Mapping[str, Mapping[DeltaKey, Rows]], solve: Callable[[Rows], LowRankDelta],
                  dtype: torch.dtype) -> Outcome:
    """Fuses what the bank's state holds of the method's present concepts with a new one, and records the
    difference.

    own: the new concept's rows in named groups of projections; solve: from all concepts' rows of one
    projection to its fused delta. State: `<mark>.<group>.inputs` and `.targets` per concept; of concepts that
    left the bank nothing is kept. """
    state, earlier = bank.shared.get(method, {}), fused_concepts(bank, method)
    shared = {name: tensor for name, tensor in state.items() if name.split(".")[0] in earlier}
    fresh, fused = {group: pack_rows(rows, dtype) for group, rows in own.items()}, {}
    for group, rows in own.items():
        kept = [{part: shared[f"{owner}.{group}.{part}"] for part in ("inputs", "targets")}
                for owner in earlier if f"{owner}.{group}.inputs" in shared]
        # rounded once, the new ones too
        every = [unpack_rows(packed, rows, bank.layout) for packed in (*kept, fresh[group])]
        fused |= {key: solve(Rows.stacked([one[key] for one in every])) for key in rows}
    record = fused_record(fused, list(earlier.values()), dtype)
    owner = mark(words, record)
    shared |= {f"{owner}.{group}.{part}": tensor for group, packed in fresh.items() for part,
               tensor in packed.items()}
    return Outcome(words, record, shared)
