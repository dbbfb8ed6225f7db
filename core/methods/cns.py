"""CNS: concept neuron selection (Liao et al., ICCV 2025, arXiv 2510.02296).

From its abstract, project page and summaries: only concept neurons (base minus general, see neurons.neurons)
of W_k and W_v, and the concept's special token, are trained, about 0.13 % of the parameters per concept. A
regulariser L_reg ties the update to earlier personalised weights and to the pretrained ones. Weights are
edited in place, with no fusion and nothing extra at inference.

Ours, since the paper's formulas were not available:
- Single weight entries as neurons (`unit`), and both scores.
- Base neurons are the `base_share` best of every weight, general ones those that at least `quorum` of the
  calibration prompts vote for, with `general_share` of a weight each. What remains of the base neurons is the
  concept's share, a result. The paper reports 0.13 % of the parameters, which is 5.8 % of SD1.5's W_k and
  W_v, and that about 53 % of base neurons stay shared as prompts are added; 12 % base neurons agree with
  both. A `share` above 0 fixes it instead, with as many base neurons as that needs.
- The calibration prompts show what the base can draw: its own (`Backbone.known_prompts`), or general ones.
- Neurons are selected after some steps that train the words alone, from the gradients of those steps. The
  selection therefore needs no forward passes of its own.
- `L_reg = (tie_previous ||M_1:t-1 M_con (W - W_t-1)||^2 + tie_base ||M_con (W - W_0)||^2) / ||M_con W||^2`.
  It is relative, so that one pair of coefficients fits any base, and used from the second task on; before,
  the second tie would be plain weight decay. The deltas have no weight decay. W is W_t-1 in the norm, also
  for a selection that is given.
- One vector per word and layer as in the other methods here, so that a comparison differs in the method
  alone. General neurons are found once per bank.

Unknown: score, thresholds, number of prompts, coefficients, learning rates, steps.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.adapters import by_key, by_name
from ..bank.composition import SUM
from ..conditioning.encoding import encode_concept
from ..data.batch import Batch
from ..errors import ConceptError
from ..model.deltas import DeltaKey, Deltas
from ..model.processor import AttentionProcessor
from ..neurons.neurons import UNITS, NeuronSelection, base_neurons, concept_neurons, unit_count
from ..neurons.scores import (
    CALIBRATION,
    SCORES,
    GradientProcessor,
    activation_scores,
    general_neurons,
    key_value_weights,
    removal_scores,
    weight_of,
)
from ..neurons.sparse import SparseAdapters
from ..settings import at_least, between, one_of, require
from .base import SHARE, Forward, Method, MethodConfig, Task, register, total

# of the activation score
CONCEPT_PROMPTS = ("a photo of {}", "a {} on a beach", "a painting of {}", "{} in a room")
_EARLIER, _GENERAL, _MADE_WITH = "union.", "general.", "general_made_with"


@dataclass(frozen=True)
class CNSConfig(MethodConfig):
    """share: of W_k and W_v that a concept may change; 0 = what is left of the base neurons. base_share:
    share of a weight in the base neurons. unit, score: see neurons. selection_steps: steps of words
    before neurons are selected; a run that is no longer has no deltas. calibration: number of unrelated
    prompts that vote on general neurons, 0 = none are general. general_share: share of a weight that a
    prompt may vote for. quorum: share of votes that makes a neuron general. tie_previous, tie_base:
    L_reg."""

    share: float = 0.0
    base_share: float = 0.12
    unit: str = "weight"
    score: str = "gradient"
    selection_steps: int = 50
    calibration: int = 32
    general_share: float = 0.1
    quorum: float = 0.5
    tie_previous: float = 1.0
    tie_base: float = 0.1

    limits = {"share": between(0, 1), "base_share": SHARE,
              "unit": one_of(UNITS), "score": one_of(SCORES), "selection_steps": at_least(1),
              "calibration": between(0, len(CALIBRATION)), "quorum": SHARE}

    def __post_init__(self) -> None:
        super().__post_init__()
        # at most general_share / quorum of a weight can be general; a fixed share must fit beside it
        room = min(1.0, self.quorum * (1 - self.share)) if self.share else 1.0
        require(0 < self.general_share <= room, "general_share", self.general_share,
                f"above 0 to quorum (1 - share) = {room:.3g}" if self.share else "above 0 to 1")


@register("cns", CNSConfig, "a few concept neurons of the keys and values, chosen per concept and tied to "
          "what earlier ones learned")
class CNS(Method):
    """gradients: sums them over a step; sums: over the finished steps before the selection; general, earlier:
    general neurons, and those of earlier tasks; energy: ||M_con W||^2; earlier_change: per weight
    `W_t-1 - W_0` at the selected neurons `[k]`; overlap: whether they are neurons of earlier tasks, 0 or 1
    `[k]`, of weights where some are."""

    composition = SUM
    learns_alone = True      # neurons are selected by the gradients of the pictures that a process saw
    selection: NeuronSelection | None = None
    extra_key = "choice._extra_state"
    config: CNSConfig
    adapters: SparseAdapters

    def use_selection(self, selection: NeuronSelection) -> None:
        self.selection = selection

    def begin(self, task: Task) -> None:
        self.energy, self.is_chosen = 0.0, False
        super().begin(task)
        c, layout, state = self.config, task.backbone.layout, task.bank.shared.get(self.name, {})
        # for the calibration, in resumed runs too
        self.seed = task.draw_seed()
        self.prompts = (task.backbone.known_prompts or CALIBRATION)[:c.calibration]
        # a checksum of everything that general neurons depend on, except the base
        self.made_with = zlib.crc32(json.dumps([c.score, c.unit, c.general_share, c.quorum,
                                                self.prompts]).encode())
        self.earlier = NeuronSelection.from_tensors(state, layout, _EARLIER)
        is_known = int(state.get(_MADE_WITH, -1)) == self.made_with
        self.general = NeuronSelection.from_tensors(state, layout, _GENERAL) if is_known else None
        self.gradients = GradientProcessor(key_value_weights(layout))
        self.sums: dict[DeltaKey, Tensor] = {}
        if self.selection is not None:
            self._choose(self.selection)

    def make_adapters(self) -> SparseAdapters:
        """Room for the largest selection."""
        c, layout = self.config, self.task.backbone.layout
        if self.selection is None:
            sizes = {key: layout.sites[key[0]].shape(key[1]) for key in key_value_weights(layout)}
            counts = {key: unit_count(size, c.share or c.base_share, c.unit)
                      * (1 if c.unit == "weight" else size[1]) for key, size in sizes.items()}
        else:
            self.selection.check_fits(layout)
            counts = {key: len(places) for key, places in self.selection.indices.items() if len(places)}
            if not counts:
                raise ConceptError(f"the neuron selection for concept '{self.task.name}' has 0 entries; "
                                   "allowed: 1 or more")
        return SparseAdapters(layout, counts, self.task.backbone.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        words, deltas = super().parameter_groups()
        return [words, {**deltas, "weight_decay": 0.0}]

    def processor(self) -> AttentionProcessor:
        if self.is_chosen:
            return super().processor()
        return self.gradients if self.config.score == "gradient" else AttentionProcessor()

    def begin_step(self) -> None:
        super().begin_step()
        self.gradients.sums = {}

    @torch.no_grad()
    def end_step(self) -> None:
        for key, gradient in self.gradients.sums.items():
            self.sums[key] = gradient if key not in self.sums else self.sums[key].add_(gradient)
        self.gradients.sums = {}

    def on_batch(self, batch: Batch) -> Batch:
        """Selects the neurons when it is time: here and not in after_step, so that a cancel loses nothing."""
        c = self.config
        if not self.is_chosen and self.steps >= c.selection_steps:
            if self.general is None and self.prompts:
                height, width = batch.latents.shape[-2:]
                generator = torch.Generator().manual_seed(self.seed)
                self.general = general_neurons(self.task.backbone, generator, self.prompts, c.score,
                                               c.general_share, c.quorum, c.unit, (height, width))
            self._choose(self.select())
        if self.is_chosen and not self.energy:      # here, because earlier deltas are in the weights by now
            self._measure_energy()
        self.gradients.rows = (~batch.is_prior).float()
        return batch

    def select(self) -> NeuronSelection:
        """The concept neurons by the scores of the steps so far."""
        c, backbone = self.config, self.task.backbone
        if c.score == "gradient":
            scores = removal_scores(backbone, self.sums)
        else:
            context = encode_concept(backbone, self.task.name, self.words.group(), CONCEPT_PROMPTS)
            scores = activation_scores(backbone, context, [row[self.task.name] for row in context.words])
        for key, size in self.adapters.all_sizes.items():      # the loss may not reach every site
            scores.setdefault(key, torch.zeros(size, device=backbone.device))
        if c.share:
            return concept_neurons(scores, self.general, c.share, c.unit)
        base = base_neurons(scores, c.base_share, c.unit)
        return base if self.general is None else base - self.general

    @torch.no_grad()
    def _choose(self, selection: NeuronSelection) -> None:
        """Trains these neurons from here on."""
        self.adapters.place(selection)
        self.is_chosen, self.sums = True, {}
        self._tie()

    @torch.no_grad()
    def _measure_energy(self) -> None:
        weights = (weight_of(self.task.backbone, key).flatten()[self.adapters.at(key)[1].long()]
                   for key in self.adapters.sizes)
        self.energy = max(1e-12, sum(float(weight.square().sum()) for weight in weights))

    @torch.no_grad()
    def _tie(self) -> None:
        self.earlier_change: dict[DeltaKey, Tensor] = {}
        self.overlap: dict[DeltaKey, Tensor] = {}
        changes = self.task.earlier_sum(self.name)
        for key in self.adapters.sizes:
            places = self.adapters.at(key)[1]
            if key in changes:
                self.earlier_change[key] = changes[key].dense().flatten().to(places.device)[places.long()]
            if key in self.earlier.indices:
                is_old = torch.isin(places, self.earlier.indices[key].to(places.device))
                if is_old.any():
                    self.overlap[key] = is_old.float()

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """The two ties of L_reg over the selected neurons, from the second task on."""
        c = self.config
        terms: dict[str, Tensor] = {}
        if not self.earlier.sizes or not self.is_chosen:
            return terms
        values = {key: self.adapters.at(key)[0] for key in self.adapters.sizes}
        if c.tie_previous > 0 and self.overlap:
            squares = total((values[key].square() * old).sum() for key, old in self.overlap.items())
            terms["previous"] = c.tie_previous * squares / self.energy
        if c.tie_base > 0:
            squares = total((v + self.earlier_change.get(key, 0)).square().sum() for key, v in values.items())
            terms["base"] = c.tie_base * squares / self.energy
        return terms

    def monitors(self) -> dict[str, float]:
        """share: of W_k and W_v, the concept's neurons."""
        layout = self.task.backbone.layout
        entries = sum(math.prod(layout.sites[key[0]].shape(key[1])) for key in key_value_weights(layout))
        chosen = sum(self.adapters.at(key)[0].numel() for key in self.adapters.sizes)
        return {"share": chosen / entries} if self.is_chosen else {}

    def recorded(self, dtype: torch.dtype) -> Deltas:
        return self.adapters.stored(dtype) if self.is_chosen else {}

    def shared_state(self) -> dict[str, Tensor]:
        """All tasks' neurons and the general ones, as bits."""
        union = self.earlier | self.adapters.selection() if self.is_chosen else self.earlier
        shared = union.to_tensors(_EARLIER)
        if self.general is not None:
            shared |= {**self.general.to_tensors(_GENERAL), _MADE_WITH: torch.tensor(self.made_with)}
        return shared

    def extra_state(self) -> dict[str, Any]:
        return {"energy": self.energy, "is_chosen": self.is_chosen, "sums": by_name(self.sums),
                "general": {} if self.general is None else self.general.to_tensors()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        backbone = self.task.backbone
        self.energy, self.is_chosen = float(state["energy"]), bool(state["is_chosen"])
        if state["general"]:
            self.general = NeuronSelection.from_tensors(state["general"], backbone.layout)
        self.sums = by_key(state["sums"], backbone.device)
        if self.is_chosen:
            self._tie()
