"""The trainers that are compared: our methods, and PEFT's LoRA in the loop of common scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.conditioning.encoding import encode_prompts
from ...core.data.assignment import Assignment
from ...core.data.framing import Framing
from ...core.data.training_set import prepare
from ...core.demo.base import load_base
from ...core.demo.bases import file_of
from ...core.hosts.diffusers import DiffusersBackbone
from ...core.methods.base import Task, make
from ...core.model.context import Context
from ...core.sampling.sampling import sample
from ...core.training.loop import learn
from ..continual import embedded
from ..continual.judges import ENCODER
from ..continual.prompt_suite import PromptSuite
from .curves import Point, curve

RANK, BATCH = 4, 4


@dataclass(frozen=True)
class Subject:
    """A concept with its floor and ceiling. levels: score of class nouns and of real pictures."""

    suite: PromptSuite
    task: Assignment
    levels: tuple[float, float]

    def likeness(self, pictures: Tensor) -> float:
        """Share of the way from class noun to real pictures, of pictures `[B, 3, H, W]` in -1..1."""
        floor, ceiling = self.levels
        return (self.score(pictures) - floor) / (ceiling - floor)

    def score(self, pictures: Tensor) -> float:
        return float(self.suite.judges[ENCODER].scores(pictures, [self.task.name]).mean())

    def prompts(self, nouns: bool) -> list[str]:
        given = self.task.noun_prompts if nouns else self.task.prompts
        return [given[i % len(given)] for i in range(len(self.suite.seeds))]


def drawn(backbone: DiffusersBackbone, subject: Subject, bank: ConceptBank | None = None) -> Tensor:
    """Pictures of the concept in a bank; without one, of its class noun."""
    nouns, bank = bank is None, bank or ConceptBank(backbone.layout)
    return sample(backbone, bank, subject.prompts(nouns), subject.suite.seeds, subject.suite.settings)


def subject_of(backbone: DiffusersBackbone, suite: PromptSuite, task: Assignment) -> Subject:
    """Measures floor and ceiling of a concept."""
    plain = Subject(suite, task, (0.0, 1.0))
    return Subject(suite, task, (plain.score(drawn(backbone, plain)), plain.score(task.held_out)))


def ours(backbone: DiffusersBackbone, subject: Subject, method: str, settings: Mapping, steps: int, seed: int,
         marks: Sequence[int]) -> list[Point]:
    """The curve of one of our methods."""
    task, config = subject.task, embedded.training(steps, seed, backbone.picture_size)
    data = prepare(backbone, list(task.pictures), task.name, task.class_noun,
                   Framing(config.resolution, config.framing, config.flip))
    wanted = Task(task.name, task.class_noun, backbone, ConceptBank(backbone.layout), task.kind,
                  generator=torch.Generator().manual_seed(seed))
    banks: dict[int, Callable[[], ConceptBank]] = {}

    def train(after: Callable[[int], None]) -> None:
        def callback(info) -> None:
            banks[info.step] = info.snapshot
            after(info.step)

        learn(wanted, make(method, settings), data, config, callback)

    return curve(train, marks, lambda step: subject.likeness(drawn(backbone, subject, banks[step]())))


def _encoded(backbone: DiffusersBackbone, subject: Subject) -> tuple[Tensor, list[Context]]:
    """Latents `[N, C, h, w]` of the training pictures and their mirror images, and their captions' contexts.

    Captions hold the class noun: a LoRA without words of its own overwrites it, which is the quickest way.
    """
    task, side = subject.task, backbone.picture_size
    data = prepare(backbone, list(task.pictures), task.name, task.class_noun, Framing(side, "crop", True))
    nouns = [caption.replace(f"<{task.name}>", task.class_noun) for caption in data.captions]
    parse = ConceptBank(backbone.layout).parse
    with torch.no_grad():
        return data.latents, [encode_prompts(backbone, [parse(noun)], {}) for noun in nouns]


def peft(subject: Subject, base: str, rate: float, steps: int, seed: int,
         marks: Sequence[int]) -> list[Point]:
    """The curve of a LoRA of PEFT on the same projections, at a constant rate, with texts encoded in advance.

    It has a base of its own, because PEFT changes the modules.
    """
    from peft import LoraConfig

    backbone = load_base(file_of(base))
    latents, contexts = _encoded(backbone, subject)
    unet = backbone.unet.requires_grad_(False)
    torch.manual_seed(seed)      # PEFT draws from the global generator
    names = [f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=rate)
    generator = torch.Generator().manual_seed(seed)

    def train(after: Callable[[int], None]) -> None:
        for step in range(1, steps + 1):
            rows = torch.randint(len(latents), (BATCH,), generator=generator).tolist()
            t = torch.randint(len(backbone.schedule), (BATCH,), generator=generator)
            x, noise = latents[rows], torch.randn(BATCH, *latents.shape[1:], generator=generator)
            text = Context.cat([contexts[row] for row in rows])
            output = backbone.predict(backbone.schedule.add_noise(x, noise, t), t, text)
            F.mse_loss(output.float(), backbone.schedule.target(x, noise, t)).backward()
            optimizer.step()
            optimizer.zero_grad()
            after(step)

    return curve(train, marks, lambda _: subject.likeness(drawn(backbone, subject)))
