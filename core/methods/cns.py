"""CNS: concept neuron selection (Liao et al., ICCV 2025, arXiv 2510.02296).

The paper's, as far as its abstract, project page and summaries tell: only concept neurons (base minus general, see `neurons`) of W_k and
W_v and the concept's special token are trained, about 0.13 % of the parameters per concept; a regulariser L_reg ties the update to earlier
personalised weights and to the pretrained ones; weights are edited in place, no fusion, nothing extra at inference.

Ours, since the paper's formulas were not available: single weight entries as neurons (`unit`); both scores; selection after some steps
that train the words alone, from the gradients of those very steps, so that it needs no passes of its own; `L_reg = (tie_previous
||M_1:t-1 M_con (W - W_t-1)||^2 + tie_base ||M_con (W - W_0)||^2) / ||M_con W||^2`, relative so that one pair of coefficients fits any base,
and from the second task on (before it the second tie would be plain weight decay); no weight decay on the deltas; one vector per word and
layer as in the other methods here, so that a comparison differs in the method alone; general neurons found once per bank.
Unknown: score, thresholds, number of prompts, coefficients, learning rates, steps.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bank.composition import SUM
from ..bank.concepts import ConceptInfo
from ..bank.prompts import Vocabulary
from ..bank.tokens import TokenGroup
from ..conditioning.encoding import encode_prompts
from ..data.batch import Batch
from ..errors import ConceptError
from ..model.backbone import AttentionProcessor
from ..model.deltas import DeltaKey
from ..model.sites import SiteLayout
from ..neurons.neurons import UNITS, NeuronSelection, concept_neurons, unit_count
from ..neurons.scores import CALIBRATION, SCORES, GradientProgram, activation_scores, general_neurons, key_value_weights, weight_of
from .base import Forward, LearnedWords, Method, Outcome, Task, adapter_key, register, require, stored_dtype
from .sparse import SparseAdapters, SparseProgram

CONCEPT_PROMPTS = ("a photo of {}", "a {} on a beach", "a painting of {}", "{} in a room")      # what the activation score reads, ours
_EARLIER, _GENERAL, _MADE_WITH = "union.", "general.", "general_made_with"


@dataclass(frozen=True)
class CNSConfig:
    """share: of W_k and W_v that a concept may change; 5.8 % is 0.13 % of SD1.5's UNet (the paper's figure). unit: "weight" | "row";
    score: "gradient" | "activation"; selection_steps: steps of words alone before neurons are chosen, a run that is no longer has no
    deltas; calibration: how many unrelated prompts vote on general neurons, 0 = none are general; general_share: of a weight that a
    prompt may vote for; quorum: share of votes that makes a neuron general; tie_previous, tie_base: L_reg."""

    share: float = 0.058
    unit: str = "weight"
    score: str = "gradient"
    selection_steps: int = 50
    calibration: int = 32
    general_share: float = 0.1
    quorum: float = 0.5
    tie_previous: float = 1.0
    tie_base: float = 0.1
    lr: float = 1e-4
    token_lr: float = 1e-3
    layerwise: bool = True
    first_std: float = 0.0
    stored: str = "float16"

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", self.share, "above 0 to 1")
        require(self.unit in UNITS, "unit", self.unit, ", ".join(UNITS))
        require(self.score in SCORES, "score", self.score, ", ".join(SCORES))
        require(self.selection_steps >= 1, "selection_steps", self.selection_steps, "1 or more")
        require(0 <= self.calibration <= len(CALIBRATION), "calibration", self.calibration, f"0 to {len(CALIBRATION)}")
        require(0 < self.quorum <= 1, "quorum", self.quorum, "above 0 to 1")
        # at most general_share / quorum of a weight can be general; the concept's share must fit beside it
        room = self.quorum * (1 - self.share)
        require(0 < self.general_share <= room, "general_share", self.general_share, f"above 0 to quorum (1 - share) = {room:.3g}")
        for name in ("tie_previous", "tie_base", "lr", "token_lr", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


class CNS(Method):
    """selection: neurons to train, in place of the method's own choice; calibration_prompts: unrelated prompts in place of the built-in
    ones, all of them used. Both are set before `begin`."""

    composition = SUM
    learns_alone = True      # neurons are chosen by the gradients of the pictures that a process saw
    selection: NeuronSelection | None = None
    calibration_prompts: tuple[str, ...] = ()

    def __init__(self, config: CNSConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, self.task, layout = self.config, task, task.backbone.layout
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.seed = int(torch.randint(2**31, (1,), generator=task.generator))      # for what is drawn later, resumed or not
        self.steps, self.energy, self.is_chosen = 0, 1.0, False
        state = task.bank.shared.get(self.name, {})
        self.earlier = _stored_selection(state, _EARLIER, layout)
        made_with = int(state[_MADE_WITH]) if _MADE_WITH in state else None
        self.general = _stored_selection(state, _GENERAL, layout) if made_with == self._made_with() else None
        self.gradients = GradientProgram(key_value_weights(layout))
        if self.selection is None:
            counts = {key: self._count(layout.sites[key[0]].shape(key[1])) for key in key_value_weights(layout)}
        else:
            self.selection.check_fits(layout)
            counts = {key: len(found) for key, found in self.selection.indices.items() if len(found)}
            if not counts:
                raise ConceptError(f"the neuron selection for concept '{task.name}' has 0 entries; allowed: 1 or more")
        self.adapters = self._make_adapters(counts)
        if self.selection is not None:
            self._choose(self.selection)

    def _make_adapters(self, counts: Mapping[DeltaKey, int]) -> SparseAdapters:
        return SparseAdapters(self.task.backbone.layout, counts, self.task.backbone.device)

    def _count(self, size: tuple[int, int]) -> int:
        return unit_count(size, self.config.share, self.config.unit) * (1 if self.config.unit == "weight" else size[1])

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr},
                {"params": list(self.adapters.parameters()), "lr": self.config.lr, "weight_decay": 0.0}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        if self.is_chosen:
            return SparseProgram(self.adapters)
        return self.gradients if self.config.score == "gradient" else AttentionProcessor()

    def on_batch(self, batch: Batch) -> Batch:
        if not self.is_chosen and self.steps >= self.config.selection_steps:      # here and not in after_step: a cancel loses nothing
            self._choose(self._select(tuple(batch.latents.shape[-2:])))
        self.gradients.rows = (~batch.is_prior).float()
        return batch

    def _find_general(self, size: tuple[int, int]) -> None:
        c, prompts = self.config, self._calibration()
        if self.general is None and prompts:
            generator = torch.Generator().manual_seed(self.seed)
            self.general = general_neurons(self.task.backbone, generator, prompts, c.score, c.general_share, c.quorum, c.unit, size)

    def _select(self, size: tuple[int, int]) -> NeuronSelection:
        c, backbone = self.config, self.task.backbone
        self._find_general(size)
        scores = self.gradients.scores(backbone) if c.score == "gradient" else self._activation_scores()
        missing = set(self.adapters.sizes) - set(scores)      # no gradient ever came: only where the loss does not reach a site
        scores |= {key: torch.zeros(self.adapters.sizes[key], device=backbone.device) for key in missing}
        return concept_neurons(scores, self.general, c.share, c.unit)

    @torch.no_grad()
    def _activation_scores(self) -> dict[DeltaKey, Tensor]:
        name, words = self.task.name, self.words.group()
        vocabulary = Vocabulary([ConceptInfo(name, self.task.class_noun, self.name, words.words)])
        prompts = [prompt.format(f"<{name}>") for prompt in CONCEPT_PROMPTS]
        context = encode_prompts(self.task.backbone, vocabulary.parse_all(prompts), {name: words})
        return activation_scores(self.task.backbone, context, [row[name] for row in context.words])

    def _calibration(self) -> tuple[str, ...]:
        return tuple(self.calibration_prompts) or CALIBRATION[:self.config.calibration]

    def _made_with(self) -> int:
        """A number that stands for everything general neurons depend on, beside the base."""
        c = self.config
        return zlib.crc32(json.dumps([c.score, c.unit, c.general_share, c.quorum, self._calibration()]).encode())

    @torch.no_grad()
    def _choose(self, selection: NeuronSelection) -> None:
        """From here on these neurons train."""
        self.adapters.place(selection)
        weights = (weight_of(self.task.backbone, key).flatten()[self.adapters.at(key)[1].long()] for key in self.adapters.sizes)
        self.energy = max(1e-12, sum(float(weight.square().sum()) for weight in weights))
        self.is_chosen = True
        self.gradients.sums = {}
        self._tie()

    @torch.no_grad()
    def _tie(self) -> None:
        """For every chosen neuron: what earlier tasks made of it, `W_t-1 - W_0` `[k]`, and whether it is one of theirs, 0 or 1 `[k]`."""
        self.drift, self.overlap = {}, {}
        mine = [self.task.bank.passing(name) for name, info in self.task.bank.infos.items() if info.method == self.name]
        for key, size in self.adapters.sizes.items():
            places = self.adapters.at(key)[1].long()
            old = [delta for concept in mine if (delta := concept.deltas.get(key)) is not None]
            total = sum((delta.dense() for delta in old), torch.zeros(size)).flatten().to(places.device)
            known = self.earlier is not None and key in self.earlier.sizes
            union = self.earlier.mask(key).flatten() if known else torch.zeros(size, dtype=torch.bool).flatten()
            self.drift[key], self.overlap[key] = total[places], union.to(places.device)[places].float()

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """The two ties of L_reg, from the second task on. They are over vectors of the chosen neurons, whatever the bank's size."""
        c, terms = self.config, {}
        if self.earlier is None or not self.is_chosen:
            return terms
        values = {key: self.adapters.at(key)[0] for key in self.adapters.sizes}
        if c.tie_previous > 0 and any(bool(s.any()) for s in self.overlap.values()):
            terms["previous"] = c.tie_previous * sum((v.square() * self.overlap[key]).sum() for key, v in values.items()) / self.energy
        if c.tie_base > 0:
            terms["base"] = c.tie_base * sum((v + self.drift[key]).square().sum() for key, v in values.items()) / self.energy
        return terms

    def after_step(self, step: int) -> None:
        self.steps = step

    @torch.no_grad()
    def finish(self) -> Outcome:
        dtype, deltas, union = stored_dtype(self.config.stored), {}, self.earlier
        if self.is_chosen:
            chosen = self.adapters.selection()
            union = chosen if union is None else union | chosen
            deltas = self.adapters.stored(dtype)
        shared = {} if union is None else {_EARLIER + name: bits for name, bits in union.to_tensors().items()}
        if self.general is not None:
            shared |= {_GENERAL + name: bits for name, bits in self.general.to_tensors().items()}
            shared[_MADE_WITH] = torch.tensor(self._made_with())
        return Outcome(self.words.stored(dtype), deltas, shared)

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters, "choice": _Choice(self)})      # choice last: it reads places


