"""The embedded bases that ship: their names and files, and the sizes in a file's header."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import ConceptError

ASSETS = Path(__file__).parent / "assets"
TOKENIZER = ASSETS / "tokenizer"
HEADER = "continual_concepts_base"
OLD_SIZE = 64      # of pictures, for files of before headers named it

# oldest first
FILES = {"embedded-64": ASSETS / "base.safetensors", "embedded-128": ASSETS / "base-128.safetensors"}
NEWEST = list(FILES)[-1]
EMBEDDED = "embedded"      # the newest one
# diffusion transformers; a name is offered once its file is there
JOINT = "embedded-joint"      # its text takes class nouns instead of learned words
TRANSFORMERS = {"embedded-dit": ASSETS / "base-dit.safetensors", JOINT: ASSETS / "base-joint.safetensors"}
NAMES = (EMBEDDED, *FILES, *(name for name, file in TRANSFORMERS.items() if file.exists()))


def file_of(name: str) -> Path:
    """The file of an embedded base. Raises ConceptError for a name that is not in `NAMES`."""
    if name in TRANSFORMERS:
        if not TRANSFORMERS[name].exists():
            raise ConceptError(f"base {name!r} is not trained yet, so this version has no file of it; "
                               f"allowed: {', '.join(NAMES)}")
        return TRANSFORMERS[name]
    if name not in NAMES:
        raise ConceptError(f"base {name!r} is unknown; allowed: {', '.join(NAMES)}")
    return FILES[NEWEST if name == EMBEDDED else name]


@contextmanager
def whole(path: Path | str) -> Iterator[None]:
    """Turns what goes wrong while a file that ships is read into a ConceptError: the file is missing, its
    download broke off, or Git stored a pointer in its place."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConceptError(f"the file '{path}', which comes with Continual Concepts, is missing or damaged; "
                           "install Continual Concepts again") from error


def read_sizes(path: Path = FILES[NEWEST]) -> dict:
    """The header of a base file: the sizes of its modules, 'schedule', 'notes' and 'picture_size'.

    Raises:
        ConceptError: The file is missing or damaged.
    """
    with whole(path), safe_open(str(path), framework="pt") as file:
        return {"picture_size": OLD_SIZE, **json.loads(file.metadata()[HEADER])}


def called(name: str) -> str:
    """What nodes call a base: the newest one is chosen as `embedded`."""
    return f"{EMBEDDED} ({name})" if name == NEWEST else name


def picture_size(name: str = EMBEDDED) -> int:
    """Side in pixels of the pictures that an embedded base draws."""
    return read_sizes(file_of(name))["picture_size"]
