"""Gradients that return to the projections of the sites, for methods that observe them while training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ..model.context import Context
from ..model.deltas import DeltaKey
from ..model.processor import AttentionProcessor, HostAttention, SiteCall
from ..model.sites import Site


class GradientHook(AttentionProcessor):
    """Wraps another attention processor and reports the gradients of outputs of projections.

    Args:
        keys: the observed projections.
        inner: the processor that acts at the sites.
        report: takes what `note` takes; None for a subclass with a `note` of its own.
    """

    def __init__(self, keys: Iterable[DeltaKey], inner: AttentionProcessor,
                 report: Callable[[DeltaKey, Tensor, Tensor], None] | None = None) -> None:
        self.keys, self.inner, self._report = frozenset(keys), inner, report

    def note(self, key: DeltaKey, x: Tensor, gradient: Tensor) -> None:
        """Called once per backward pass and projection.

        Args:
            key: the projection.
            x: its input `[B, S, b]`, detached.
            gradient: the gradient of its output `[B, S, a]`.
        """
        if self._report is not None:
            self._report(key, x, gradient)

    def prepare(self, context: Context) -> None:
        self.inner.prepare(context)

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        y, key = self.inner.project(site, projection, x, y), (site.index, projection)
        if key in self.keys and torch.is_grad_enabled():
            if not y.requires_grad:      # text has no gradient of its own to hook into
                y = y + torch.zeros((), device=y.device, dtype=y.dtype, requires_grad=True)
            # runs once, with checkpointing too
            y.register_hook(partial(self.note, key, x.detach()))
        return y

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        return self.inner.attend(call, query, key, value, attention)
