"""Captions for photos that have none: short sentences that say nothing about what else is in the picture.

The papers draw a sentence of this kind at every step, from 27 for objects and 16 for styles (CIDM's released
code; after textual inversion, Gal et al., 2023). These are our own, composed of parts. Here a photo keeps one
sentence, because captions are encoded once.
"""

from __future__ import annotations

from ..bank.concepts import KINDS
from ..bank.prompts import PLACE
from ..errors import ConceptError

_VIEWS = ("a photo of", "a picture of", "a snapshot of", "a close view of", "a photograph showing",
          "a shot of", "an image of", "a plain photo of", "a photograph of")
_ARTICLES = ("", "the ", "one ")
_WORKS = ("a picture", "an image", "a work", "a scene")
_MANNERS = ("in the style of", "that looks like", "made in the manner of", "after")

TEMPLATES = {
    "object": tuple(f"{view} {article}{PLACE}" for view in _VIEWS for article in _ARTICLES),
    "style": tuple(f"{work} {manner} {PLACE}" for work in _WORKS for manner in _MANNERS),
}
# Neighbouring photos differ in both parts. No step divides its count, so all sentences take turns.
_STEPS = {"object": 10, "style": 5}


def template_of(kind: str, number: int) -> str:
    """The caption of the photo with this number (from 0 on), with {} for the concept.

    Raises:
        ConceptError: The kind is neither object nor style.
    """
    if kind not in TEMPLATES:
        raise ConceptError(f"caption templates are for '{kind}'; allowed: {', '.join(KINDS)}")
    sentences = TEMPLATES[kind]
    return sentences[number * _STEPS[kind] % len(sentences)]
