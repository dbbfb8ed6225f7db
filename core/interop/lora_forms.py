"""The forms in which files of other programs hold the change of a weight, as exact low-rank deltas.

With W0 the base's weight `[a, b]` and s the scale:

* LoRA (Hu et al., 2021): `s up down`.
* LoHa (Hyeon-Woo et al., 2021; LyCORIS): `s (A1 B1) * (A2 B2)`, entry by entry. All products of a column of
  A1 and one of A2 are the columns of its left factor, so its rank is at most r1 r2.
* LoKr (LyCORIS): `s kron(W1, W2)`. The factors of a Kronecker product are Kronecker products of factors.
* `.diff`: the change. Custom Diffusion (Kumari et al., 2022): the new weight; W0 is subtracted.
* DoRA (Liu et al., 2024): rows or columns of `W0 + change` are scaled to given magnitudes.

Nothing is approximated. A change whose rank is not below its sides is the product with an identity matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConceptError
from ..model.deltas import LowRankDelta
from .lora_names import CUSTOM_DIFFUSION, DIFF, LOHA, LOKR, LORA

MOST_RANK = 1024
LARGEST_LAYER = 1 << 26      # entries; SDXL's largest layer is a vocabulary of almost this size
_AT_ONCE = 1 << 22           # entries of a product that is only measured
_NEEDED = {LORA: ("up", "down"), LOHA: ("w1_a", "w1_b", "w2_a", "w2_b"), DIFF: ("diff",),
           CUSTOM_DIFFUSION: ("weight",)}


@dataclass(frozen=True)
class Matrix:
    """A matrix `[a, b]`, or the product of left `[a, r]` and right `[r, b]`."""

    left: Tensor
    right: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def dense(self) -> Tensor:
        return self.left if self.right is None else self.left @ self.right

    def rows(self, start: int, count: int) -> Tensor:
        """Some rows, `[count, b]`."""
        left = self.left[start:start + count]
        return left if self.right is None else left @ self.right

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two factors; one of them is an identity matrix if there were none."""
        if self.right is not None:
            return self.left, self.right
        a, b = self.shape
        return (torch.eye(a), self.left) if a <= b else (self.left, torch.eye(b))

    def energy(self) -> float:
        """Squared Frobenius norm."""
        if self.right is None:
            return float(torch.linalg.vector_norm(self.left)) ** 2
        product = (self.left.T @ self.left).double() * (self.right @ self.right.T).double()
        return float(product.sum().clamp(min=0))


