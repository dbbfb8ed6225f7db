"""Attention processors, which say what sites do beside their frozen weights, and the calls of sites.

Letters in shapes: B rows of a batch, N tokens, D context width, S cells of a site's grid, a and b output and
input width of a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .context import Context
from .sites import Site


class AttentionFunction(Protocol):
    """Multi-head attention, with the heads side by side in the last dimension."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """query `[B, S, a]`, key and value `[B, N, a]` to `[B, S, a]`."""


@dataclass(frozen=True)
class HostAttention:
    """The host's attention at one site.

    Attributes:
        plain: The attention without other nodes' code.
        replaced: What other nodes run in its place, such as an image prompt adapter; None where there is no
            such code.
    """

    plain: AttentionFunction
    replaced: AttentionFunction | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention with other nodes' code."""
        return self.plain(query, key, value) if self.replaced is None else self.replaced(query, key, value)

    def added_by_others(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """What other nodes' code adds to plain attention, `[B, S, a]`; None where there is no such code."""
        if self.replaced is None:
            return None
        return self.replaced(query, key, value) - self.plain(query, key, value)


@dataclass
class SiteCall:
    """One call of one site. It holds everything that one step of the call hands to a later one.

    Every host runs the same steps around its own frozen projections:

        call.enter()      # only where no other code sees what lies between to_q and to_out
        q = call.project("to_q", to_q(call.hidden))
        k = call.project("to_k", to_k(call.key_text))
        v = call.project("to_v", to_v(call.value_text))
        y = call.finish(to_out(call.attend(q, k, v, attention)))

    Attributes:
        processor: What the site does beside its frozen weights.
        site: The site that is called.
        hidden: What to_q reads, `[B, S, b]`; `enter` may replace it.
        key_text, value_text: What to_k and to_v read, `[B, N, D]`. They differ only where another node
            changed one of them.
        reads_text: False where `enter` found that no key or value will be read. The host may then project an
            empty text.
        after_out: What is done with the output of to_out; None for nothing.
    """

    processor: AttentionProcessor
    site: Site
    hidden: Tensor
    key_text: Tensor
    value_text: Tensor
    reads_text: bool = True
    after_out: Callable[[Tensor], Tensor] | None = None
    _attend_reordered: Callable[[Tensor, Tensor, Tensor, HostAttention], Tensor] | None = None
    _attended: Tensor | None = None

    def enter(self) -> None:
        """Lets the processor reorder the cells, or skip the text."""
        self.processor.enter(self)

    def reorder(self, hidden: Tensor, attend: Callable[[Tensor, Tensor, Tensor, HostAttention], Tensor],
                restore: Callable[[Tensor], Tensor]) -> None:
        """For `AttentionProcessor.enter`: runs this call on cells in another order.

        Args:
            hidden: What to_q reads instead, `[B', S', b]`.
            attend: Takes the place of `AttentionProcessor.attend` in this call.
            restore: Brings the output of to_out, `[B', S', a]`, back to `[B, S, a]`.
        """
        self.hidden, self._attend_reordered, self.after_out = hidden, attend, restore

    def project(self, projection: str, y: Tensor) -> Tensor:
        """From the output y of the frozen to_q, to_k or to_v to what `attend` takes."""
        if projection != "to_q" and not self.reads_text:
            return y
        x = {"to_q": self.hidden, "to_k": self.key_text, "to_v": self.value_text}[projection]
        return self.processor.project(self.site, projection, x, y)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
        """From what `project` gave, query `[B, S, a]`, key and value `[B, N, a]`, to what the frozen to_out
        reads, `[B, S, a]`."""
        if self._attend_reordered is not None:
            self._attended = self._attend_reordered(query, key, value, attention)
        else:
            self._attended = self.processor.attend(self, query, key, value, attention)
        return self._attended

    def finish(self, output: Tensor) -> Tensor:
        """From the output of the frozen to_out to the output of the site, `[B, S, a]`.

        Where another node took the attention away, so that `attend` was not called, nothing is changed.
        """
        if self._attended is None:
            return output
        output = self.processor.project(self.site, "to_out", self._attended, output)
        return output if self.after_out is None else self.after_out(output)


class AttentionProcessor:
    """What the sites do beside their frozen weights. This base class changes nothing; subclasses override
    what they need.

    A processor may keep what depends on the text or the layout alone. What belongs to one call of a site goes
    into the `SiteCall`: gradient checkpointing calls a site again in the backward pass, and it must then do
    the same again.
    """

    @property
    def changes_self_attention(self) -> bool:
        """Whether hosts ask `self_attention` now. Where not, self-attention is the host's own."""
        return False

    def prepare(self, context: Context) -> None:
        """Called before every forward pass, with the prompts that the pass reads."""

    def enter(self, call: SiteCall) -> None:
        """May reorder the cells (`call.reorder`) or set `call.reads_text` to False. Called before to_q, and
        only where no other code sees what lies between to_q and to_out."""

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        """A projection with what the processor adds to it.

        Args:
            x: Input of the projection, `[B, S, b]`.
            y: Output of its frozen weights, `[B, S, a]`.

        Returns:
            The output to use, `[B, S, a]`.
        """
        return y

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        """Attention of the picture to the text.

        Args:
            query: `[B, S, a]`, heads side by side, as `project` gave it.
            key, value: `[B, N, a]`, likewise.
            attention: The host's attention, with and without other nodes' code.

        Returns:
            What to_out reads, `[B, S, a]`. What is to happen with the output of to_out goes into
            `call.after_out`.
        """
        return attention(query, key, value)

    def self_attention(self, site: Site, query: Tensor, key: Tensor, value: Tensor,
                       attention: AttentionFunction) -> Tensor:
        """Self-attention of the block that a site is in: query, key and value `[B, S, a]` to `[B, S, a]`."""
        return attention(query, key, value)
