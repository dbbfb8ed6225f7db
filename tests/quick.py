"""Commands on the embedded base that load it once and draw in two steps, for tests of all but pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import pytest


@cache
def _loaded(load: Callable, *given, **named):
    """Learning and sampling leave a base as it was, so that all tests of a process can share it."""
    return load(*given, **named)


@contextmanager
def quick() -> Iterator[None]:
    """Within it, a process loads each base once, and thumbnails, previews and replayed pictures take two
    steps."""
    from continual_concepts.core.cli import learning, states
    from continual_concepts.core.demo import base
    from continual_concepts.core.sampling.settings import SampleSettings
    from continual_concepts.core.training import refinement

    def in_two_steps(**named) -> SampleSettings:
        return SampleSettings(**named | {"steps": 2})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "load_base", partial(_loaded, base.load_base))
        patch.setattr(refinement, "STEPS", 2)
        for module in (learning, states):
            patch.setattr(module, "SampleSettings", in_two_steps)
        yield


@pytest.fixture
def quick_commands() -> Iterator[None]:
    with quick():
        yield