@dataclass(frozen=True)
class Change:
    """The change of one layer; second: the other matrix of LoHa and LoKr. Kernels of convolutions are
    flattened into the input side.
    """

    form: str
    first: Matrix
    second: Matrix | None = None
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), other = self.first.shape, self.second
        return (a * other.shape[0], b * other.shape[1]) if self.form == LOKR and other else (a, b)

    def energy(self) -> float:
        """Squared Frobenius norm."""
        if self.second is None:
            total = self.first.energy()
        elif self.form == LOKR:
            total = self.first.energy() * self.second.energy()
        else:
            a, b = self.shape
            rows = max(1, _AT_ONCE // b)
            total = sum(Matrix(self.first.rows(i, rows) * self.second.rows(i, rows)).energy()
                        for i in range(0, a, rows))
        return self.scale**2 * total

    def delta(self) -> LowRankDelta:
        """The change as a delta, exact up to float32's rounding."""
        if self.second is None:
            is_dense = self.first.right is None
            return full_rank(self.scale * self.first.left) if is_dense else LowRankDelta(
                *self.first.factors(), self.scale)
        (a1, b1), (a2, b2) = self.first.factors(), self.second.factors()
        is_low_rank = len(b1) * len(b2) < min(self.shape)
        if self.form == LOKR:
            if is_low_rank:
                return LowRankDelta(torch.kron(a1, a2), torch.kron(b1, b2), self.scale)
            return full_rank(self.scale * torch.kron(self.first.dense(), self.second.dense()))
        if is_low_rank:
            return LowRankDelta((a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1),
                                (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1), self.scale)
        return full_rank(self.scale * self.first.dense() * self.second.dense())


def full_rank(change: Tensor) -> LowRankDelta:
    """Any matrix `[a, b]` as a delta. Its largest entry becomes the scale, so that fp16 can hold the rest."""
    largest = float(change.abs().max()) or 1.0
    return LowRankDelta(*Matrix(change / largest).factors(), largest)


def change_of(form: str, sides: Mapping[str, Tensor], scale_of: Callable[[int | None], float],
              where: str) -> Change:
    """Reads the tensors of one layer.

    Args:
        form: LoRA, LoHa, LoKr, .diff or Custom Diffusion.
        sides: Its tensors by the names in `lora_names`.
        scale_of: The rank that alpha is divided by (None if the form has none) -> the scale.
        where: The layer, for messages.

    Raises:
        ConceptError: A tensor is missing, damaged or of the wrong shape.
    """
    missing = [side for side in _NEEDED.get(form, ()) if side not in sides]
    if missing:
        raise ConceptError(f"{where} is incomplete: its {form} has {', '.join(sorted(sides))} but no "
                           f"{', '.join(missing)}")
    if form == DIFF and sides["diff"].ndim == 1:      # of a normalisation
        sides = {"diff": sides["diff"].unsqueeze(1)}
    sides = {side: _plain(tensor, f"{where} has factors", side) for side, tensor in sides.items()}
    second, rank = None, None
    if form == LORA:
        first, rank = _product(sides["up"], sides["down"], where, sides.get("mid")), len(sides["down"])
    elif form == LOHA:
        first, second = (_product(sides[f"{w}_a"], sides[f"{w}_b"], where, sides.get(f"t{w[1]}"), True)
                         for w in ("w1", "w2"))
        if first.shape != second.shape:
            raise ConceptError(f"{where} multiplies a {_size(first.shape)} and a {_size(second.shape)} "
                               "matrix; allowed: two of one shape")
        rank = len(sides["w1_b"])
    elif form == LOKR:
        first, second = _kronecker_side(sides, "w1", where), _kronecker_side(sides, "w2", where)
        rank = next((len(sides[b]) for b in ("w2_b", "w1_b") if b.removesuffix("_b") not in sides), None)
    else:
        first = Matrix(sides["diff" if form == DIFF else "weight"].flatten(1))
    scale = scale_of(rank)
    if not abs(scale) < 1e4:      # NaN fails this comparison too
        raise ConceptError(f"{where} holds NaN, infinity or a scale of {scale:g}; allowed: finite numbers")
    change = Change(form, first, second, scale)
    _check_size(change.shape, where)
    return change


def _plain(tensor: Tensor, owner: str, side: str) -> Tensor:
    if not tensor.dtype.is_floating_point or not 2 <= tensor.ndim <= 5 or not tensor.numel():
        raise ConceptError(f"{owner} of shape {tuple(tensor.shape)} and type "
                           f"{str(tensor.dtype).removeprefix('torch.')} ({side}); allowed: two matrices of "
                           "floating-point numbers")
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise ConceptError(f"{owner.removesuffix(' has factors')} holds NaN or infinity ({side}); allowed: "
                           "finite numbers")
    return tensor


def _product(left: Tensor, right: Tensor, where: str, core: Tensor | None = None,
             is_loha: bool = False) -> Matrix:
    """left right, or their Tucker form with the core `[r, r, ...]` of a convolution."""
    if core is None:
        left, right = left.flatten(1), right.flatten(1)
        ranks = (left.shape[1], right.shape[0])
    else:      # in LyCORIS, the left factor is [r, a] beside a core tensor
        left = left.flatten(1) if is_loha else left.flatten(1).T
        right = right.flatten(1)
        ranks = (core.shape[0], core.shape[1])
    agree = ranks[0] == ranks[1] if core is None else ranks == (left.shape[0], right.shape[0])
    if not agree or max(ranks) > MOST_RANK:
        raise ConceptError(f"{where} has ranks {ranks[0]} and {ranks[1]}; allowed: the same on both sides, "
                           f"up to {MOST_RANK}")
    if core is None:
        return Matrix(left, right)
    # an untrusted file must not make large intermediate results from small tensors
    wide = right.shape[1] * core[0, 0].numel()
    _check_size((core.shape[0], wide), where)
    _check_size((left.shape[1], wide), where)
    inner = torch.einsum("ij...,jr->ir...", core, right).flatten(1)
    return Matrix(left.T.contiguous(), inner)


def _kronecker_side(sides: Mapping[str, Tensor], name: str, where: str) -> Matrix:
    if name in sides:
        return Matrix(sides[name].flatten(1))
    if f"{name}_a" not in sides or f"{name}_b" not in sides:
        raise ConceptError(f"{where} is incomplete: its LoKr has no {name}")
    core = sides.get(f"t{name[1]}")
    return _product(sides[f"{name}_a"], sides[f"{name}_b"], where, core, True)


def _check_size(shape: tuple[int, int], where: str) -> None:
    if shape[0] * shape[1] > LARGEST_LAYER:
        raise ConceptError(f"{where} has {_size(shape)} entries, more than any layer of these models; "
                           f"allowed: up to {LARGEST_LAYER}")


def _size(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def with_magnitudes(weight: Tensor, change: Tensor, magnitude: Tensor, is_peft: bool, where: str) -> Tensor:
    """The change that DoRA makes: rows or columns of `weight + change` scaled to given magnitudes, less
    weight.

    Args:
        weight, change: `[a, b]`.
        magnitude: PEFT: one per row, `[a]`. Others: `[a, 1]` or `[1, b]`.
        is_peft: PEFT divides rows by their norms in `weight + change`. The others' rows are divided by their
            norms in `weight`, as ComfyUI's loader does, and columns by those in `weight + change`.

    Raises:
        ConceptError: The magnitudes do not fit, or are not finite.
    """
    a, b = weight.shape
    magnitude = magnitude.float()
    allowed = ((a,),) if is_peft else ((a, 1), (1, b))
    if tuple(magnitude.shape) not in allowed:
        raise ConceptError(f"{where} has DoRA magnitudes of shape {tuple(magnitude.shape)}; allowed: "
                           f"{' or '.join(map(str, allowed))}")
    changed, eps = weight + change, torch.finfo(torch.float32).eps
    if is_peft:
        magnitude, norm = magnitude.unsqueeze(1), changed.norm(dim=1, keepdim=True)
    elif magnitude.shape[0] == a:
        norm = weight.norm(dim=1, keepdim=True) + eps
    else:
        norm = changed.norm(dim=0, keepdim=True) + eps
    result = changed * (magnitude / norm) - weight
    if not torch.isfinite(result).all():
        raise ConceptError(f"{where} has DoRA magnitudes that give NaN or infinity; allowed: finite numbers")
    return result


def is_complete(form: str, sides: Mapping[str, Tensor]) -> bool:
    """Whether all tensors of the form are there."""
    if form == LOKR:
        return all(w in sides or {f"{w}_a", f"{w}_b"} <= set(sides) for w in ("w1", "w2"))
    return set(_NEEDED[form]) <= set(sides)
