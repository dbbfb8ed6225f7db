"""LwF, learning without forgetting: finetuning that keeps the old model's answers (Li and Hoiem, ECCV 2016,
1606.09282).

From the paper: no old data. On the new data, the outputs for the old tasks should stay what the old network
gave. That term has weight 1 there.

Our reading for diffusion models (CIDM's table lists LwF without saying how): every own picture of the batch
comes twice, the second time with its own noise and another request. In that request, one of the old concepts
or the class noun, in turn, takes the place of the new concept. The current model should predict what the
model before this task predicts, `distil ||eps_t-1(z_t, c_old) - eps_t(z_t, c_old)||^2`, mean over entries.
The caption itself cannot serve, because the prediction for the new concept has to change.

After the first task, a step costs one more forward pass of the base, and forward and backward for twice the
pictures. What is trained and recorded is that of `finetune`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data.batch import Batch
from .base import Forward, Task, register
from .distillation import Teacher
from .finetune import Finetune
from .low_rank import LowRankConfig


@dataclass(frozen=True)
class LwFConfig(LowRankConfig):
    """distil: weight of the distillation; 1 is the paper's for classification, untested for pictures."""

    distil: float = 1.0


@register("lwf", LwFConfig,
          "sequential finetuning that keeps the old model's outputs for old prompts, on the new pictures")
class LwF(Finetune):
    """asked: old requests so far in the step under way."""

    learns_alone = True      # old requests are taken in turn, forward pass by forward pass
    config: LwFConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.asked, self.teacher = 0, Teacher(task.backbone)
        old = [f"<{name}>" for name, info in task.bank.infos.items() if info.method == self.name]
        requests = old + [task.class_noun] * bool(task.class_noun)
        self.requests = tuple(requests) if old and self.config.distil > 0 else ()

    def on_batch(self, batch: Batch) -> Batch:
        """Appends the own pictures with old requests, with weight 0 in the denoising loss.

        They are marked as prior pictures, so that the attention regulariser and the like leave them out.
        """
        own = (~batch.is_prior).nonzero().squeeze(1)
        if not self.requests or not len(own):
            return batch
        asked = batch.rows(own)
        asked = replace(asked, prompts=tuple(self._next_request(prompt) for prompt in asked.prompts),
                        is_prior=torch.ones_like(asked.is_prior), weights=torch.zeros_like(asked.weights))
        return self.teacher.extend(batch, asked)

    def _next_request(self, prompt: str) -> str:
        """The caption with the next old request. The step decides where the turn starts, for resumed runs."""
        request = self.requests[(self.steps + self.asked) % len(self.requests)]
        self.asked += 1
        for word in (self.task.name, *self.task.word_names):
            prompt = prompt.replace(f"<{word}>", request)
        return prompt

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """The distillation over the appended rows, from the second task on."""
        distance = self.teacher.distillation(seen) if self.requests else None
        return {} if distance is None else {"distil": self.config.distil * distance}

    def begin_step(self) -> None:
        super().begin_step()
        self.asked = 0

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.asked = 0
