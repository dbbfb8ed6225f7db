"""STAMINA: stacked-and-masked low-rank adaptation (Smith et al., CVPR workshops 2024, arXiv 2311.18763), by the authors of C-LoRA.

The paper's, as far as its abstract tells: low-rank adapters of one task after another, stacked, each times a learnable hard mask that is
itself parametrised with low-rank MLPs; words that MLPs make; all of it is folded into the weights afterwards and costs nothing then.
Recalled, not verified: `dW_t = (A_t B_t) (.) M_t`, M_t by a hard Gumbel softmax with a sparsity penalty, C-LoRA's penalty kept, a word =
MLP(fixed random input). From C-LoRA: keys and values alone, one random word without class noun, rank 16 and its rates.

Ours: `M = 1[U V + beta + g > 0]` with U V of rank `mask_rank`, one beta per projection, logistic noise g (the difference of two Gumbels)
in training and none at the end, gradient straight through at `temperature`; the sparsity penalty is the expected share of kept entries,
times `sparsity`, in every task; the words' MLP has one hidden layer (tanh) and starts at a random word; all numbers that C-LoRA does
not give.
Unknown: all of these, and what the penalty's weight was.

The record is sparse: the kept entries of the product. A step builds a×b matrices, product, mask and noise; the formula asks for them.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank.tokens import TokenGroup
from ..data.batch import Batch
from ..model.backbone import AttentionProcessor
from ..model.deltas import DeltaKey, SparseDelta
from ..model.sites import Site
from .base import Forward, LearnedWords, Task, adapter_key, kept, register, require, stored_dtype, wide_enough
from .clora import CLoRA, CLoRAConfig, forgetting


@dataclass(frozen=True)
class StaminaConfig(CLoRAConfig):
    """As C-LoRA's, and, all ours: mask_rank: of the mask's logits; keep: share of entries that masks start with; temperature: of the
    gradient through the mask; sparsity: weight of the share of kept entries; mask_lr: the logits' rate; hidden: width of the words' MLP."""

    mask_rank: int = 8
    keep: float = 0.9
    temperature: float = 1.0
    sparsity: float = 1e-2
    mask_lr: float = 5e-3
    hidden: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.mask_rank <= 128, "mask_rank", self.mask_rank, "1 to 128")
        require(0 < self.keep < 1, "keep", self.keep, "between 0 and 1")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.sparsity >= 0, "sparsity", self.sparsity, "0 or more")
        require(self.mask_lr >= 0, "mask_lr", self.mask_lr, "0 or more")
        require(1 <= self.hidden <= 4096, "hidden", self.hidden, "1 to 4096")


class GeneratedWords(nn.Module):
    """Token vectors that an MLP makes of one fixed random input; they start where `learned` does."""

    def __init__(self, learned: LearnedWords, task: Task, hidden: int) -> None:
        super().__init__()
        self.names, device = learned.names, task.backbone.device
        given = torch.randn(hidden, generator=task.generator)
        first = torch.randn(hidden, hidden, generator=task.generator)
        # Sizes such that a step of token_lr moves a hidden unit's input by token_lr, and a vector as far as it does in other methods.
        given /= given.abs().sum()
        first *= hidden**0.5 / (first @ given).norm()
        self.share = 1.0 / float((first @ given).tanh().abs().sum())
        self.register_buffer("given", given.to(device))
        self.first = nn.Parameter(first.to(device))
        self.last, self.starts = nn.ParameterDict(), nn.Module()
        for name, vectors in learned.vectors.items():
            self.starts.register_buffer(name, vectors.detach().clone())
            self.last[name] = nn.Parameter(torch.zeros(*vectors.shape, hidden, device=device))

    def group(self) -> TokenGroup:
        hidden = self.share * (self.first @ self.given).tanh()
        return TokenGroup(self.names, {name: getattr(self.starts, name) + last @ hidden for name, last in self.last.items()})

    def stored(self, dtype: torch.dtype) -> TokenGroup:
        return TokenGroup(self.names, {name: kept(v, dtype) for name, v in self.group().vectors.items()})


class LowRankMasks(nn.Module):
    """Logits `U V + beta` `[a, b]` of every projection's mask; above 0 an entry is kept."""

    def __init__(self, task: Task, keys: list[DeltaKey], config: StaminaConfig) -> None:
        super().__init__()
        self.left, self.right, self.offset = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for index, projection in keys:
            (a, b), name = task.backbone.layout.sites[index].shape(projection), adapter_key(index, projection)
            right = torch.randn(config.mask_rank, b, generator=task.generator).to(task.backbone.device)
            self.left[name] = nn.Parameter(torch.zeros(a, config.mask_rank, device=right.device))
            self.right[name] = nn.Parameter(right)
            self.offset[name] = nn.Parameter(torch.full((), math.log(config.keep / (1 - config.keep)), device=right.device))

    def logits(self, key: DeltaKey) -> Tensor:
        name = adapter_key(*key)
        return self.left[name] @ self.right[name] + self.offset[name]


