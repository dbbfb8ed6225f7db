"""The text of a drawing: what it says, and the one sentence that every mistake in it ends in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.images import colour
from continual_concepts.core.regional.drawing import KEYS, PROMPT, REGIONS, parse_regions
from continual_concepts.core.regional.regions import Region

BOX = [0, 0.25, 0.5, 1]


def drawing(**fields) -> str:
    return json.dumps([{"prompt": "<rex>", "box": BOX} | fields])


def sentence(text: str) -> str:
    with pytest.raises(ConceptError) as caught:
        parse_regions(text)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 400 and caught.value.__cause__ is None
    message.encode()
    return message


@pytest.mark.parametrize("text", ["", "  \n", "[]", " [ ] "])
def test_nothing_is_no_regions(text):
    assert parse_regions(text) == []


def test_a_region_says_what_it_says():
    (region,) = parse_regions(drawing(name="Rex", color="#AABBCC", negative="n", strength=0.5, start=0.1,
                                      end=0.9, feather=0.2, on=True))
    assert (region.prompt, region.negative, region.name, region.colour) == ("<rex>", "n", "Rex", "#aabbcc")
    assert region.box == (0.25, 0.0, 1.0, 0.5)  # top, left, bottom, right
    assert (region.strength, region.start, region.end, region.feather) == (0.5, 0.1, 0.9, 0.2)


def test_what_is_not_said_is_as_usual():
    (found,) = parse_regions(drawing())
    usual = Region("<rex>", (0.25, 0.0, 1.0, 0.5))
    assert all(getattr(found, key) == getattr(usual, key) for key in vars(usual))
    assert found.name == "" and found.colour == "#" + "".join(f"{part:02x}" for part in colour(0))


def test_regions_that_are_off_are_left_out_and_keep_their_place():
    items = [{"prompt": "a", "box": BOX}, {"prompt": "", "box": BOX, "on": False},
             {"prompt": "c", "box": BOX}]
    first, last = parse_regions(json.dumps(items))
    assert (first.prompt, last.prompt) == ("a", "c")
    assert last.colour == "#" + "".join(f"{part:02x}" for part in colour(2))


# What is refused: a field, its value as JSON, words of the message. The page's reader has the same list.
WRONG = [
    ("prompt", "5", "prompt of region 1"), ("prompt", "null", "prompt"),
    ("prompt", json.dumps("x" * (PROMPT + 1)), "4,001 characters"),
    ("prompt", '"a \\ud800"', "whole characters"), ("negative", "[]", "negative"), ("name", "{}", "name"),
    ("name", json.dumps("n" * 101), "100"), ("strength", "1.5", "from 0 to 1"), ("strength", "-0.1", "-0.1"),
    ("strength", "true", "true"),
    ("strength", '"1"', '"1"'), ("strength", "NaN", "NaN"), ("strength", "1e999", "Infinity"),
    ("strength", "-Infinity", "-Infinity"),
    ("feather", "0.6", "from 0 to 0.5"), ("start", "null", "null"), ("end", "2", "end of region 1"),
    ("end", "1" + "0" * 400, "..."),
    ("on", "1", "true or false"), ("on", '"no"', "true or false"), ("color", '"red"', "#rrggbb"),
    ("color", '"#12345g"', "#rrggbb"),
    ("color", "null", "#rrggbb"), ("color", '"#123456\\n"', "#rrggbb"), ("box", "[0, 0, 1]", "left < right"),
    ("box", "[0.5, 0, 0.5, 1]", "left < right"), ("box", "[0.6, 0, 0.5, 1]", "left < right"),
    ("box", "[0, 1, 1, 0]", "top < bottom"),
    ("box", "[0, 0, 1.1, 1]", "1.1"), ("box", "[-0.1, 0, 1, 1]", "-0.1"),
    ("box", "[false, 0, 1, true]", "false"),
    ("box", '{"left": 0}', "left"), ("box", "[0, NaN, 1, 1]", "NaN"), ("rotate", "0", "rotate"),
    ("__proto__", "{}", "__proto__"),
    ("Prompt", '"a"', "Prompt"),
]  # fmt: skip
WHOLE = [
    "{}", "5", "null", '"text"', "[1]", "[[]]", "[null]", "[{}]", '[{"prompt": "a"}]',
    '[{"box": [0, 0, 1, 1]}]', "[", "[{]", "{'a': 1}",
    "[1,]", "// none", "NaN", "[" * 100_000, json.dumps([{"prompt": "a", "box": BOX}] * (REGIONS + 1)),
    "9" * 5000,
]  # fmt: skip


def with_field(key: str, value: str) -> str:
    """A drawing of one region in which a field has a value that is given as JSON."""
    fields = {"prompt": '"<rex>"', "box": json.dumps(BOX)} | {key: value}
    return "[{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in fields.items()) + "}]"


@pytest.mark.parametrize(("key", "value", "words"), WRONG,
                         ids=[f"{key} {value[:12]}" for key, value, _ in WRONG])
def test_a_wrong_field_is_named(key, value, words):
    assert words in sentence(with_field(key, value))


@pytest.mark.parametrize("text", WHOLE, ids=lambda text: text[:20])
def test_a_text_that_is_no_drawing(text):
    assert "drawing" in sentence(text)


def test_the_sentence_names_the_region():
    items = [{"prompt": "a", "box": BOX}, {"prompt": " ", "box": BOX, "name": "the\nsky"}]
    assert sentence(json.dumps(items)) == "the prompt of region 2 (the sky) is empty; say what it should show"
    assert "region 1 of the drawing has no box" in sentence('[{"prompt": "a"}]')
    assert "start of region 1 is 0.9; allowed: at most its end, 0.5" in sentence(drawing(start=0.9, end=0.5))
    assert "line 2, column 3" in sentence("[\n {'a'}]")


def test_off_regions_are_checked_too():
    assert "strength" in sentence(drawing(on=False, strength=2))


shares = st.floats(0, 1)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3),
                                                                inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50)
@given(st.text() | values.map(json.dumps) | st.lists(st.dictionaries(st.sampled_from(KEYS),
                                                                     values)).map(json.dumps))
def test_any_text_is_regions_or_a_sentence(text):
    try:
        assert all(isinstance(region, Region) for region in parse_regions(text))
    except ConceptError as error:
        assert str(error) and "\n" not in str(error)


@given(st.lists(st.tuples(st.text(min_size=1).filter(str.strip), shares, shares, shares, shares, shares,
                          st.floats(0, 0.5)), max_size=6))
def test_what_is_written_is_read(rows):
    items = [
        {"prompt": prompt, "box": [min(a, b), min(c, d), max(a, b), max(c, d)], "strength": strength,
         "feather": feather}
        for prompt, a, b, c, d, strength, feather in rows
        if a != b and c != d
    ]
    found = parse_regions(json.dumps(items))
    assert [region.prompt for region in found] == [item["prompt"] for item in items]
    for region, item in zip(found, items, strict=True):
        top, left, bottom, right = region.box
        assert [left, top, right, bottom] == item["box"]
        assert (region.strength, region.feather) == (item["strength"], item["feather"])
