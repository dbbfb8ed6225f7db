"""The benchmark's sequence of tasks and its prompt suite: names, kinds, individuals and orders."""

from __future__ import annotations

from itertools import combinations

import pytest

from continual_concepts.benchmarks.continual import embedded as continual
from continual_concepts.benchmarks.continual import prompt_suite
from continual_concepts.benchmarks.continual.concepts import (
    MORE,
    STYLE_EVERY,
    TEN,
    concepts,
    ordered,
    tuning_concepts,
)
from continual_concepts.core.bank.tokens import check_name
from continual_concepts.core.demo import scenes
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, get


@pytest.fixture(scope="module")
def fifty():
    return concepts(50)


def test_ten_are_seven_objects_and_three_styles_as_in_the_benchmark():
    ten = concepts(10)
    assert [c.name for c in ten] == list(TEN)
    assert [i for i, c in enumerate(ten) if c.kind == "style"] == [5, 7, 9]
    nouns = [c.class_noun for c in ten]
    assert nouns[:5] == ["dog", "duck toy", "cat", "backpack",
                         "teddy bear"] and nouns[6] == "dog" and nouns[8] == "cat"


def test_longer_sequences_begin_with_the_shorter(fifty):
    for count in (1, 3, 10, 20):
        assert concepts(count) == fifty[:count] and len(concepts(count)) == count
    assert len(fifty) == 50 and concepts(50) == fifty


def test_names_are_unique_and_allowed(fifty):
    names = [c.name for c in fifty]
    assert len(set(names)) == 50 and [check_name(name) for name in names] == names
    assert not set(MORE) & set(scenes.CONCEPTS)      # none hides another


def test_beyond_the_ten_every_fifth_is_a_style(fifty):
    styles = [i + 1 for i, c in enumerate(fifty) if i >= 10 and c.kind == "style"]
    assert styles == list(range(10 + STYLE_EVERY, 51, STYLE_EVERY))
    for concept in fifty:
        is_style = concept.kind == "style"
        assert (concept.thing is None, concept.style is None) == (is_style, not is_style)
        assert concept.class_noun == (concept.thing.kind if concept.thing else "drawing")
    assert {c.class_noun for c in fifty} == {"drawing", *scenes.KINDS}


def test_individuals_of_one_class_differ_and_so_do_styles(fifty):
    things = [c.thing for c in fifty if c.thing is not None]
    relatives = [(a, b) for a, b in combinations(things, 2) if a.kind == b.kind]
    assert relatives
    for one, other in relatives:
        difference = sum(abs(x - y) for x, y in zip(one.body, other.body, strict=True))
        assert difference > 40 or one.pattern != other.pattern or one.accessory != other.accessory
    looks = [(s.paper, s.line, s.fill) for s in (c.style for c in fifty) if s is not None]
    assert len(set(looks)) == len(looks) == 11


def test_pictures_name_the_concept_and_do_not_change():
    for concept in concepts(15)[9:]:
        (picture, caption), (again, _) = concept.pictures(1, 3)[0], concept.pictures(1, 3)[0]
        assert picture.shape == (64, 64, 3) and (picture == again).all() and f"<{concept.name}>" in caption


def test_settings_are_tuned_on_other_concepts(fifty):
    tuning = tuning_concepts()
    assert tuning == tuning_concepts() and not {c.name for c in tuning} & {c.name for c in fifty}
    assert [c.kind for c in tuning].count("style") == 2
    things, styles = ([getattr(c, part) for c in [*tuning, *fifty] if getattr(c, part) is not None]
                      for part in ("thing", "style"))
    assert len({(t.kind, t.body, t.second, t.pattern_colour) for t in things}) == len(things)
    assert len({(s.paper, s.line, s.fill) for s in styles}) == len(styles)
    groups, pairs = prompt_suite.groups_and_pairs([c for c in tuning if c.kind == "object"])
    assert len(groups) == 5 and len(pairs) == 1      # both figures of several concepts can be measured


@pytest.mark.parametrize("count", [0, -1])
def test_no_tasks_are_refused(count):
    with pytest.raises(ConceptError, match=f"is {count}; allowed: 1 or more"):
        concepts(count)


def test_orders_are_permutations_of_their_own():
    orders = [ordered(10, order) for order in range(6)]
    assert all(sorted(places) == list(range(10)) for places in orders)
    assert orders[0] == list(range(10)) and orders[1] == orders[0][::-1]
    assert len({tuple(places) for places in orders}) == 6 and ordered(10, 4) == orders[4]
    assert ordered(1, 3) == [0]


def test_groups_are_of_different_classes_and_pairs_of_one(fifty):
    things = [c for c in fifty[:10] if c.kind == "object"]
    groups, pairs = prompt_suite.groups_and_pairs(things)
    nouns = {c.name: c.class_noun for c in things}
    assert {len(g) for g in groups} == {2, 3} and all(len({nouns[n] for n in g}) == len(g) for g in groups)
    assert set(pairs) == {("rex", "fido"), ("mimi", "luna")}
    many = [c for c in fifty if c.kind == "object"]
    # the cost of a run does not grow with it
    counts = [len(found) for found in prompt_suite.groups_and_pairs(many)]
    assert counts == [prompt_suite.GROUPS + prompt_suite.TRIPLES, prompt_suite.PAIRS]
    assert prompt_suite.groups_and_pairs(things[:1]) == ((), ())


def test_settings_fit_every_method():
    for name in METHODS:
        get(name).config(**continual.settings_of(name))
    assert set(continual.OWN_RATES) <= set(METHODS)
