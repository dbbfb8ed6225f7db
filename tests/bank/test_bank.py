"""The bank as a value: adding, removing, renaming and merging, also against a plain dict at random."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.deltas import LowRankDelta
from continual_concepts.core.model.sites import SiteLayout


@pytest.fixture
def bank(layout, make_concept):
    return ConceptBank(layout).add(make_concept(layout, "rex", 1),
                                   {"cidm": {"w": torch.ones(2)}}).add(make_concept(layout, "mimi", 2))


def test_adding_keeps_order_and_leaves_the_old_bank_alone(bank, layout, make_concept):
    grown = bank.add(make_concept(layout, "bear", 3),
                     {"cidm": {"w": torch.zeros(2)}, "l2dm": {"x": torch.ones(1)}})
    assert (bank.names, grown.names, len(bank),
            len(grown)) == (["rex", "mimi"], ["rex", "mimi", "bear"], 2, 3)
    assert bank.shared["cidm"]["w"].all() and not grown.shared["cidm"]["w"].any()
    assert "l2dm" not in bank.shared
    assert grown["rex"] is bank["rex"] and "bear" in grown and "bear" not in bank


def test_a_name_can_be_taken_once(bank, layout, make_concept):
    with pytest.raises(ConceptError, match="'rex'"):
        bank.add(make_concept(layout, "rex", 3))
    with pytest.raises(ConceptError, match="two concepts 'rex'"):
        replace(bank, entries=bank.entries + bank.entries[:1])


def test_removing(bank):
    assert bank.remove("rex").names == ["mimi"] and bank.names == ["rex", "mimi"]
    with pytest.raises(ConceptError, match="'nobody'.*rex, mimi"):
        bank.remove("nobody")
    with pytest.raises(ConceptError, match="none"):
        ConceptBank(bank.layout)["rex"]


def test_removing_reads_no_tensors(bank):
    def damaged():
        raise AssertionError("was read")

    lazy = bank.lazily(replace(bank["rex"].info, name="bear", words=("b",)), damaged)
    assert lazy.remove("bear").names == ["rex", "mimi"]


def test_renaming_keeps_the_place_and_the_numbers(bank):
    renamed = bank.rename("rex", "max")
    assert renamed.names == ["max", "mimi"] and renamed["max"].info.words == ("max-1", "max-2")
    assert renamed["max"].deltas is bank["rex"].deltas
    assert [ref.concept for ref in renamed.vocabulary.entries["max-1"]] == ["max"]
    assert bank.rename("rex", "rex").names == bank.names


@pytest.mark.parametrize(("old", "new"),
                         [("rex", "mimi"), ("rex", "mimi-1"), ("nobody", "x"), ("rex", "a b")])
def test_bad_renames_are_refused(bank, old, new):
    with pytest.raises(ConceptError):
        bank.rename(old, new)


def test_merging(bank, layout, make_concept):
    other = ConceptBank(layout).add(make_concept(layout, "bear", 3),
                                    {"cidm": {"w": torch.zeros(2)}, "ewc": {"f": torch.ones(1)}})
    merged = bank.merge(other)
    assert merged.names == ["rex", "mimi", "bear"]
    assert merged.shared["cidm"]["w"].all() and merged.shared["ewc"]["f"].all()
    assert merged.merge(other).names == merged.names == merged.merge(merged).names      # once each
    grown = bank.add(make_concept(layout, "luna", 5), {"cidm": {"w": torch.full((2,), 7.0)}})
    for one, two in ((bank, grown), (grown, bank)):      # the state that knows all concepts
        assert (one.merge(two).shared["cidm"]["w"] == 7).all()

    def damaged():
        raise ConceptError("concept 'rex' cannot be read")

    unread = ConceptBank(layout).lazily(bank["rex"].info, damaged)
    for one, two in ((bank, unread), (unread, bank), (unread, unread)):
        with pytest.raises(ConceptError, match="cannot be read"):
            one.merge(two)
    for name, seed in (("bear", 4), ("rex", 3)):
        with pytest.raises(ConceptError, match=f"both banks hold '{name}'; rename"):
            merged.merge(ConceptBank(layout).add(make_concept(layout, name, seed)))


def test_banks_of_different_bases_do_not_merge(bank, layout):
    other = ConceptBank(SiteLayout(layout.sites[:2], layout.text_widths))
    with pytest.raises(ConceptError, match="different bases"):
        bank.merge(other)
    with pytest.raises(ConceptError, match="another base"):
        bank.check_fits(other.layout)


@pytest.mark.parametrize("key", [(7, "to_q"), (0, "to_x")])
def test_a_concept_of_another_base_is_refused(layout, make_concept, key):
    concept = make_concept(layout)
    with pytest.raises(ConceptError):
        ConceptBank(layout).add(replace(concept,
                                        deltas={key: LowRankDelta(torch.ones(4, 1), torch.ones(1, 4))}))


def test_the_layout_survives_json_and_refuses_nonsense(layout):
    data = layout.to_json()
    read = SiteLayout.from_json(data)
    assert read == layout and read.fingerprint == layout.fingerprint
    for change in ({"index": 5}, {"copy": 9}, {"copy": -1}, {"width": 0}, {"heads": "2"}):
        with pytest.raises(ConceptError):
            SiteLayout.from_json({**data, "sites": [{**data["sites"][0], **change}]})
    with pytest.raises(ConceptError):
        SiteLayout.from_json({**data, "sites": []})


NAMES = st.sampled_from(["a", "b", "c", "d"])


@pytest.fixture
def machine(layout, make_concept, tmp_path):
    class BankMachine(RuleBasedStateMachine):
        """A bank and a dict of name -> seed; the concepts of `make_concept` depend on the seed alone."""

        @initialize()
        def begin(self):
            self.bank, self.model = ConceptBank(layout), {}

        def attempt(self, allowed, change, model):
            if allowed:
                self.bank, self.model = change(), model
            else:
                with pytest.raises(ConceptError):
                    change()

        @rule(name=NAMES, seed=st.integers(0, 5))
        def add(self, name, seed):
            self.attempt(name not in self.model, lambda: self.bank.add(make_concept(layout, name, seed)),
                         self.model | {name: seed})

        @rule(name=NAMES)
        def remove(self, name):
            self.attempt(name in self.model, lambda: self.bank.remove(name),
                         {n: s for n, s in self.model.items() if n != name})

        @rule(old=NAMES, new=NAMES)
        def rename(self, old, new):
            allowed = old in self.model and (new == old or new not in self.model)
            self.attempt(allowed, lambda: self.bank.rename(old, new),
                         {new if n == old else n: s for n, s in self.model.items()})

        @rule(name=NAMES, seed=st.integers(0, 5))
        def merge(self, name, seed):
            other = ConceptBank(layout).add(make_concept(layout, name, seed))
            if self.model.get(name) == seed:      # the same, or one that was renamed
                return
            self.attempt(name not in self.model, lambda: self.bank.merge(other), self.model | {name: seed})

        @rule()
        def save_and_open(self):
            save_bank(self.bank, tmp_path / "bank.safetensors")
            self.bank = open_bank(tmp_path / "bank.safetensors")

        @invariant()
        def same_as_the_model(self):
            assert self.bank.names == list(self.model)
            for name, seed in self.model.items():
                expected = make_concept(layout, "x", seed)
                assert torch.equal(self.bank[name].tokens.vectors["clip_l"],
                                   expected.tokens.vectors["clip_l"])
                assert torch.equal(self.bank[name].deltas[1, "to_k"].dense(),
                                   expected.deltas[1, "to_k"].dense())

    return BankMachine


def test_operations_agree_with_a_dict(machine):
    case = machine.TestCase
    case.settings = settings(max_examples=15, stateful_step_count=12, deadline=None, database=None)
    case("runTest").runTest()


def test_a_concept_in_passing_does_not_stay_in_memory(layout, make_concept):
    reads, concept = [], make_concept(layout, "rex")

    def load():
        reads.append(1)
        return concept

    bank = ConceptBank(layout).lazily(concept.info, load)
    assert bank.passing("rex") is concept and bank.passing("rex") is concept and len(reads) == 2
    assert bank["rex"] is concept and bank["rex"] is concept and bank.passing("rex") is concept
    assert len(reads) == 3
    assert ConceptBank(layout).add(concept).passing("rex") is concept
    with pytest.raises(ConceptError, match="holds no concept 'mimi'"):
        bank.passing("mimi")
