"""Optimisers by name: those of torch.optim, and those of libraries that may be installed.

A stopped run resumes exactly with each of them; tests/training/test_optimizers.py compares bit by bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ConceptError

# offered choices; other optimisers of torch.optim are accepted
OPTIMIZERS = tuple(name for name in ("AdamW", "Adam", "SGD", "Adafactor", "NAdam", "RAdam")
                   if hasattr(torch.optim, name))      # torch 2.4 has no Adafactor
# with 8-bit optimiser states
EIGHT_BIT = ("AdamW8bit", "Adam8bit", "PagedAdamW8bit", "Lion8bit")
SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
OWN_RATE = ("Prodigy",)      # it finds the learning rate itself, and takes a factor on it
# for weights of two dimensions
MATRICES = tuple(name for name in ("Muon",) if hasattr(torch.optim, name))
# name -> module and, for messages, what to install
LIBRARIES = {"Prodigy": ("prodigyopt", "prodigyopt"), "CAME": ("came_pytorch", "came-pytorch"),
             **dict.fromkeys(SCHEDULE_FREE, ("schedulefree", "schedulefree")),
             **dict.fromkeys(EIGHT_BIT, ("bitsandbytes.optim", "bitsandbytes"))}
UNFIT = {"LBFGS": "needs closures", "SparseAdam": "needs sparse gradients"}


def _library(package: str) -> Any:
    """The module of a package with its optimisers. Raises ImportError if it is not installed."""
    if package == "prodigyopt":
        import prodigyopt

        return prodigyopt
    if package == "schedulefree":
        import schedulefree

        return schedulefree
    if package == "came-pytorch":
        import came_pytorch

        return came_pytorch
    from bitsandbytes import optim

    return optim


def optimizer_class(name: str) -> type[torch.optim.Optimizer] | None:
    """Looks up an optimiser by name; None if it is not installed or cannot train a concept."""
    try:
        home = _library(LIBRARIES[name][1]) if name in LIBRARIES else torch.optim
    except (ImportError, OSError, RuntimeError):      # not installed, or not built for this driver
        return None
    kind = getattr(home, name, None)
    is_optimizer = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    return kind if is_optimizer and kind is not torch.optim.Optimizer and name not in UNFIT else None


def allowed_optimizers() -> str:
    """For messages: what the setting may be."""
    packages: dict[str, list[str]] = {}
    for name, (_, package) in LIBRARIES.items():
        packages.setdefault(package, []).append(name)
    of_libraries = "; ".join(f"{', '.join(names)} where {package} is installed"
                             for package, names in packages.items())
    unfit = ", ".join(f"{name} ({why})" for name, why in UNFIT.items())
    return f"a class of torch.optim such as AdamW, Adam, SGD; {of_libraries}; not {unfit}"


def make_optimizer(name: str, groups: Sequence[dict[str, Any]], weight_decay: float,
                   acts_after_step: bool = False) -> torch.optim.Optimizer:
    """Creates an optimiser.

    Args:
        name: For which `optimizer_class` finds a class.
        groups: Parameter groups with their learning rates. An optimiser that finds its own rate gets 1
            instead.
        weight_decay: Of groups without a value of their own; ignored by optimisers that have none.
        acts_after_step: Whether the method does work of its own after a step.

    Raises:
        ConceptError: The optimiser cannot train these weights, or with this method.
    """
    kind: Any = optimizer_class(name)
    assert kind is not None      # checked by the configuration
    if name in SCHEDULE_FREE and acts_after_step:
        raise ConceptError(f"optimizer '{name}' averages weights over steps, and this method does work of "
                           "its own after every step; allowed with it: optimisers that are not schedule-free")
    own_rate = {"lr": 1.0} if name in OWN_RATE else {}
    has_decay = "weight_decay" in inspect.signature(kind).parameters
    decay: dict[str, Any] = {"weight_decay": weight_decay} if has_decay else {}
    try:
        # every group has a rate of its own; some classes have no default and ask for one
        optimizer: torch.optim.Optimizer = kind([{**group, **own_rate} for group in groups],
                                                lr=groups[0]["lr"], **decay)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConceptError(f"optimizer '{name}' cannot train these weights ({error}); AdamW, "
                           "Adam and SGD can") from error
    if name in SCHEDULE_FREE:
        optimizer.train()      # type: ignore[attr-defined]
    return optimizer


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context manager in which the parameters of a schedule-free optimiser are its average, which is what it
    has learned (Defazio et al., 2024). Afterwards they are what they were, bit for bit. Does nothing for
    other optimisers.
    """
    if type(optimizer).__name__ not in SCHEDULE_FREE or not optimizer.param_groups[0]["train_mode"]:
        yield
        return
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()      # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()      # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def check_with_schedule(name: str, schedule: str) -> None:
    """Raises ConceptError if an optimiser has no use for a learning-rate schedule."""
    if name in SCHEDULE_FREE and schedule != "constant":
        raise ConceptError(f"setting 'schedule' is {schedule!r}; allowed with the schedule-free optimizer "
                           f"{name}: constant")