def hard_mask(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """0 or 1 with P(1) = sigmoid(logits); its gradient is that of `sigmoid((logits + g) / temperature)`. uniform: in 0..1, makes g."""
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((logits + uniform.log() - (-uniform).log1p()) / temperature)
    return (soft > 0.5).to(soft) + (soft - soft.detach())


class _MaskedProgram(AttentionProcessor):
    """Adds the masked products while training."""

    def __init__(self, method: Stamina) -> None:
        self.method = method

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        key = (site.index, projection)
        return y if key not in self.method.numbers else y + F.linear(x, self.method.product(key).to(x.dtype)).to(y.dtype)


class Stamina(CLoRA):
    config: StaminaConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.words = GeneratedWords(self.words, task, self.config.hidden)
        self.masks = LowRankMasks(task, self.adapters.keys, self.config)
        self.numbers = {key: number for number, key in enumerate(self.adapters.keys)}
        self.entries = sum(math.prod(task.backbone.layout.sites[index].shape(projection)) for index, projection in self.numbers)
        self.seed = int(torch.randint(2**31, (1,), generator=task.generator))
        self.steps, self.batches = 0, 0

    def parameter_groups(self) -> list[dict]:      # decay would pull masks to where half of the entries are kept
        return [*super().parameter_groups(), {"params": list(self.masks.parameters()), "lr": self.config.mask_lr, "weight_decay": 0.0}]

    def processor(self) -> AttentionProcessor:
        return _MaskedProgram(self)

    def on_batch(self, batch: Batch) -> Batch:
        self.batches += 1
        return batch

    def product(self, key: DeltaKey) -> Tensor:
        """`(A_t B_t) (.) M_t` `[a, b]` with gradient. The noise is that of the batch: the same however often it is asked for."""
        logits = self.masks.logits(key)
        place = zlib.crc32(f"{self.seed} {self.steps} {self.batches} {self.numbers[key]}".encode())      # a seed's lower 32 bits count
        generator = torch.Generator(logits.device).manual_seed(place)
        noise = torch.rand(logits.shape, generator=generator, device=logits.device)
        return super().product(key) * hard_mask(logits, noise, self.config.temperature)

    def forgotten(self) -> Tensor:
        return forgetting(self.past, self.product)

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        terms = super().penalty(seen)
        if self.config.sparsity > 0:
            kept = sum(torch.sigmoid(self.masks.logits(key)).sum() for key in self.numbers) / self.entries
            terms["sparsity"] = self.config.sparsity * kept
        return terms

    def after_step(self, step: int) -> None:
        self.steps, self.batches = step, 0

    @torch.no_grad()
    def folded(self, key: DeltaKey) -> tuple[Tensor, Tensor]:
        """The product as it is kept, without noise: places int32 `[k]` and values `[k]`."""
        places = (self.masks.logits(key) > 0).flatten().nonzero().squeeze(1)
        return places.int(), super().product(key).flatten()[places]

    @torch.no_grad()
    def norm(self) -> Tensor:
        return torch.stack([self.folded(key)[1].square().sum() for key in self.numbers]).sum().sqrt()

    @torch.no_grad()
    def monitors(self) -> dict[str, float]:
        """norm: as C-LoRA's, of the kept entries; kept: their share."""
        kept = torch.stack([(self.masks.logits(key) > 0).sum() for key in self.numbers]).sum()
        return {"norm": float(self.norm()), "kept": float(kept) / self.entries}

    def _recorded(self) -> dict[DeltaKey, SparseDelta]:
        layout, folded = self.task.backbone.layout, {key: self.folded(key) for key in self.numbers}
        dtype = wide_enough(stored_dtype(self.config.stored), (values for _, values in folded.values()))
        return {(index, part): SparseDelta(layout.sites[index].shape(part), places.cpu().clone(), values.to(dtype).cpu().clone())
                for (index, part), (places, values) in folded.items()}

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({**super().modules(), "masks": self.masks, "place": _Place(self)})


class _Place(nn.Module):
    """Lets a checkpoint carry which step this is: the noise follows from it."""

    def __init__(self, method: Stamina) -> None:
        super().__init__()
        self.method = [method]

    def get_extra_state(self) -> dict:
        return {"steps": self.method[0].steps}

    def set_extra_state(self, state: dict) -> None:
        self.method[0].steps, self.method[0].batches = int(state["steps"]), 0


register("stamina", StaminaConfig, Stamina, "C-LoRA with learned hard masks: each task changes few entries of the keys and values")
