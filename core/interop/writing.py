"""Files of an export: all of one call or none, under names that nobody else has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..bank.tokens import check_name
from ..errors import ConceptError
from ..files import write_atomically

# What each format's files are called after the concept. The embedding has the plain name, because that is what people type.
ENDINGS = {"kohya": "_lora", "bundle": "_bundle", "diffusers": "_diffusers_lora", "embedding": ""}
FORMATS = tuple(ENDINGS)
DEFAULT_FORMATS = ("kohya", "embedding")
_MOST = 99_999
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}     # names that Windows keeps


@dataclass(frozen=True)
class Exported:
    """files: what was written, one per format, in the order asked for; notes: sentences on what the files hold and what they lost."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """One file to be: whose it is, in which format, what is in it, and what its metadata say once it has a path."""

    name: str
    kind: str
    state: Mapping[str, Tensor]
    metadata: Callable[[Path], dict[str, str]]


@dataclass(frozen=True)
class Folders:
    """words: where embeddings go, when not to the other files."""

    files: Path
    words: Path | None = None

    @classmethod
    def of(cls, folder: Path | str, words: Path | str | None) -> Folders:
        return cls(Path(folder), None if words is None else Path(words))

    def of_format(self, kind: str) -> Path:
        return self.words if kind == "embedding" and self.words is not None else self.files


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """Each once; ConceptError for none and for unknown ones."""
    formats = tuple(dict.fromkeys(formats))
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown or not formats:
        raise ConceptError(f"export format is {unknown[0] if unknown else 'not given'!r}; allowed: {', '.join(FORMATS)}")
    return formats


def write_pieces(owner: str, pieces: Sequence[Piece], folders: Folders) -> tuple[Path, ...]:
    """A path per piece. Nothing is overwritten: a counter such as `_00002` follows the names instead, the same for all of one call. Raises
    ConceptError, and then leaves no file."""
    with _new_files(owner, pieces, folders) as paths:
        for piece, path in zip(pieces, paths, strict=True):
            metadata = piece.metadata(path)
            write_atomically(path, lambda temporary, s=piece.state, m=metadata: save_file(dict(s), str(temporary), m))
    return paths


@contextmanager
def _new_files(owner: str, pieces: Sequence[Piece], folders: Folders):
    """Paths of empty files that nobody else has. They disappear when the block fails."""
    try:
        for kind in dict.fromkeys(piece.kind for piece in pieces):
            folders.of_format(kind).mkdir(parents=True, exist_ok=True)
        paths = _reserved(pieces, folders)
    except OSError as error:
        raise ConceptError(f"cannot write {owner} into '{folders.files}': {error.strerror or error}") from error
    try:
        yield paths
    except BaseException:
        _remove(paths)
        raise


def _reserved(pieces: Sequence[Piece], folders: Folders) -> tuple[Path, ...]:
    stems = _stems(pieces)
    for count in range(1, _MOST + 1):
        counter = f"_{count:05d}" if count > 1 else ""
        made: list[Path] = []
        try:
            for stem, piece in zip(stems, pieces, strict=True):
                path = folders.of_format(piece.kind) / f"{stem}{counter}.safetensors"
                path.open("xb").close()     # fails where something is, be it a link: two exports at once cannot meet
                made.append(path)
            return tuple(made)
        except OSError as error:
            _remove(made)
            if not isinstance(error, FileExistsError):
                raise
    raise ConceptError(f"'{folders.files}' holds {_MOST} exports of '{pieces[0].name}' already; choose another folder")


def _stems(pieces: Sequence[Piece]) -> list[str]:
    """File names without counter; also different where file systems do not tell capitals from small letters."""
    stems: list[str] = []
    for piece in pieces:
        name = check_name(piece.name)
        stem = f"{name}_concept{ENDINGS[piece.kind]}" if name.lower() in _DEVICES else f"{name}{ENDINGS[piece.kind]}"
        while stem.casefold() in {other.casefold() for other in stems}:
            stem += "-2"
        stems.append(stem)
    return stems


def _remove(paths) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
