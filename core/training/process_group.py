"""Several processes that learn one concept together (`torchrun ... learn`): each takes a share of every batch, gradients are averaged.

All of them draw the whole batch from the same seed, so what is learned is what one process learns with that batch, up to the order of
sums. Files are written by the first alone.
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

PATIENCE = timedelta(days=2)      # a process may measure for hours while another waits


@dataclass(frozen=True)
class Team:
    """rank: this process's number, 0 to size - 1."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> Tensor:
        """This process's rows of a batch of `count`; ConceptError where they cannot be shared equally."""
        if count % self.size:
            raise ConceptError(f"a batch has {count} pictures; with {self.size} processes allowed: a multiple of {self.size}")
        return torch.arange(self.rank, count, self.size)

    def mean(self, value: float) -> float:
        """A number averaged over processes."""
        return value if self.size == 1 else float(self._summed(torch.tensor(value))) / self.size

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """In place, all in one exchange. A parameter without a gradient anywhere stays without; one that has it somewhere has it then."""
        if self.size == 1:
            return
        has = torch.tensor([float(p.grad is not None) for p in parameters])
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
        both = self._summed(torch.cat([has.to(flat), flat]))
        for parameter, is_there, part in zip(parameters, both[:len(has)].tolist(),
                                             both[len(has):].split([p.numel() for p in parameters]), strict=True):
            if is_there:
                parameter.grad = part.view_as(parameter).div(self.size).to(parameter)

    def _summed(self, values: Tensor) -> Tensor:
        device = values.device
        values = values.cuda() if dist.get_backend() == "nccl" else values.cpu()
        dist.all_reduce(values)
        return values.to(device)

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()


ALONE = Team()


def _is_launched() -> bool:
    """Whether torchrun, or what builds on it, started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def own_device(device: str) -> str:
    """`cuda` becomes this process's own card on a machine of several."""
    return f"cuda:{dist.get_node_local_rank()}" if device == "cuda" and _is_launched() else device


@contextmanager
def together(device: str = "cpu") -> Iterator[Team]:
    """The processes that were started for this command; alone, without any exchange, where it is one."""
    if not _is_launched():
        yield ALONE
        return
    is_on_card = device.startswith("cuda")
    if is_on_card:
        torch.cuda.set_device(torch.device(own_device(device)))
    dist.init_process_group("nccl" if is_on_card else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
