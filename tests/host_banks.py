"""Fixtures that make banks of other methods from the concepts of the fixture `bank`. tests/host uses them."""

from __future__ import annotations

from dataclasses import replace

import pytest


@pytest.fixture(scope="session")
def of_method(bank):
    """of_method(method): the concepts of `bank` as those of another method, with its composition."""
    from continual_concepts.core.bank.bank import ConceptBank

    def make(method: str) -> ConceptBank:
        made = ConceptBank(bank.layout)
        for concept in bank:
            made = made.add(replace(concept, info=replace(concept.info, method=method, composition=None)))
        return made

    return make


@pytest.fixture(scope="session")
def slotted():
    """slotted(concept, layout, count): the concept with random slots at every site, beside its deltas."""
    import torch

    from continual_concepts.core.model.slots import SLOTS, SlotDelta

    def make(concept, layout, count: int = 4):
        generator = torch.Generator().manual_seed(count)
        slots = {}
        for site in layout.sites:
            key, value = (torch.randn(count, site.shape("to_k")[0], generator=generator) for _ in range(2))
            slots[site.index, SLOTS] = SlotDelta(key, value, site.heads, 0.3)
        return replace(concept, deltas={**concept.deltas, **slots})

    return make


@pytest.fixture(scope="session")
def word_bound(of_method, slotted):
    """Word-bound concepts; all but the first have slots, each another number of them."""
    from continual_concepts.core.bank.bank import ConceptBank

    made = ConceptBank(of_method("bound").layout)
    for number, concept in enumerate(of_method("bound")):
        made = made.add(slotted(concept, made.layout, 2 + 2 * number) if number else concept)
    return made


@pytest.fixture(scope="session")
def mixed(bank):
    """<rex> and <mimi> are word-bound, <blueprint> is prompt-activated, <plain> has words alone."""
    from continual_concepts.core.bank.bank import ConceptBank

    made = ConceptBank(bank.layout)
    for concept, method in zip(bank, ("bound", "bound", "cidm"), strict=True):
        made = made.add(replace(concept, info=replace(concept.info, method=method)))
    plain = bank["rex"].renamed("plain")
    vectors = {name: vector + 0.1 for name, vector in plain.tokens.vectors.items()}
    return made.add(replace(plain, deltas={}, tokens=replace(plain.tokens, vectors=vectors)))
