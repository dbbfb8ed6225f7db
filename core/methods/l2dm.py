"""L2DM: create your world, lifelong text-to-image diffusion (Sun et al., TPAMI 2024, arXiv 2309.04430).

The paper's, as far as it could be read: a long-term memory of features and prompts of every real training picture, no pictures (Alg. 1);
before every later task pictures are generated for each stored prompt with the current model, and a score (Eq. 5) keeps one for every stored
feature in a short-term memory; TAME (Eq. 4) replays the short-term memory with weight alpha, beside prior preservation with weight beta;
ECD distils the previous model, the teacher, on the short-term memory (Fig. 2); what Fig. 2 draws as trained is cross-attention. For how it
puts several concepts into one picture (the attention artists) see regional.artists.

Ours, since no code was available: the trained part is low-rank keys and values on top of all tasks before, and the concept's words (its
identifier and class noun): a bank holds deltas, and full keys and values would cost 19 million values per concept on SD1.5; rank 8 on two
projections has as many weights as CIDM's rank 4 on four. Features are those of `l2dm_memory.unet_features`, a stand-in for the paper's
CLIP image features, which a base model does not bring along; `L2DM.features` takes another extractor. Candidates for a stored feature are
the pictures of its own prompt. Every batch replays `replay` pictures, each old task as likely, so that a step's price does not grow with
the bank; the term is weighted by the number of old tasks, which makes it the sum of Eq. 4 in expectation. Of Eq. 4's prior pictures those
of the present task's class are used, as they come with the data. ECD compares the UNet's outputs (noise in the paper, v where the base
predicts v) and weighs every sample alike: what makes it "elastic" could not be read.
Unknown: alpha, beta, mu, eta, how pictures are generated, learning rates, steps, rank.

The short-term memory is made anew per task, before anything is folded into the weights. A resumed run makes it again and then takes the
one of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..bank.composition import SUM
from ..bank.tokens import TokenGroup
from ..data.batch import Batch
from ..errors import ConceptError
from ..model.backbone import AttentionProcessor
from .base import AdapterProcessor, Forward, LearnedWords, LowRankAdapters, Method, Outcome, Task, register, require, stored_dtype
from .l2dm_memory import Features, LongTerm, ShortTerm, rainbow_scores, unet_features, words_digest

if TYPE_CHECKING:      # it imports the methods' Batch
    from ..data.training_set import TrainingData


@dataclass(frozen=True)
class L2DMConfig:
    """alpha: of the replay term (Eq. 4); beta: of prior pictures (Eq. 4), times the training's prior_weight; mu: of distillation; eta:
    pictures generated per stored prompt; closeness: of the likeness to the real picture in the selection (Eq. 5's beta); replay: short-term
    pictures per batch; generation_steps, cfg: how pictures are generated. With guidance (cfg above 1) each task's replay exaggerates what
    the task before had exaggerated: over ten tasks of the embedded base, cfg 3 in place of 1 halved image alignment."""

    rank: int = 8
    scale: float = 1.0
    lr: float = 1e-4
    token_lr: float = 1e-3
    layerwise: bool = True
    alpha: float = 1.0
    beta: float = 1.0
    mu: float = 1.0
    eta: int = 2
    closeness: float = 1.0
    replay: int = 1
    generation_steps: int = 25
    cfg: float = 1.0
    first_std: float = 0.0
    stored: str = "float16"

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 128, "rank", self.rank, "1 to 128")
        for name in ("eta", "generation_steps", "replay"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("lr", "token_lr", "first_std", "alpha", "beta", "mu", "closeness", "cfg"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


class L2DM(Method):
    """features: how pictures are described in the memory; set before `begin`, the same for a whole bank."""

    composition = SUM
    wants_prior = True
    learns_alone = True      # each pass replays its own pictures
    features: Features = staticmethod(unet_features)

    def __init__(self, config: L2DMConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, self.task = self.config, task
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.adapters = LowRankAdapters(task.backbone.layout, c.rank, c.scale, task.generator, task.backbone.device, ("to_k", "to_v"))
        self.seed = int(torch.randint(2**31, (1,), generator=task.generator))
        self.steps, self.draws = 0, 0
        self.old, self.new, self.short = self._living(LongTerm.read(task.bank.shared.get(self.name, {}))), None, None
        self.joined: tuple[Batch, int] | None = None      # the last batch with replay, and where its replay begins

    def _living(self, memory: LongTerm) -> LongTerm:
        """What belongs to concepts that the bank still holds; `names` says which is whose."""
        bank = self.task.bank
        known = {words_digest(bank[name].tokens): name for name, info in bank.infos.items() if info.method == self.name}
        keep = [i for i, owner in enumerate(memory.owners) if owner in known and self._readable(self._prompt(memory, i, known))]
        memory = memory.rows(keep)
        self.names = {owner: known[owner] for owner in dict.fromkeys(memory.owners)}
        return memory

    @staticmethod
    def _prompt(memory: LongTerm, row: int, names: Mapping[str, str]) -> str:
        return memory.prompts[row].replace("<>", f"<{names[memory.owners[row]]}>")

    def _readable(self, prompt: str) -> bool:
        """A caption may name other concepts, which may have gone since."""
        return self.task.bank.vocabulary.knows(prompt)

    def on_data(self, data: TrainingData) -> None:
        """Describes the task's own pictures for the long-term memory (mirrored copies left out) and fills the short-term memory."""
        own = (~data.is_prior).nonzero().squeeze(1)
        own = own[::max(1, len(own) // max(1, len(data.digests)))]
        device = data.latents.device
        found = self.features(self.task.backbone, data.latents[own.to(device)]).float().cpu()
        if len(self.old.owners) and self.old.features.shape[1] != found.shape[1]:
            raise ConceptError(f"the bank's long-term memory of '{self.name}' has features of length {self.old.features.shape[1]}, this "
                               f"run's have {found.shape[1]}; allowed: one feature function for a whole bank")
        mine = f"<{self.task.name}>"
        self.new = LongTerm(found, ("",) * len(own), tuple(data.captions[i].replace(mine, "<>") for i in own.tolist()))
        if len(self.old.owners):
            self.short = self._generated(data.latents.shape[-2:], device)

    @torch.no_grad()
    def _generated(self, size: tuple[int, int], device: torch.device) -> ShortTerm:
        """The short-term memory by Eq. 5, from pictures of the current model: all that the bank holds."""
        from ..sampling.sampling import sample  # here: it imports the methods
        from ..sampling.settings import SampleSettings

        c, backbone, count = self.config, self.task.backbone, len(self.old.owners)
        prompts = [self._prompt(self.old, i, self.names) for i in range(count)]
        pixels = tuple(side * backbone.picture_multiple for side in size)
        settings = SampleSettings(steps=c.generation_steps, cfg=c.cfg, size=pixels, batch=4)
        asked = [prompt for prompt in prompts for _ in range(c.eta)]
        pictures = sample(backbone, self.task.bank, asked, [self.seed + i for i in range(len(asked))], settings)
        # contiguous, as a checkpoint gives them back: another layout in memory rounds otherwise
        latents = torch.cat([backbone.encode_images(chunk) for chunk in pictures.split(4)]).contiguous()
        candidates = torch.arange(len(asked)).view(count, c.eta)
        scores = rainbow_scores(self.features(backbone, latents).float().cpu(), candidates, self.old.features, c.closeness)
        best = candidates.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
        numbers = {owner: i for i, owner in enumerate(self.names)}
        return ShortTerm(latents[best.to(latents.device)].to(device), tuple(prompts), torch.tensor([numbers[o] for o in self.old.owners]))

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr},
                {"params": list(self.adapters.parameters()), "lr": self.config.lr}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        return AdapterProcessor(self.adapters)

    def on_batch(self, batch: Batch) -> Batch:
        """Adds replay. Weights are such that the loop's mean over all rows is the mean over the given ones plus alpha times the sum over
        old tasks of their expected loss."""
        c = self.config
        batch = replace(batch, weights=torch.where(batch.is_prior, c.beta * batch.weights, batch.weights))
        if self.short is None or not (c.alpha or c.mu):
            return batch
        # By step and not from one running generator: a step that was broken off is drawn again the same.
        generator = torch.Generator().manual_seed((self.seed + 7919 * self.steps + 104729 * self.draws) % 2**63)
        self.draws += 1
        rows, given = self.short.draw(c.replay, generator), len(batch.prompts)
        latents = self.short.latents[rows.to(self.short.latents.device)].to(batch.latents)
        total = given + len(rows)
        weight = torch.full((len(rows),), c.alpha * self.short.task_count * total / len(rows))
        joined = Batch(torch.cat([batch.latents, latents]), batch.prompts + tuple(self.short.prompts[i] for i in rows.tolist()),
                       torch.cat([batch.masks, torch.ones_like(latents[:, :1]).to(batch.masks)]),
                       torch.cat([batch.is_prior, torch.zeros(len(rows), dtype=torch.bool).to(batch.is_prior)]),
                       torch.cat([batch.weights * total / given, weight.to(batch.weights)]))
        self.joined = joined, given
        return joined

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """ECD: mean squared difference between the UNet's outputs of the previous model and of this one, on the replayed rows. The previous
        model is what lies folded in the weights, without this task's deltas; replayed prompts have old words only."""
        if self.config.mu == 0 or self.joined is None or seen.batch is not self.joined[0]:
            return {}
        rows = slice(self.joined[1], None)
        with torch.no_grad():
            context = seen.context[rows]
            teacher = self.task.backbone.predict(seen.noisy[rows], seen.timesteps[rows], context)
        return {"distillation": self.config.mu * (seen.output[rows].float() - teacher).square().mean()}

    def after_step(self, step: int) -> None:
        self.steps, self.draws = step, 0

    def finish(self) -> Outcome:
        dtype = stored_dtype(self.config.stored)
        tokens, memory = self.words.stored(dtype), self.old
        if self.new is not None:
            memory = memory.joined(replace(self.new, owners=(words_digest(tokens),) * len(self.new.prompts)))
        return Outcome(tokens, self.adapters.stored(dtype), memory.tensors() if memory.owners else {})

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters, "memory": _Memory(self)})


class _Memory(nn.Module):
    """Lets a checkpoint carry the short-term memory and how many steps were drawn from it."""

    def __init__(self, method: L2DM) -> None:
        super().__init__()
        self.method = [method]

    def get_extra_state(self) -> dict:
        m = self.method[0]
        short = None if m.short is None else {"latents": m.short.latents, "prompts": list(m.short.prompts), "tasks": m.short.tasks}
        return {"steps": m.steps, "short": short}

    def set_extra_state(self, state: dict) -> None:
        m, short = self.method[0], state["short"]
        m.steps = int(state["steps"])
        if short is not None:
            m.short = ShortTerm(short["latents"].to(m.task.backbone.device), tuple(short["prompts"]), short["tasks"])


register("l2dm", L2DMConfig, L2DM, "replays generated pictures of old concepts, chosen by a memory of features, and distils the old model")
