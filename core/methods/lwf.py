"""LwF: sequential finetuning that keeps the old model's answers (Li and Hoiem, ECCV 2016, arXiv 1606.09282).

The paper's: no old data; on the new data the outputs of the old tasks should stay what the old network gave. It weighs that term with 1.

Read for diffusion models, ours, since CIDM's table has LwF without saying how: every own picture of the batch comes a second time, with
its own noise and another wish: the caption with an old concept, or the class noun, in the new concept's place, in turn. There the current
model should predict what the model before this task predicts, `distil ||eps_t-1(z_t, c_old) - eps_t(z_t, c_old)||^2`, mean over entries.
The caption itself cannot be asked that: the new concept's prediction has to change. The old model is the base with the old sum folded in,
which is what training starts from: the teacher is a pass without the adapter, no copy of anything. A step after the first task costs a
forward pass of the base, and forward and backward of twice the pictures.
What is trained, and what is recorded, is `finetune`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..model.backbone import AttentionProcessor
from .base import Forward, Task, register, require
from .finetune import Finetune, FinetuneConfig


@dataclass(frozen=True)
class LwFConfig(FinetuneConfig):
    """distil: weight of the old model's answers; 1 is the paper's for classes, whether it fits pictures is unknown."""

    distil: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.distil >= 0, "distil", self.distil, "0 or more")


class LwF(Finetune):
    learns_alone = True      # wishes of old are asked in turn, pass by pass

    config: LwFConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.task, self.steps, self.asked = task, 0, 0
        self.extended, self.added = None, 0      # this step's own batch, and how many of its rows are wishes of old
        old = [f"<{name}>" for name, info in task.bank.infos.items() if info.method == self.name]
        self.wishes = tuple(old + [task.class_noun] * bool(task.class_noun)) if old and self.config.distil > 0 else ()

    def on_batch(self, batch: Batch) -> Batch:
        """Adds the own pictures with the wishes of old. They have weight 0 in the denoising loss, the others so much more that its mean
        stays the same; to everybody else they are prior pictures."""
        own = (~batch.is_prior).nonzero().squeeze(1)
        if not self.wishes or not len(own):
            return batch
        self.added = len(own)
        prompts = [self._asking_for(batch.prompts[i], self._next_wish()) for i in own.tolist()]
        weights = batch.weights * ((len(batch.prompts) + len(own)) / len(batch.prompts))
        self.extended = Batch(torch.cat([batch.latents, batch.latents[own]]), (*batch.prompts, *prompts),
                              torch.cat([batch.masks, batch.masks[own]]), torch.cat([batch.is_prior, torch.ones_like(batch.is_prior[own])]),
                              torch.cat([weights, torch.zeros_like(weights[own])]))
        return self.extended

    def _next_wish(self) -> str:
        """All in turn, from a place that the step tells: a resumed run asks as the uninterrupted one."""
        wish = self.wishes[(self.steps + self.asked) % len(self.wishes)]
        self.asked += 1
        return wish

    def _asking_for(self, prompt: str, wish: str) -> str:
        for word in (self.task.name, *self.task.word_names):
            prompt = prompt.replace(f"<{word}>", wish)
        return prompt

    def processor(self) -> AttentionProcessor:
        kind = self.task.backbone.device.type      # the one call inside the loop's autocast: the teacher has to compute alike
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return super().processor()

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """What the added rows are for; from the second task on."""
        if self.extended is None or seen.batch is not self.extended:
            return {}
        rows = slice(len(seen.batch.prompts) - self.added, None)
        context = replace(seen.context[rows], hidden=seen.context.hidden[rows].detach())
        kind, dtype, enabled = self.autocast
        with torch.no_grad(), torch.autocast(kind, dtype, enabled):
            taught = self.task.backbone.predict(seen.noisy[rows], seen.timesteps[rows], context)
        return {"distil": self.config.distil * (seen.output[rows].float() - taught.float()).square().mean()}

    def after_step(self, step: int) -> None:
        self.steps, self.asked, self.extended = step, 0, None

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({**super().modules(), "place": _Place(self)})


class _Place(nn.Module):
    """Lets a checkpoint carry which step this is."""

    def __init__(self, method: LwF) -> None:
        super().__init__()
        self.method = [method]

    def get_extra_state(self) -> dict:
        return {"steps": self.method[0].steps}

    def set_extra_state(self, state: dict) -> None:
        self.method[0].steps, self.method[0].asked = int(state["steps"]), 0


register("lwf", LwFConfig, LwF, "sequential finetuning that keeps, on the new pictures, the old model's answers to old wishes")
