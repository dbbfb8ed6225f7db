"""Attention processors, which change what the sites compute, and the calls of sites.

Letters in shapes: B rows of a batch, N tokens, D context width, S cells of a site's grid, a and b output and
input width of a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .context import Context
from .sites import Site

NEVER = -1e4      # a bias of logits for what is not read; types of 16 bits hold it


class AttentionFunction(Protocol):
    """Multi-head attention whose heads are concatenated in the last dimension."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """query `[B, S, a]`, key and value `[B, N, a]` to `[B, S, a]`."""


@dataclass(frozen=True)
class HostAttention:
    """The host's attention at one site.

    Attributes:
        plain: The attention without other nodes' code.
        replaced: The attention that another node installed instead, such as an image prompt adapter; None if
            there is none.
    """

    plain: AttentionFunction
    replaced: AttentionFunction | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention including other nodes' code."""
        return self.plain(query, key, value) if self.replaced is None else self.replaced(query, key, value)

    def added_by_others(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Difference between the replaced and the plain attention, `[B, S, a]`; None if nothing is replaced.
        """
        if self.replaced is None:
            return None
        return self.replaced(query, key, value) - self.plain(query, key, value)


@dataclass(frozen=True)
class JointRows:
    """The picture's own rows in a joint attention, which share a softmax with the text's.

    Attributes:
        query: `[B, S, a]`, normalised, with rotary positions.
        key, value: `[B, M, a]`, likewise; values are plain. M is S, or more if there are reference pictures.
        mask: Which rows may be read, `[B or 1, 1, S or 1, N + M]`, as torch's attention takes it; None = all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None


@dataclass
class SiteCall:
    """One call of one site. All state that a later step of the call needs is stored here.

    Every host runs these steps around its own frozen projections:

        call.enter()      # only where no other code sees what lies between to_q and to_out
        q = norm(call.project("to_q", to_q(call.hidden)))
        k = norm(call.project("to_k", to_k(call.key_text)))
        v = call.project("to_v", to_v(call.value_text))
        y = call.finish(to_out(call.attend(q, k, v, attention)))

    `norm` is that of the site's heads; most models have none. Deltas thus act before it, as they do when they
    are folded into the weights.

    A host with joint attention gives the rows of the picture in `joint` and runs `attend` alone, with the
    normalised queries of the picture and the normalised keys and values of the text. Its queries have no
    rotary positions, which the logits take from `joint`; its keys have them. Rows of the text keep the host's
    own attention. Otherwise every word would read the concept, and the picture would read it through them.

    Attributes:
        processor: The attention processor in use.
        site: The site.
        hidden: Input of to_q, `[B, S, b]`; `enter` may replace it.
        key_text, value_text: Inputs of to_k and to_v, `[B, N, D]`. They differ only if another node changed
            one.
        reads_text: False if `enter` found that keys and values are not needed. The host may then project an
            empty text.
        after_out: Function applied to the output of to_out; None for none.
        joint: The rows of the picture in a joint attention; None where the text has a softmax of its own.
    """

    processor: AttentionProcessor
    site: Site
    hidden: Tensor
    key_text: Tensor
    value_text: Tensor
    reads_text: bool = True
    after_out: Callable[[Tensor], Tensor] | None = None
    joint: JointRows | None = None
    _attend_reordered: Callable[[Tensor, Tensor, Tensor, HostAttention], Tensor] | None = None
    _attended: Tensor | None = None
    _query: Tensor | None = None

    def enter(self) -> None:
        """Calls the processor's `enter`, which may reorder the cells or skip the text."""
        self.processor.enter(self)

    def reorder(self, hidden: Tensor, attend: Callable[[Tensor, Tensor, Tensor, HostAttention], Tensor],
                restore: Callable[[Tensor], Tensor]) -> None:
        """Runs this call on reordered cells. Called by `AttentionProcessor.enter`.

        Args:
            hidden: The reordered input of to_q, `[B', S', b]`.
            attend: Replaces `AttentionProcessor.attend` in this call; takes the query before the site's norm.
                It must not keep this call alive, or the cycle of the two holds what the call computed until
                the garbage collector runs.
            restore: Restores the original order: output of to_out `[B', S', a]` to `[B, S, a]`.
        """
        self.hidden, self._attend_reordered, self.after_out = hidden, attend, restore

    def project(self, projection: str, y: Tensor) -> Tensor:
        """Changes the output y of the frozen to_q, to_k or to_v. The result, normalised if the site does
        that, is an input of `attend`.
        """
        if projection != "to_q" and not self.reads_text:
            return y
        x = {"to_q": self.hidden, "to_k": self.key_text, "to_v": self.value_text}[projection]
        y = self.processor.project(self.site, projection, x, y)
        if projection == "to_q":
            self._query = y
        return y

    def before_norm(self, query: Tensor) -> Tensor:
        """The query of `attend` as it was before the site's norm."""
        return query if self._query is None else self._query

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
        """Attention from the normalised results of `project`, query `[B, S, a]`, key and value `[B, N, a]`,
        to the input of the frozen to_out, `[B, S, a]`.
        """
        if self._attend_reordered is not None:
            self._attended = self._attend_reordered(self.before_norm(query), key, value, attention)
        else:
            self._attended = self.processor.attend(self, query, key, value, attention)
        return self._attended

    def finish(self, output: Tensor) -> Tensor:
        """Turns the output of the frozen to_out into the output of the site, `[B, S, a]`.

        Returns y unchanged if another node replaced the whole attention and `attend` was not called.
        """
        if self._attended is None:
            return output
        output = self.processor.project(self.site, "to_out", self._attended, output)
        return output if self.after_out is None else self.after_out(output)


class AttentionProcessor:
    """Changes what the sites compute. This base class changes nothing; subclasses override what they need.

    A processor may store state that depends on the text or the layout alone. State of one call belongs in the
    `SiteCall`, because gradient checkpointing calls a site again in the backward pass. The second call must
    give the same result.

    Attributes:
        prompts: In a joint attention, the numbers of rows of the texts that `extended` puts side by side.
        masks_texts: In a joint attention, whether `joint_bias` leaves out rows that only fill texts up. If
            not, the host does that.
        fills: Where it does, these rows, as `Context.fills` gives them; None for none.
    """

    prompts: tuple[int, ...] = ()
    masks_texts: bool = False
    fills: Tensor | None = None

    @property
    def changes_self_attention(self) -> bool:
        """Whether hosts should call `self_attention` now. Otherwise they run their own self-attention."""
        return False

    def prepare(self, context: Context) -> None:
        """Called before every forward pass with the encoded prompts."""

    def enter(self, call: SiteCall) -> None:
        """May reorder the cells (`call.reorder`) or set `call.reads_text` to False. Called before to_q, and
        only where no other code sees what lies between to_q and to_out."""

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        """Changes the output of a projection.

        Args:
            x: Input of the projection, `[B, S, b]`.
            y: Output of its frozen weights, `[B, S, a]`.

        Returns:
            The changed output, `[B, S, a]`.
        """
        return y

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        """Cross-attention from picture to text.

        Args:
            query: `[B, S, a]` from `project`, heads concatenated, and normalised if the site does that.
            key, value: `[B, N, a]`, likewise; values are never normalised.
            attention: The host's attention, with and without other nodes' code.

        Returns:
            The input of to_out, `[B, S, a]`. A function for the output of to_out goes into `call.after_out`.
        """
        return attention(query, key, value)

    def self_attention(self, site: Site, query: Tensor, key: Tensor, value: Tensor,
                       attention: AttentionFunction) -> Tensor:
        """Self-attention in the same block as the site: query, key and value `[B, S, a]` to `[B, S, a]`."""
        return attention(query, key, value)

    def extended(self, text: Tensor) -> Tensor:
        """In a joint attention, the text states that the model reads instead of `[B, N, D]`: further texts
        may stand behind it. Called before every forward pass."""
        return text

    def joint_bias(self, cells: int, others: int, device: torch.device) -> Tensor | None:
        """In a joint attention, the bias on the logits of all rows, `[B or 1, 1, L or 1, L]`, in the order
        text, cells, other rows (of reference pictures); None for none.

        Args:
            cells, others: Their numbers; the rows of the text are those that `extended` returned.
            device: Of the bias.
        """
        return None
