"""L2DM: create your world, lifelong text-to-image diffusion (Sun et al., TPAMI 2024, arXiv 2309.04430).

From the paper, as far as it could be read: a long-term memory holds CLIP image features and prompts of every
real training picture, but no pictures (Alg. 1). Before every later task, the current model generates pictures
for each stored prompt, and a score (Eq. 5) selects one per stored feature for a short-term memory. TAME
(Eq. 4) replays the short-term memory with weight alpha, beside prior preservation of all classes so far with
weight beta; prior pictures come from the pretrained model. ECD distils the previous model, the teacher, on
the short-term memory (Fig. 2). Cross-attention is trained (Fig. 2). sampling.attention_guidance has its
composition of several concepts.

Ours, since no code was available:
- Low-rank keys and values on top of all earlier tasks are trained, and the concept's words. A bank holds
  deltas; full keys and values would cost 19 million values per concept on SD1.5. Rank 8 on two projections
  has as many weights as CIDM's rank 4 on four.
- CLIP is the task's image encoder (`Task.encode`), which describes pictures as the autoencoder returns them.
  Without one, features are those of `neurons.recording.unet_features`. Candidates for a stored feature are
  the pictures of its own prompt.
- Every batch replays `replay` pictures, each old task with equal probability, so that a step's cost does not
  grow with the bank. The term is weighted by the number of old tasks, which in expectation makes it the sum
  of Eq. 4. The same holds for `old_prior` prior pictures of old classes. These are drawn before each task:
  one per stored prompt, with the class noun in place of the concept. Those of the present class are in the
  data.
- ECD compares the UNet's outputs (noise in the paper, v where the base predicts v). How it is "elastic" could
  not be read. Here a replayed picture counts the more, the further this model has moved from the teacher on
  it; `elasticity=0` counts all alike.

Unknown: alpha, beta, mu, eta, how pictures are generated, learning rates, steps, rank. Both memories of
pictures are made anew per task, before anything is folded into the weights. A resumed run makes them again
and then takes its checkpoint's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.composition import SUM
from ..bank.prompts import NO_CONCEPTS, Prompt
from ..data.batch import Batch
from ..data.training_set import TrainingData
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.storage import stored_dtype
from ..neurons.recording import unet_features
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from ..settings import at_least
from .base import Forward, Task, register
from .distillation import Teacher
from .low_rank import KEYS_AND_VALUES, LowRankConfig, LowRankMethod

Features = Callable[[Backbone, Tensor], Tensor]      # latents [B, C, h, w] -> [B, F], of any length
_FEATURES, _NOTES = "features", "notes"


@dataclass(frozen=True)
class L2DMConfig(LowRankConfig):
    """alpha: weight of replay (Eq. 4); beta: of prior pictures (Eq. 4), times the training's prior_weight;
    mu: of distillation; eta: pictures generated per stored prompt; closeness: Eq. 5's beta, weight of the
    similarity to the real picture; replay: short-term pictures per batch; old_prior: prior pictures of old
    classes per batch, 0 = none; elasticity: see distillation; generation_steps, cfg, prior_cfg: how pictures
    are generated, the last for prior ones. With cfg above 1 each task's replay exaggerates what the task
    before had exaggerated: over ten tasks of the embedded base, cfg 3 in place of 1 halved image alignment.
    """

    rank: int = 8
    alpha: float = 1.0
    beta: float = 1.0
    mu: float = 1.0
    eta: int = 2
    closeness: float = 1.0
    replay: int = 1
    generation_steps: int = 25
    cfg: float = 1.0
    old_prior: int = 1
    prior_cfg: float = 3.0
    elasticity: float = 1.0

    limits = dict.fromkeys(("eta", "generation_steps", "replay"), at_least(1))


def rainbow_scores(generated: Tensor, real: Tensor, closeness: float) -> Tensor:
    """Scores every candidate of every stored feature by Eq. 5.

    Args:
        generated: features of the pictures that were generated for each stored feature, `[n, eta, F]`.
        real: the stored features of all old tasks, `[n, F]`.
        closeness: the paper's beta.

    Returns:
        `[n, eta]`: the mean of 1 - cos over all generated pictures, itself included as printed, plus
        closeness times the cosine with the real picture.
    """
    unit, target = F.normalize(generated, dim=-1), F.normalize(real, dim=-1)
    different = 1 - unit @ unit.flatten(0, 1).mean(0)
    return different + closeness * (unit * target.unsqueeze(1)).sum(-1)


@dataclass(frozen=True)
class LongTerm:
    """The long-term memory. features: `[n, F]`; owners: `TokenGroup.digest` of each row's concept, which
    renaming does not change; prompts: of each row, with `<>` for the owner's placeholder."""

    features: Tensor
    owners: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        text = json.dumps([self.owners, self.prompts]).encode()
        return {_FEATURES: self.features, _NOTES: torch.tensor(list(text), dtype=torch.uint8)}

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> LongTerm:
        """Inverse of `tensors`; an empty state is an empty memory. Raises ConceptError for any other."""
        if not state:
            return cls(torch.zeros(0, 0))
        try:
            owners, prompts = json.loads(bytes(state[_NOTES].tolist()))
            is_text = all(isinstance(text, str) for text in (*owners, *prompts))
            if not is_text or not len(owners) == len(prompts) == len(state[_FEATURES]):
                count = len(state[_FEATURES])
                raise ValueError(f"{len(owners)} owners, {len(prompts)} prompts, {count} features")
            return cls(state[_FEATURES], tuple(owners), tuple(prompts))
        except (KeyError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConceptError(f"the bank's long-term memory of 'l2dm' is damaged ({reason})") from error

    def rows(self, keep: list[int]) -> LongTerm:
        return LongTerm(self.features[keep], tuple(self.owners[i] for i in keep),
                        tuple(self.prompts[i] for i in keep))

    def joined(self, other: LongTerm) -> LongTerm:
        features = torch.cat([self.features, other.features]) if len(self.owners) else other.features
        return LongTerm(features, self.owners + other.owners, self.prompts + other.prompts)


@register("l2dm", L2DMConfig, "replays generated pictures of old concepts, chosen by a memory of features, "
          "and distils the old model")
class L2DM(LowRankMethod):
    """features: how pictures are described in the memory if the task has no image encoder; the same for a
    whole bank.

    old, new: the long-term memory of earlier tasks and of this one; short: the short-term memory; prior:
    prior pictures of old classes, row by row as in it; names: owner -> concept.
    """

    composition = SUM
    wants_prior = True
    describes_pictures = True
    learns_alone = True      # each forward pass replays its own pictures
    projections = KEYS_AND_VALUES
    extra_key = "memory._extra_state"
    config: L2DMConfig
    features: Features = staticmethod(unet_features)

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.seed, self.teacher = task.draw_seed(), Teacher(task.backbone)
        self.new: LongTerm | None = None
        self.short: Batch | None = None
        self.prior: Batch | None = None
        bank, memory = task.bank, LongTerm.read(task.bank.shared.get(self.name, {}))
        self.names = {bank[name].tokens.digest(): name for name, info in bank.infos.items()
                      if info.method == self.name}
        # only of concepts that the bank still holds; a caption may name another one, deleted since
        self.old = memory.rows([i for i, owner in enumerate(memory.owners) if owner in self.names
                                and bank.vocabulary.knows(self._prompt(memory, i))])

    def _prompt(self, memory: LongTerm, row: int) -> str:
        return memory.prompts[row].replace("<>", f"<{self.names[memory.owners[row]]}>")

    def on_data(self, data: TrainingData) -> None:
        """Describes the task's own pictures for the long-term memory and fills the short-term memory.

        Mirrored copies of a picture are left out.
        """
        own = (~data.is_prior).nonzero().squeeze(1)
        own = own[::max(1, len(own) // max(1, len(data.digests)))]
        features = self._described(data.latents[own.to(data.latents.device)])
        if self.old.owners and self.old.features.shape[1] != features.shape[1]:
            raise ConceptError(f"the bank's long-term memory of '{self.name}' has features of length "
                               f"{self.old.features.shape[1]}, this run's have {features.shape[1]}; allowed: "
                               "one image encoder for a whole bank, or none")
        prompts = tuple(data.captions[i].replace(f"<{self.task.name}>", "<>") for i in own.tolist())
        self.new = LongTerm(features, ("",) * len(own), prompts)
        if self.old.owners:
            self.short = self._generated(data.latents)
            self.prior = self._prior_of_old(data.latents) if self.config.old_prior else None

    @torch.no_grad()
    def _described(self, latents: Tensor) -> Tensor:
        """Features `[B, F]` of pictures, by the task's image encoder if it has one."""
        backbone, encode = self.task.backbone, self.task.encode
        if encode is None:
            return self.features(backbone, latents).float().cpu()
        return torch.cat([encode(backbone.decode_latents(chunk)).float().cpu() for chunk in latents.split(4)])

    @torch.no_grad()
    def _pictures(self, bank: ConceptBank, prompts: Sequence[Prompt], own: Tensor, seed: int,
                  cfg: float) -> Tensor:
        """Latents of one picture per prompt, in the shape of the own latents."""
        c, backbone = self.config, self.task.backbone
        height, width = (side * backbone.picture_multiple for side in own.shape[-2:])
        settings = SampleSettings(steps=c.generation_steps, cfg=cfg, size=(height, width), batch=4)
        pictures = sample(backbone, bank, prompts, [seed + i for i in range(len(prompts))], settings)
        # contiguous, as a checkpoint returns them: another memory layout is rounded differently
        return torch.cat([backbone.encode_images(chunk) for chunk in pictures.split(4)]).contiguous()

    def _batch(self, latents: Tensor, prompts: tuple[str, ...], is_prior: bool) -> Batch:
        """Rows of the memory. The weights are the chances of being replayed, alike for every old task."""
        pictures_of = Counter(self.old.owners)
        return Batch(latents, prompts, torch.ones_like(latents[:, :1]), torch.full((len(prompts),), is_prior),
                     1.0 / torch.tensor([pictures_of[owner] for owner in self.old.owners]).float())

    def _generated(self, own: Tensor) -> Batch:
        """The short-term memory by Eq. 5: pictures of the current model with the whole bank."""
        c, bank, count = self.config, self.task.bank, len(self.old.owners)
        prompts = tuple(self._prompt(self.old, i) for i in range(count))
        # captions, so parentheses and the like are text
        repeated = [bank.vocabulary.parse_caption(p) for p in prompts for _ in range(c.eta)]
        latents = self._pictures(bank, repeated, own, self.seed, c.cfg)
        generated = self._described(latents).unflatten(0, (count, c.eta))
        best = rainbow_scores(generated, self.old.features, c.closeness).argmax(1)
        latents = latents.unflatten(0, (count, c.eta))[torch.arange(count), best].to(own.device)
        return self._batch(latents, prompts, is_prior=False)

    def _prior_of_old(self, own: Tensor) -> Batch:
        """Pictures that the pretrained model draws of the stored prompts, with class nouns for concepts."""
        bank = self.task.bank
        captions = [bank.vocabulary.parse_caption(self._prompt(self.old, i))
                    for i in range(len(self.old.owners))]
        prompts = tuple(caption.plain(bank.infos) for caption in captions)
        parsed = [NO_CONCEPTS.parse_caption(prompt) for prompt in prompts]
        # far from the seeds of the short-term memory and of its replay
        latents = self._pictures(ConceptBank(self.task.backbone.layout), parsed, own, self.seed + 2**31,
                                 self.config.prior_cfg)
        return self._batch(latents.to(own.device), prompts, is_prior=True)

    def on_batch(self, batch: Batch) -> Batch:
        """Appends replayed rows, with weights that make the trainer's mean over all rows Eq. 4."""
        c = self.config
        batch = replace(batch, weights=torch.where(batch.is_prior, c.beta * batch.weights, batch.weights))
        if self.short is None or not (c.alpha or c.mu):
            return batch
        # Seeded by the step and not by one running generator, so that an interrupted step is drawn alike.
        seed = (self.seed + 7919 * self.steps + 104729 * self.batches) % 2**63
        generator = torch.Generator().manual_seed(seed)
        wanted = [(self.short, c.replay, c.alpha)]
        wanted += [] if self.prior is None else [(self.prior, c.old_prior, c.beta)]
        old, total = len(set(self.old.owners)), len(batch) + sum(count for _, count, _ in wanted)
        drawn = []
        for memory, count, weight in wanted:
            rows = memory.rows(torch.multinomial(memory.weights, count, replacement=True,
                                                 generator=generator))
            drawn.append(replace(rows, weights=torch.full((count,), weight * old * total / count)))
        return self.teacher.extend(batch, reduce(Batch.joined, drawn), c.replay)

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """ECD on the replayed rows, whose prompts have old words only."""
        distance = self.teacher.distillation(seen, self.config.elasticity) if self.config.mu > 0 else None
        return {} if distance is None else {"distillation": self.config.mu * distance}

    def shared_state(self) -> dict[str, Tensor]:
        memory = self.old
        if self.new is not None:
            owner = self.words.stored(stored_dtype(self.config.stored)).digest()
            memory = memory.joined(replace(self.new, owners=(owner,) * len(self.new.prompts)))
        return memory.tensors() if memory.owners else {}

    def extra_state(self) -> dict[str, Any]:
        return {name: None if memory is None else {"latents": memory.latents}
                for name, memory in (("short", self.short), ("prior", self.prior))}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        for name in ("short", "prior"):
            memory = getattr(self, name)
            if memory is not None and state.get(name) is not None:      # older checkpoints have no prior ones
                latents = state[name]["latents"].to(memory.latents.device)
                setattr(self, name, replace(memory, latents=latents))
