"""Data-parallel training of one concept by several processes (`torchrun ... learn`).

Each process takes a share of every batch, and gradients are averaged. All processes draw the whole batch from
the same seed, so the result equals that of a single process up to the order of sums. Only the first process
writes files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConceptError

TIMEOUT = timedelta(days=2)      # one process may evaluate for hours while the others wait


@dataclass(frozen=True)
class ProcessGroup:
    """rank: this process's number, 0 to size - 1; size: the number of processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> Tensor:
        """This process's rows of a batch of `count`. Raises ConceptError unless the batch can be divided
        equally.
        """
        if count % self.size:
            raise ConceptError(f"a batch has {count} pictures; with {self.size} processes allowed: a "
                               f"multiple of {self.size}")
        return torch.arange(self.rank, count, self.size)

    def mean(self, value: float) -> float:
        """A number averaged over processes."""
        return value if self.size == 1 else float(self._summed(torch.tensor(value))) / self.size

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Averages the gradients over processes, in place and in one exchange.

        Afterwards each parameter has a gradient either in all processes or in none.
        """
        if self.size == 1:
            return
        has = torch.tensor([float(p.grad is not None) for p in parameters])
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float()
                          for p in parameters])
        both = self._summed(torch.cat([has.to(flat), flat]))
        parts = both[len(has):].split([p.numel() for p in parameters])
        for parameter, present, part in zip(parameters, both[:len(has)].tolist(), parts, strict=True):
            if present:
                parameter.grad = part.view_as(parameter).div(self.size).to(parameter)

    def _summed(self, values: Tensor) -> Tensor:
        device = values.device
        values = values.cuda() if dist.get_backend() == "nccl" else values.cpu()
        dist.all_reduce(values)
        return values.to(device)

    def wait(self) -> None:
        """Blocks until every process has reached this point."""
        if self.size > 1:
            dist.barrier()


ONE_PROCESS = ProcessGroup()


def is_launched() -> bool:
    """Whether torchrun, or a launcher based on it, started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def own_device(device: str) -> str:
    """Resolves `cuda` to this process's graphics card on a machine with several."""
    return f"cuda:{dist.get_node_local_rank()}" if device == "cuda" and is_launched() else device


@contextmanager
def process_group(device: str = "cpu") -> Iterator[ProcessGroup]:
    """Joins the process group of torchrun. Without torchrun, yields a group of one process."""
    if not is_launched():
        yield ONE_PROCESS
        return
    is_on_card = device.startswith("cuda")
    if is_on_card:
        torch.cuda.set_device(torch.device(own_device(device)))
    dist.init_process_group("nccl" if is_on_card else "gloo", timeout=TIMEOUT)
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
