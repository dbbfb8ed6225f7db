"""Writes the files of an export, all or none, and never overwrites existing files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..bank.tokens import check_name
from ..errors import ConceptError
from ..files import is_device, names_in, unique_stem, write_atomically

# Suffixes of file names. The embedding has none, because people type its name.
ENDINGS = {"kohya": "_lora", "bundle": "_bundle", "diffusers": "_diffusers_lora", "embedding": ""}
FORMATS = tuple(ENDINGS)
DEFAULT_FORMATS = ("kohya", "embedding")
_MOST = 99_999


@dataclass(frozen=True)
class Exported:
    """files: one per format, in the given order; notes: contents of the files and losses."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class OutputFile:
    """One file to write.

    Args:
        name: The concept's name, or that of the prompt's file.
        kind: The format.
        state: The tensors.
        metadata: Function from the file's path to its metadata.
    """

    name: str
    kind: str
    state: Mapping[str, Tensor]
    metadata: Callable[[Path], dict[str, str]]


@dataclass(frozen=True)
class Folders:
    """words: folder of embeddings, None = same as the other files."""

    files: Path
    words: Path | None = None

    @classmethod
    def of(cls, folder: Path | str, words: Path | str | None) -> Folders:
        return cls(Path(folder), None if words is None else Path(words))

    def of_format(self, kind: str) -> Path:
        return self.words if kind == "embedding" and self.words is not None else self.files


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """Returns the formats without repetition. Raises ConceptError if there are none or unknown ones."""
    formats = tuple(dict.fromkeys(formats))
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown or not formats:
        named = unknown[0] if unknown else "not given"
        raise ConceptError(f"export format is {named!r}; allowed: {', '.join(FORMATS)}")
    return formats


def write_files(owner: str, outputs: Sequence[OutputFile], folders: Folders) -> tuple[Path, ...]:
    """Writes all outputs or none.

    Existing files are never overwritten. Instead, a counter such as `_00002` is appended to the names, the
    same for all files of a call.

    Args:
        owner: Description of the exported object, for messages.

    Returns:
        A path for each output.

    Raises:
        ConceptError: A file cannot be written.
    """
    with _new_files(owner, outputs, folders) as paths:
        for output, path in zip(outputs, paths, strict=True):
            metadata = output.metadata(path)
            write_atomically(path, partial(_save, dict(output.state), metadata))
    return paths


def _save(state: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    save_file(state, str(path), metadata)


@contextmanager
def _new_files(owner: str, outputs: Sequence[OutputFile], folders: Folders) -> Iterator[tuple[Path, ...]]:
    """Creates empty files and yields their paths. Deletes them if the block fails."""
    try:
        for kind in dict.fromkeys(output.kind for output in outputs):
            folders.of_format(kind).mkdir(parents=True, exist_ok=True)
        paths = _reserved(outputs, folders)
    except OSError as error:
        raise ConceptError(f"cannot write {owner} into '{folders.files}': "
                           f"{error.strerror or error}") from error
    try:
        yield paths
    except BaseException:
        _remove(paths)
        raise


def _reserved(outputs: Sequence[OutputFile], folders: Folders) -> tuple[Path, ...]:
    stems = _stems(outputs)
    taken = {output.kind: names_in(folders.of_format(output.kind)) for output in outputs}
    for count in range(1, _MOST + 1):
        counter = f"_{count:05d}" if count > 1 else ""
        made: list[Path] = []
        try:
            for stem, output in zip(stems, outputs, strict=True):
                path = folders.of_format(output.kind) / f"{stem}{counter}.safetensors"
                if path.name.casefold() in taken[output.kind]:
                    raise FileExistsError
                # Fails if anything exists, even a link, so that two simultaneous exports never share a file.
                path.open("xb").close()
                made.append(path)
            return tuple(made)
        except OSError as error:
            _remove(made)
            if not isinstance(error, FileExistsError):
                raise
    raise ConceptError(f"'{folders.files}' holds {_MOST} exports of '{outputs[0].name}' already; choose "
                       "another folder")


def _stems(outputs: Sequence[OutputFile]) -> list[str]:
    """File names without counter, unique even if the file system ignores case."""
    stems: list[str] = []
    for output in outputs:
        name = check_name(output.name)
        stem = f"{name}_concept" if is_device(name) else name
        stems.append(unique_stem(stem + ENDINGS[output.kind], stems))
    return stems


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
