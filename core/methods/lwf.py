"""LwF, learning without forgetting: finetuning that keeps the old model's answers (Li and Hoiem, ECCV 2016,
1606.09282).

From the paper: no old data. On the new data, the outputs for the old tasks should stay what the old network
gave. That term has weight 1 there.

Our reading for diffusion models (CIDM's table lists LwF without saying how): every own picture of the batch
comes twice, the second time with its own noise and another request. There an old concept, or the class noun,
replaces the new concept in the caption, in turn. The current model should predict what the model before this
task predicts, `distil ||eps_t-1(z_t, c_old) - eps_t(z_t, c_old)||^2`, mean over entries. The caption itself
cannot serve, because the prediction for the new concept has to change.

After the first task, a step costs one more forward pass of the base, and forward and backward for twice the
pictures. What is trained and recorded is that of `finetune`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.processor import AttentionProcessor
from .base import Forward, Task, register
from .distillation import distillation
from .finetune import Finetune
from .low_rank import LowRankConfig


@dataclass(frozen=True)
class LwFConfig(LowRankConfig):
    """distil: weight of the distillation; 1 is the paper's for classification, untested for pictures."""

    distil: float = 1.0


class LwF(Finetune):
    learns_alone = True      # old requests are taken in turn, forward pass by forward pass
    extra_key = "place._extra_state"
    config: LwFConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.asked = 0
        # this step's batch, and its first row with an old request
        self.extended: tuple[Batch, int] | None = None
        old = [f"<{name}>" for name, info in task.bank.infos.items() if info.method == self.name]
        requests = old + [task.class_noun] * bool(task.class_noun)
        self.requests = tuple(requests) if old and self.config.distil > 0 else ()

    def on_batch(self, batch: Batch) -> Batch:
        """Appends the own pictures with old requests.

        These rows have weight 0 in the denoising loss, and the weights of the others grow so that its mean
        stays the same. They are marked as prior pictures, so that the attention regulariser and the like
        leave them out.
        """
        own = (~batch.is_prior).nonzero().squeeze(1)
        if not self.requests or not len(own):
            return batch
        asked = batch.rows(own)
        asked = replace(asked, prompts=tuple(self._next_request(prompt) for prompt in asked.prompts),
                        is_prior=torch.ones_like(asked.is_prior), weights=torch.zeros_like(asked.weights))
        share = (len(batch) + len(own)) / len(batch)
        self.extended = replace(batch, weights=batch.weights * share).joined(asked), len(batch)
        return self.extended[0]

    def _next_request(self, prompt: str) -> str:
        """The caption with the next old request. The step decides where the turn starts, for resumed runs."""
        request = self.requests[(self.steps + self.asked) % len(self.requests)]
        self.asked += 1
        for word in (self.task.name, *self.task.word_names):
            prompt = prompt.replace(f"<{word}>", request)
        return prompt

    def processor(self) -> AttentionProcessor:
        # called inside the trainer's autocast, which the teacher must share
        kind = self.task.backbone.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return super().processor()

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """The distillation over the appended rows, from the second task on."""
        if self.extended is None or seen.batch is not self.extended[0]:
            return {}
        with torch.autocast(*self.autocast):
            return {"distil": self.config.distil * distillation(self.task.backbone, seen, self.extended[1])}

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.asked, self.extended = 0, None


register("lwf", LwFConfig, LwF,
         "sequential finetuning that keeps, on the new pictures, the old model's answers to old requests")
