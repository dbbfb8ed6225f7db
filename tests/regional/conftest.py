"""What tests of regions share."""

from __future__ import annotations

import pytest

from continual_concepts.core.bank.bank import ConceptBank


@pytest.fixture(scope="package")
def region_bank(tiny_backbone, make_concept):
    """Two routed concepts and one of a folding method, which is always on."""
    bank = ConceptBank(tiny_backbone.layout)
    for i, name in enumerate(("rex", "mimi")):
        bank = bank.add(make_concept(tiny_backbone.layout, name, i, size=0.2))
    return bank.add(make_concept(tiny_backbone.layout, "tuned", 5, method="finetune", size=0.1))


@pytest.fixture
def calls(tiny_backbone, monkeypatch):
    """Batch sizes of the UNet's evaluations."""
    seen, original = [], tiny_backbone.predict
    monkeypatch.setattr(tiny_backbone, "predict",
                        lambda latents, *rest: seen.append(len(latents)) or original(latents, *rest))
    return seen
