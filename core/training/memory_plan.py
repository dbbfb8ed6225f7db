"""The memory plan of a run: what learning will take on this device, and which measures keep it there.

All measures but one leave the result as it is. Micro-batches add up a batch's gradient in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

MARGIN = 1.15      # docs/cost.md compares estimates with measured peaks
LEAST = 200 * 10**6      # bytes of weights; smaller models fit everywhere
COPIES = 4      # of a trained number: itself, its gradient, two states of AdamW; others have fewer
_GIB = 2**30


@dataclass(frozen=True)
class Measures:
    """What is done to save memory.

    Attributes:
        checkpointing: Blocks recompute their activations in the backward pass.
        rows: Pictures of a micro-batch; 0 = the whole batch.
        offloads: The host keeps a part of the weights in main memory.
    """

    checkpointing: bool = False
    rows: int = 0
    offloads: bool = False

    def describe(self) -> str:
        """Names them, for a sentence; "" for none."""
        names = ["gradient checkpointing"] * self.checkpointing
        names += [f"micro-batches of {self.rows}"] if self.rows else []
        names += ["part of the model in main memory"] * self.offloads
        return ", ".join(names)

    def next(self, rows: int, can_offload: bool) -> Measures | None:
        """These measures and a further one; None if there is no other.

        Args:
            rows: Pictures of the whole batch.
            can_offload: Whether the host can keep weights in main memory.
        """
        if not self.checkpointing:
            return replace(self, checkpointing=True)
        if (self.rows or rows) > 1:
            return replace(self, rows=-(-(self.rows or rows) // 2))
        return replace(self, offloads=True) if can_offload and not self.offloads else None


@dataclass(frozen=True)
class MemoryPlan:
    """What learning takes, in bytes.

    Attributes:
        weights, type: The model as it is loaded, and the type of most weights.
        concept: What is learned, with its gradients and the optimiser's states.
        activations: The most that forward and backward pass take with the measures.
        unsaved: The same without measures that the plan adds.
        free: What the device has left for activations and concept; None if unknown.
        measures: Those of the settings, and those that the plan adds.
        reads_text: Whether the text encoder is needed in every step.
    """

    weights: int
    type: str
    concept: int
    activations: int
    unsaved: int
    free: int | None
    measures: Measures
    reads_text: bool

    @property
    def total(self) -> int:
        return self.weights + self.concept + self.activations

    @property
    def fits(self) -> bool:
        movable = self.weights if self.measures.offloads else 0
        return self.free is None or self.concept + self.activations <= self.free + movable

    def line(self) -> str:
        """One line for the person who waits."""
        def gb(size: int) -> str:
            return f"{size / _GIB:.1f}" if size >= 0.05 * _GIB else f"{size / _GIB:.3f}"

        known = "" if self.free is None else f" of {gb(self.weights + self.free)}"
        parts = (f"model {gb(self.weights)} in {self.type}, activations {gb(self.activations)}, concept "
                 f"{gb(self.concept)}")
        taken = self.measures.describe()
        saved = f" (without them {gb(self.total - self.activations + self.unsaved)} GB)"
        measures = f"measures: {taken}" + (saved if self.unsaved > self.activations else "")
        text = "the text encoder works in every step" if self.reads_text else \
            "the text encoder works only once per caption"
        end = "" if self.fits else "; it may not fit, so lower resolution"
        return (f"memory: about {gb(self.total)}{known} GB: {parts}; {measures if taken else 'no measures'}; "
                f"{text}{end}")


def planned(asked: Measures, rows: int, free: int | None, concept: int,
            activations: Callable[[Measures], int], can_offload: bool) -> Measures:
    """Chooses measures, one after another, until the run fits.

    A run that fits keeps the measures of its settings. A measure that changes no number is taken if the
    estimate with its margin does not fit; micro-batches only if the estimate itself does not.

    Args:
        asked: The measures of the settings.
        rows: Pictures of the whole batch.
        free: Bytes that the device has left; None if unknown.
        concept: Bytes of what is learned, with gradients and states.
        activations: Bytes with some measures.
        can_offload: Whether the host can keep weights in main memory.
    """
    measures = asked
    while free is not None:
        margin = 1.0 if measures.checkpointing else MARGIN
        further = measures.next(rows, can_offload)
        if margin * (concept + activations(measures)) <= free or further is None:
            break
        measures = further
    return measures
