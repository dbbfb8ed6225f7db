"""Words that standard terms replaced do not come back as identifiers; CONTRIBUTING lists the terms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Old word -> (term that replaced it, identifiers that a file key, node input or flag needs, or that mean
# something else).
OLD_WORDS: dict[str, tuple[str, set[str]]] = {
    "program": ("attention processor", {"program", "PROGRAM"}),      # of the command line, in messages
    # a setting of the training; an ordinary verb
    "look": ("evaluation or preview", {"look_every", "look_up"}),
    "looks": ("evaluation or preview", set()),
    "kept": ("retained or cached", {"kept"}),      # a setting of custom_diffusion; what a truncation leaves
    "standing": ("always on", set()),
    "stand": ("placeholder noun", set()),      # stand_in
    "team": ("process group", set()),
    # of a concept, which starts from another one
    "variant": ("override", {"variant_of", "check_variant", "is_variant", "VARIANT"}),
    "variants": ("override", {"variants", "add_variants"}),
    "suite": ("prompt suite", {"suite", "suite_of", "prompt_suite", "PromptSuite"}),
    "drift": ("base change", set()),
    "mistaken": ("confused", set()),
    # an input of the Regional Concept Sampler, a flag of the command line
    "solo": ("crop denoising", {"solo"}),
    # an input of the Regional Concept Sampler, a field of SampleSettings
    "artists": ("attention guidance", {"artists"}),
    "routed": ("prompt-activated", set()),
}
OLD_IN_BENCHMARKS: dict[str, tuple[str, set[str]]] = {
    "cell": ("run", set()),
    "cells": ("run", set()),
}


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every identifier that a file defines or uses; strings and comments are not read."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.arg | ast.keyword):
            yield line, node.arg or ""
        elif isinstance(node, ast.alias):
            yield line, node.asname or node.name.split(".")[-1]


def words_of(identifier: str) -> set[str]:
    """`SiteProgram` and `site_program` -> site, program."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)}


def findings(text: str, banned: dict[str, tuple[str, set[str]]]) -> list[str]:
    found = []
    for line, name in identifiers(ast.parse(text)):
        for word in words_of(name) & banned.keys():
            term, allowed = banned[word]
            if name not in allowed:
                found.append(f"{line}: {name} (the term is {term!r})")
    return found


@pytest.mark.parametrize("room", ["core", "nodes", "benchmarks"])
def test_old_words_are_gone(room):
    banned = OLD_WORDS | (OLD_IN_BENCHMARKS if room == "benchmarks" else {})
    wrong = [f"{path.relative_to(ROOT).as_posix()}:{finding}" for path in sorted((ROOT / room).rglob("*.py"))
             for finding in findings(path.read_text(encoding="utf-8"), banned)]
    assert wrong == []


def test_every_term_is_explained():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    words = contributing[contributing.index("## Words"):contributing.index("## Add a method")]
    terms = {term for term, _ in (OLD_WORDS | OLD_IN_BENCHMARKS).values()}
    assert not [part for term in terms for part in term.split(" or ") if part not in words]


@pytest.mark.parametrize("text",
                         ["class SiteProgram: pass", "self.kept_keys = 1", "def drift(): pass", "f(team=1)",
                                  "from a import routed", "def f(variant): pass"])
def test_old_words_are_found(text):
    assert len(findings(text, OLD_WORDS)) == 1


@pytest.mark.parametrize("text", ["look_every = 1", "x = 'the program kept'", "# drift", "prompt_suite = 1",
                                  "understand = 1"])
def test_others_are_left_alone(text):
    assert findings(text, OLD_WORDS) == []
