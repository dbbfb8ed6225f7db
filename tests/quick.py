"""What keeps the suite quick: commands that draw in two steps and load a base once, and parts of products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import pytest


def thinned(cases: Iterable, keep: Callable[[int], bool]) -> list:
    """Cases for `parametrize`, of which `make test` runs those whose place `keep` accepts.

    The others are marked slow. It is for products, such as each method with each option. A part of them is
    enough during development.
    """
    listed = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[] if keep(place) else pytest.mark.slow)
            for place, case in enumerate(listed)]


@cache
def _loaded(load: Callable, *given, **named):
    """Learning and sampling leave a base as it was, so that all tests of a process can share it."""
    return load(*given, **named)


@contextmanager
def quick() -> Iterator[None]:
    """Within it, a process loads each base once, and thumbnails, previews, compared and replayed pictures
    take two steps."""
    from continual_concepts.core.cli import export, learning, states
    from continual_concepts.core.demo import base
    from continual_concepts.core.sampling.settings import SampleSettings
    from continual_concepts.core.training import refinement

    def in_two_steps(**named) -> SampleSettings:
        return SampleSettings(**named | {"steps": 2})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "load_base", partial(_loaded, base.load_base))
        patch.setattr(refinement, "STEPS", 2)
        for module in (export, learning, states):
            patch.setattr(module, "SampleSettings", in_two_steps)
        yield


@pytest.fixture
def quick_commands() -> Iterator[None]:
    with quick():
        yield
