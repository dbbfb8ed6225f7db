"""Photo files for the tests of this folder."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from continual_concepts.core.errors import ConceptError


def photo(path, size=(48, 32), seed=None, **saving):
    """A sharp photo of random blocks, different for every name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, path.name)) if seed is None else seed)
    blocks = rng.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(blocks).resize(size, Image.NEAREST).save(path, **saving)
    return path


def refusal(call) -> str:
    with pytest.raises(ConceptError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def skipped(report) -> dict[str, str]:
    return {file.name: file.reason for file in report.skipped}


def kinds(report) -> set[str]:
    return {warning.kind for warning in report.warnings}
