"""Random changes to a bank on disk and to a plain list of names: both agree after every change."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank, verify_bank
from continual_concepts.core.bank.store import VERSIONS, change_bank, restore, versions
from continual_concepts.core.errors import ConceptError

NAMES = st.sampled_from(["rex", "mimi", "ink", "fido", "a-b", "Ünï"])


class Life(RuleBasedStateMachine):
    """The model: `now` is a list of (name, seed); `earlier` the lists that the versions hold, newest
    first."""

    layout = make_concept = None      # set by the test

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "mine.safetensors"
        self.now, self.earlier, self.seed, self.made = [], [], 0, {}
        save_bank(ConceptBank(self.layout), self.path)

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def concept(self, name):
        self.seed += 1
        self.made[self.seed] = self.make_concept(self.layout, name, self.seed)
        return self.made[self.seed]

    def changes(self, change, new):
        """The change succeeds exactly when the model allows it. new: its list then, None = refused."""
        if new is None:
            with pytest.raises(ConceptError):
                change_bank(self.path, change)
            return
        change_bank(self.path, change)
        self.earlier = [self.now, *self.earlier][:VERSIONS]
        self.now = new

    @rule(name=NAMES)
    def add(self, name):
        concept, known = self.concept(name), [n for n, _ in self.now]
        self.changes(lambda bank: bank.add(concept),
                     None if name in known else [*self.now, (name, self.seed)])

    @rule(name=NAMES)
    def remove(self, name):
        left = [one for one in self.now if one[0] != name]
        self.changes(lambda bank: bank.remove(name), left if len(left) < len(self.now) else None)

    @rule(old=NAMES, new=NAMES)
    def rename(self, old, new):
        known = [n for n, _ in self.now]
        fine = old in known and (new == old or new not in known)
        self.changes(lambda bank: bank.rename(old, new),
                     [(new if n == old else n, s) for n, s in self.now] if fine else None)

    @rule(names=st.lists(NAMES, unique=True, max_size=3))
    def merge(self, names):
        other, added = ConceptBank(self.layout), []
        for name in names:
            other = other.add(self.concept(name))
            added.append((name, self.seed))
        clash = {n for n, _ in self.now} & set(names)
        self.changes(lambda bank: bank.merge(other), None if clash else [*self.now, *added])

    @rule(number=st.integers(0, VERSIONS + 1))
    def restore(self, number):
        if not 1 <= number <= len(self.earlier):
            with pytest.raises(ConceptError, match="has no version"):
                restore(self.path, number)
            return
        back = self.earlier[number - 1]
        restore(self.path, number)
        self.now, self.earlier = back, [self.now, *self.earlier][:VERSIONS]

    @precondition(lambda self: self.now)
    @rule()
    def a_write_fails(self):
        """The disk is full in the middle of a write."""
        from continual_concepts.core.bank import format as bankfile

        original = bankfile.save_file

        def full(tensors, file, metadata):
            raise OSError(28, "No space left on device")

        bankfile.save_file = full
        try:
            with pytest.raises(ConceptError, match="No space left"):
                change_bank(self.path, lambda bank: bank.first(0))
        finally:
            bankfile.save_file = original

    @invariant()
    def they_agree(self):
        if not hasattr(self, "path"):
            return
        verify_bank(self.path)
        bank = open_bank(self.path)
        assert bank.names == [name for name, _ in self.now]
        for name, seed in self.now:
            expected, found = self.made[seed], bank[name]
            assert all(torch.equal(found.tokens.vectors[encoder], vectors)
                       for encoder, vectors in expected.tokens.vectors.items())
            assert found.deltas.keys() == expected.deltas.keys()
        assert [open_bank(version.path).names
                for version in versions(self.path)] == [[name for name, _ in names] for names in self.earlier]


def test_lives_of_a_bank(layout, make_concept, trials):
    Life.layout, Life.make_concept = layout, staticmethod(make_concept)
    run_state_machine_as_test(Life,
                              settings=settings(max_examples=trials(15, 500), stateful_step_count=20,
                                                deadline=None))
