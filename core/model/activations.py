"""The memory of a training step's activations, counted from shapes.

A forward pass of the denoiser runs on PyTorch's fake tensors, which have shapes, types and devices but no
numbers. So the model's own code says what it keeps for the backward pass, on every host and for every family.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .checkpointing import blocks_run_by

T = TypeVar("T")
# Gradients that live while all activations still do: of a layer's output and of its input.
_GRADIENTS = 2
# Convolutions lay their weights out anew for the backward pass. Measured on a processor, see docs/cost.md.
_LAYOUTS = 2


@dataclass(frozen=True)
class Block:
    """Bytes of a block that gradient checkpointing recomputes.

    Attributes:
        before: What is kept when it begins.
        peak: The most that it takes beyond that while it runs.
        kept: What it keeps for the backward pass, without its output.
    """

    before: int
    peak: int
    kept: int


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward pass with its gradient.

    Attributes:
        kept: What is kept at its end.
        peak: The most that it takes while it runs.
        largest: The largest single tensor.
        convolution: The weights of the largest convolution.
        blocks: In the order in which they run.
    """

    kept: int
    peak: int
    largest: int
    convolution: int
    blocks: tuple[Block, ...]

    def bytes(self, checkpointing: bool) -> int:
        """The most that forward and backward pass take. checkpointing: whether blocks are recomputed."""
        backward = _GRADIENTS * self.largest + _LAYOUTS * self.convolution
        if not checkpointing:
            return max(self.kept, self.peak) + backward
        saved = [0, *accumulate(block.kept for block in self.blocks)]      # by the blocks before each one
        inside = [block.before - less + block.peak for block, less in zip(self.blocks, saved, strict=False)]
        return max([self.kept - saved[-1], *inside]) + backward


class _Fused(torch.autograd.Function):
    """Stands for attention in one operation, which keeps no attention matrix. Without numbers PyTorch would
    choose one that does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and len(args) >= 3:
            query, key, value = args[:3]
            if query.ndim == 4 and query.shape[:2] == key.shape[:2] and query.shape[-1] == value.shape[-1]:
                return _Fused.apply(query, key, value)
        return func(*args, **(kwargs or {}))


class _Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = self.convolution = 0
        self.blocks: list[Block] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:      # a number that nobody knows counts as 1
            return True if args[0].dtype is torch.bool else 1
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.convolution = max(self.convolution, args[1].numel() * args[1].element_size())
        if not any(argument.alias_info is not None for argument in func._schema.arguments):
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def run_block(self, forward: Callable, *args) -> Any:
        """Runs a block and notes its memory."""
        before, peak = self.live, self.peak
        self.peak = self.live
        output = forward(*args)
        given = {_place(tensor) for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        made = {_place(tensor): tensor.untyped_storage().nbytes() for tensor in tree_leaves(output)
                if isinstance(tensor, Tensor)}
        kept = self.live - before - sum(size for place, size in made.items() if place not in given)
        self.blocks.append(Block(before, self.peak - before, max(0, kept)))
        self.peak = max(peak, self.peak)
        return output


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def activations_of(encode: Callable[[], T], forward: Callable[[T], object],
                   checkpointing: Callable[[bool], AbstractContextManager]) -> Activations:
    """Counts the memory of a forward pass that a backward pass could follow.

    The weights of the model do not count, but their copies in another type do. A number that the code reads
    from a tensor counts as 1 there.

    Args:
        encode: Encodes the text. This is computed, because encoders of hosts read the numbers of tokens.
        forward: Runs the rest with the encoded text, and returns what the backward pass starts from. Tensors
            that it takes from outside stay as they are, and none of its results may be kept.
        checkpointing: The backbone's `gradient_checkpointing`.

    Raises:
        Exception: The model's code needs the numbers of a tensor, or an operation has no fake form.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    meter = _Meter()
    with meter:
        text = encode()
    with (FakeTensorMode(allow_non_fake_inputs=True), meter, _FusedAttention(), checkpointing(True),
          blocks_run_by(meter.run_block)):
        output = forward(text)
        kept = meter.live
    del output, text
    return Activations(kept, meter.peak, meter.largest, meter.convolution, tuple(meter.blocks))


def weights_of(*modules: nn.Module) -> tuple[int, str]:
    """Bytes of the weights of modules as they are loaded, and the type of most of them."""
    by_type: dict[str, int] = {}
    for module in modules:
        for weight in module.parameters():
            name = str(weight.dtype).removeprefix("torch.")
            by_type[name] = by_type.get(name, 0) + weight.numel() * weight.element_size()
    return sum(by_type.values()), max(by_type, key=lambda name: by_type[name], default="")


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors on a device may still take; None if the system does not say it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()      # Linux
        return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
