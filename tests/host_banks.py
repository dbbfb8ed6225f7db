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
def word_bound(of_method):
    return of_method("bound")


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
