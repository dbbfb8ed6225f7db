"""Gradient checkpointing of a model's blocks, for every host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Any]      # a block's forward function and its arguments -> the block's output

_recompute: Run = partial(checkpoint, use_reentrant=False)
_run: ContextVar[Run | None] = ContextVar("_run", default=None)      # None = _recompute


@contextmanager
def recomputed(model: nn.Module, kinds: Collection[str]) -> Iterator[None]:
    """Context manager in which blocks of the given classes recompute their activations in the backward pass.

    Args:
        model: The module that contains the blocks.
        kinds: Class names of the blocks to checkpoint. If the model has none of them, nothing changes.
    """
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    before = [block.__dict__.get("forward") for block in blocks]      # a host may run blocks through its own
    try:
        for block in blocks:
            block.__dict__["forward"] = partial(_checkpointed, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


@contextmanager
def blocks_run_by(run: Run) -> Iterator[None]:
    """Context manager in which `run` calls the blocks that gradient checkpointing would recompute, so that
    their memory can be measured."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def _checkpointed(forward: Callable, *args, **kwargs):
    """Dictionaries are copied, because a host may write the number of the next block into the same one before
    the backward pass."""
    copied = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
    return (_run.get() or _recompute)(partial(forward, **copied), *args)
