"""The grammar of prompts: weights, escapes, and writing a prompt so that it reads the same again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.bank.grammar import Placeholder, parts_of, written
from continual_concepts.core.bank.prompts import Vocabulary
from continual_concepts.core.errors import ConceptError

REX = Placeholder("rex")


def known(name: str) -> str | None:
    return name if name == "rex" else None


def parts(text: str) -> list:
    return parts_of(text, known, "unknown {}".format)


@pytest.mark.parametrize(("text", "expected"), [
    ("", []),
    ("a dog", [("a dog", 1.0)]),
    ("a (red) dog", [("a ", 1.0), ("red", 1.1), (" dog", 1.0)]),
    ("a (red:1.3) dog", [("a ", 1.0), ("red", 1.3), (" dog", 1.0)]),
    ("((red))", [("red", 1.1 * 1.1)]),
    ("(a (red:0.5) dog:2)", [("a ", 2.0), ("red", 0.5), (" dog", 2.0)]),
    (r"a \(red\) dog", [("a (red) dog", 1.0)]),
    ("(red", [("(red", 1.0)]),
    ("red) (dog)", [("red) (dog)", 1.0)]),      # unbalanced, as in ComfyUI
    ("(a: b)", [("a: b", 1.1)]),
    ("(:1.2)", [(":1.2", 1.1)]),
    ("<rex>", [(REX, 1.0)]),
    ("(<rex>)", [(REX, 1.1)]),
    ("(a <rex:0.5>:2)", [("a ", 2.0), (REX, 0.5)]),
    (r"\<rex>", [("<rex>", 1.0)]),
    ("<rex:-1>", [(REX, -1.0)]),
    ("<rex:nan>", [("<rex:nan>", 1.0)]),
    ("<cat:1>", [("<cat:1>", 1.0)]),
])
def test_parts(text, expected):
    assert parts(text) == expected


@pytest.mark.parametrize("text", ["(dog:nan)", "(<rex>:-inf)", "(" * 200 + "a" + ")" * 200])
def test_weights_must_be_finite_and_nesting_shallow(text):
    with pytest.raises(ConceptError):
        parts(text)


def test_an_unknown_exact_placeholder_is_refused():
    with pytest.raises(ConceptError, match="unknown cat"):
        parts("<cat>")


TOKENS = st.sampled_from(["a", " dog", "<rex>", "<rex:0.5>", "(", ")", ":1.3)", r"\(", r"\<", ":", "< rex >"])
PROMPTS = st.lists(TOKENS, max_size=10).map("".join)


@given(PROMPTS)
def test_a_written_prompt_reads_the_same(text):
    found = parts(text)
    again = parts(written(found, "<{}>".format, "()<>"))
    assert [part for part in again if part[0] != ""] == found


@given(PROMPTS)
def test_prompts_apart_read_the_same(text):
    """The prompts of found regions go through a text encoder of the host, as text."""
    infos = {name: ConceptInfo(name, noun, "bound", (f"{name}-1", f"{name}-2"))
             for name, noun in (("rex", "dog"), ("mimi", "cat"))}
    vocabulary = Vocabulary(infos.values())
    for prompt in vocabulary.parse(f"{text} <mimi:0.7>").apart(infos).values():
        assert vocabulary.parse(prompt.text).weighted == prompt.weighted
