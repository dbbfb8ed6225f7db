"""Notes on a prompt: what looks like a concept but reads as text. A note never stops anything, because text
may be meant literally.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator

from ..model.sites import SiteLayout
from .composition import Kind
from .concepts import ConceptInfo
from .prompts import Prompt, Vocabulary

_OPEN, _CLOSE = "<＜〈《‹«⟨", ">＞〉》›»⟩"
_INSIDE = rf"[^{_OPEN}{_CLOSE}\n]{{1,80}}?"
_CHUNK = re.compile(rf"(?:\\?[{_OPEN}]|&lt;)({_INSIDE})(?:\\?[{_CLOSE}]|&gt;)")
_WEIGHT = re.compile(r"[:：=]\s*([+-]?(?:\d+(?:[.,]\d*)?|[.,]\d+))\s*\\?$")
_LOADER = re.compile(r"\s*(?:lora|lyco|lycoris|hypernet)\s*[:：]", re.IGNORECASE)
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_EMBEDDING = re.compile(r"\bembedding:\S+", re.IGNORECASE)
_SQUARE = re.compile(r"[\[{]\s*([\w-]+)\s*[\]}]")
_ORDINARY = frozenset((
    "a", "an", "the", "and", "or", "of", "in", "on", "at", "by", "to", "with", "without", "for", "from", "is",
    "as", "photo", "picture", "image", "painting", "drawing", "sketch", "art", "artwork", "style", "portrait",
    "landscape", "background", "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink",
    "brown", "black", "white", "grey", "gray", "gold", "silver", "man", "woman", "boy", "girl", "person",
    "people"))
_SEVERAL = 12      # placeholders that a note lists at most


def notes_on(vocabulary: Vocabulary, prompts: Iterable[Prompt], loads_embeddings: bool = False) -> list[str]:
    """Notes on these prompts, each once, in order.

    loads_embeddings: Whether `embedding:name` loads a file, as in ComfyUI, and so is no text.
    """
    return list(dict.fromkeys(note for prompt in prompts
                              for note in _notes(vocabulary, prompt, loads_embeddings)))


def notes_on_caption(vocabulary: Vocabulary, caption: str, what: str) -> list[str]:
    """Notes on a caption: placeholders that are written as only prompts allow.

    what: Which caption it is, for the notes.
    """
    text = unicodedata.normalize("NFC", caption)
    return [f"{what} has '{chunk[0]}', which is plain text in a caption; for the concept write <{name}>"
            for chunk in _CHUNK.finditer(text) if chunk[1] not in vocabulary.entries or chunk[0][0] != "<"
            for name in list(_names_in(vocabulary, chunk[1]))[:1]]


def notes_on_base(infos: Iterable[ConceptInfo], layout: SiteLayout, fingerprint: str) -> list[str]:
    """A note if concepts were learned on other weights of an embedded base, which a later version may train
    further. Other models are not compared: concepts of a checkpoint are meant for its finetunes, too.

    Args:
        infos: Headers of the concepts that matter.
        layout: Of the base that is loaded.
        fingerprint: Of its weights, see `Backbone`.
    """
    others = [f"<{info.name}>" for info in infos if info.provenance.base not in ("", fingerprint)]
    if not layout.embedded_base or not others:
        return []
    verb, whose, what = ("was", "its", "it") if len(others) == 1 else ("were", "their", "them")
    more = f" and {len(others) - _SEVERAL} more" if len(others) > _SEVERAL else ""
    return [f"{', '.join(others[:_SEVERAL])}{more} {verb} learned on other weights of {layout.embedded_base} "
            f"than this version has, so {whose} pictures differ; learn {what} again"]


def _ordinary_words(vocabulary: Vocabulary) -> frozenset[str]:
    """Names that stand in prompts for themselves: class nouns, and words of nearly every prompt."""
    return _ORDINARY | {info.class_noun.casefold() for info in vocabulary.infos.values()}


def _notes(vocabulary: Vocabulary, prompt: Prompt, loads_embeddings: bool) -> Iterator[str]:
    text = " ".join(part for part, _ in prompt.parts if isinstance(part, str))
    text = unicodedata.normalize("NFC", text)
    for chunk in _CHUNK.finditer(text):
        yield from _on_chunk(vocabulary, chunk[0], chunk[1])
    bare = _CHUNK.sub(" ", text)
    bare = _EMBEDDING.sub(" ", bare) if loads_embeddings else bare
    ordinary = _ordinary_words(vocabulary) - {inside[1].casefold() for inside in _SQUARE.finditer(bare)}
    for name in _names_in(vocabulary, bare):
        if name.casefold() not in ordinary and vocabulary.entries[name][0].concept not in prompt.concepts:
            yield f"'{name}' is plain text in the prompt; for the concept write <{name}>"
    for concept in prompt.concepts:
        weights = prompt.weights_of(concept)
        if len(weights) > 1 and vocabulary.infos[concept].composes.kind is Kind.PROMPT:
            listed = " and ".join(f"{weight:g}" for weight in weights)
            yield (f"<{concept}> has the weights {listed} in one prompt, but its deltas have one strength "
                   f"for the whole picture: {weights[0]:g}")


def _on_chunk(vocabulary: Vocabulary, typed: str, inside: str) -> Iterator[str]:
    """Notes on text in brackets."""
    number = _WEIGHT.search(inside)
    weight = "" if number is None else f":{number[1].replace(',', '.')}"
    names = list(_names_in(vocabulary, inside))
    if not names and number is not None:
        names = difflib.get_close_matches(inside[:number.start()].strip(), list(vocabulary.entries), n=1)
    if names:
        yield f"'{typed}' is plain text in the prompt; for the concept write <{names[0]}{weight}>"
    elif _LOADER.match(inside):
        yield f"'{typed}' is plain text in the prompt; it loads no file"
    elif number is not None and vocabulary.entries:
        held = ", ".join(f"<{name}>" for name in sorted(vocabulary.infos)[:_SEVERAL])
        yield f"'{typed}' is plain text in the prompt; concepts here are {held}"


def _names_in(vocabulary: Vocabulary, text: str) -> Iterator[str]:
    """Placeholders whose name stands in a text as a word, whatever the case, longest first. Of names that
    differ in case only, the one in the case of the text comes first."""
    lowered = text.casefold()
    for name in sorted(vocabulary.entries, key=lambda name: (-len(name), name not in text, name)):
        if name.casefold() not in lowered:      # fast, and true for nearly all
            continue
        word = re.escape(name.casefold())
        if not _UNSPACED.search(name):
            word = rf"(?<![\w-]){word}(?![\w-])"
        lowered, count = re.subn(word, " ", lowered)
        if count:
            yield name
