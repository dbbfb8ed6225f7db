"""Token groups: the 1 to 3 learned words of a concept, one vector per text encoder and layer copy."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConceptError
from ..model.sites import SiteLayout
from .grammar import check_letters

# 1 to 64 letters and digits of any script, with - and _ inside.
NAME = re.compile(r"[^\W_](?:[\w-]{0,62}[^\W_])?")
LONGEST_NAME = 64
MAX_WORDS = 16
LONGEST_NOUN = 64
# In a prompt these set weights, name embeddings and placeholders, or choose at random.
_OF_PROMPTS = set("<>()[]{}:|\\")
_TURNS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")      # change the direction of writing


def typed_name(text: str) -> str:
    """The name that a person typed, with or without brackets. macOS types an accent as a separate character.
    """
    return unicodedata.normalize("NFC", text.strip().strip("<>"))


def check_name(name: str, what: str = "concept name") -> str:
    """Returns the name if it is safe in prompts, files and tensor keys; raises ConceptError otherwise."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConceptError(f"{what} {name!r} is not allowed; use 1 to 64 letters, digits, '-' or '_', "
                           "beginning and ending with a letter or digit")
    return name


def check_class_noun(noun: str) -> str:
    """Returns a class noun without spaces at its ends; "" is allowed. A noun is encoded as plain text, so
    raises ConceptError if it holds a sign that has a meaning in prompts."""
    noun = check_letters(" ".join(noun.split()), "the class noun")
    # full-width signs are read as the common ones
    odd = next((sign for sign in unicodedata.normalize("NFKC", noun)
                if sign in _OF_PROMPTS or unicodedata.category(sign) == "Cc" or sign in _TURNS), "")
    if odd or len(noun) > LONGEST_NOUN:
        shown = noun if len(noun) <= LONGEST_NOUN else f"{noun[:40]}..."
        reason = f"it holds {odd!r}" if odd else f"it has more than {LONGEST_NOUN} letters"
        raise ConceptError(f"class noun '{shown}' is not allowed, because {reason}; give a plain word, such "
                           "as dog or teddy bear")
    return noun


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names of concepts in a sentence: `<a>, <b>, <c> and 4 more`."""
    text = ", ".join(f"<{name}>" for name in names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def word_after(name: str, ending: str) -> str:
    """A word that is named after a concept. The end of a long name gives way to the ending."""
    return name[:LONGEST_NAME - len(ending)] + ending


def default_words(name: str, count: int) -> tuple[str, ...]:
    return tuple(word_after(name, f"-{i + 1}") for i in range(count))


@dataclass(frozen=True)
class TokenGroup:
    """The learned words of a concept.

    Args:
        words: Their names, each usable alone as `<word>`.
        vectors: Text encoder -> `[L, n, D]`: L layer copies (1 = not layer-wise), n words, width D.
        placeholder_noun: Replaces the words while the rest of a prompt is encoded; usually the class noun. ""
            = the words are encoded together with the rest. See `conditioning.placeholder_nouns`.
    """

    words: tuple[str, ...]
    vectors: Mapping[str, Tensor]
    placeholder_noun: str = ""

    @property
    def copies(self) -> int:
        return max(vector.shape[0] for vector in self.vectors.values())

    def digest(self) -> str:
        """16 hex digits that identify the vectors, whatever the words are called."""
        digest = hashlib.sha256()
        for name in sorted(self.vectors):
            digest.update(self.vectors[name].detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def check_fits(self, layout: SiteLayout, owner: str) -> None:
        """Raises ConceptError unless there are vectors of the right width for every text encoder of the base.
        """
        for encoder, width in layout.text_widths:
            vector = self.vectors.get(encoder)
            if vector is None:
                held = ", ".join(sorted(self.vectors)) or "none"
                raise ConceptError(f"{owner} has no token vectors for text encoder '{encoder}'; "
                                   f"it has {held}")
            fits = vector.ndim == 3 and vector.shape[1:] == (len(self.words), width)
            if not fits or vector.shape[0] not in (1, layout.copies):
                needs = f"[1 or {layout.copies}, {len(self.words)}, {width}]"
                raise ConceptError(f"{owner} has token vectors of shape {tuple(vector.shape)} for "
                                   f"'{encoder}'; this base needs {needs}")

    def word(self, position: int, encoder: str) -> Tensor:
        """Vectors of one word, `[L, D]`."""
        return self.vectors[encoder][:, position]

    def mean_copy(self) -> TokenGroup:
        """The group with one copy, the mean over layers, for formats without layer copies."""
        means = {encoder: vector.mean(0, keepdim=True) for encoder, vector in self.vectors.items()}
        return replace(self, vectors=means)


def initial_vectors(class_vectors: Tensor, words: int, copies: int, std: float,
                    generator: torch.Generator) -> Tensor:
    """Initial vectors as in CIDM: the first word is drawn from N(0, std), the others are the class noun's
    vectors.

    Args:
        class_vectors: The vocabulary's vectors of the class noun, `[n, D]`. If n > words - 1, the last ones
            are used; if n < words - 1, the last one is repeated.
        words: Number of words; 1 = the random word alone (C-LoRA's token without class noun).
        copies: L, the number of layer copies.
        std: Standard deviation of the first word's numbers.
        generator: Draws the first word.

    Returns:
        `[copies, words, D]`, float32, on the CPU.
    """
    width = class_vectors.shape[1]
    first = torch.randn(1, width, generator=generator) * std
    rest = class_vectors.float().cpu()
    rest = rest[-(words - 1):] if words > 1 else rest[:0]
    if words > 1 and len(rest) < words - 1:
        rest = torch.cat([rest, rest[-1:].expand(words - 1 - len(rest), width)])
    return torch.cat([first, rest]).unsqueeze(0).repeat(copies, 1, 1)