class _Choice(nn.Module):
    """Lets a checkpoint carry how far the selection is."""

    def __init__(self, method: CNS) -> None:
        super().__init__()
        self.method = [method]

    def get_extra_state(self) -> dict:
        m = self.method[0]
        general = {} if m.general is None else m.general.to_tensors()
        return {"steps": m.steps, "energy": m.energy, "is_chosen": m.is_chosen, "general": general,
                "sums": {adapter_key(*key): found for key, found in m.gradients.sums.items()}}

    def set_extra_state(self, state: dict) -> None:
        m, device = self.method[0], self.method[0].task.backbone.device
        m.steps, m.energy, m.is_chosen = int(state["steps"]), float(state["energy"]), bool(state["is_chosen"])
        m.general = NeuronSelection.from_tensors(state["general"], m.task.backbone.layout) if state["general"] else None
        # copies: views into a file lie at odd addresses, where sums may round otherwise
        m.gradients.sums = {key: state["sums"][adapter_key(*key)].to(device, copy=True) for key in m.gradients.keys
                            if adapter_key(*key) in state["sums"]}
        if m.is_chosen:
            m._tie()


def _stored_selection(state: Mapping[str, Tensor], prefix: str, layout: SiteLayout) -> NeuronSelection | None:
    """A selection out of a bank's shared state, or None where it has none."""
    tensors = {name[len(prefix):]: state[name] for name in state if name.startswith(prefix)}
    return NeuronSelection.from_tensors(tensors, layout) if tensors else None


register("cns", CNSConfig, CNS, "a few concept neurons of the keys and values, chosen per concept and tied to what earlier ones learned")
