"""Gradient checkpointing of a model's blocks, for every host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


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


def _checkpointed(forward: Callable, *args, **kwargs):
    """Dictionaries are copied, because a host may write the number of the next block into the same one before
    the backward pass."""
    copied = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
    return checkpoint(partial(forward, **copied), *args, use_reentrant=False)
