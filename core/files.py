"""Names and places of output files, and atomic writing."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import ConceptError, WriteError

LONGEST_NAME = 255      # bytes of a file name in UTF-8, on all common file systems
# Windows gives these names to devices, whatever the ending, so that a file of such a name cannot be opened.
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³")}
_ODD = '<>:"|?*' if os.name == "nt" else ""
_PARTIAL = len(".12345678.partial")
_MOST = 99_999      # files of one name in a folder


def is_device(name: str) -> bool:
    """Whether Windows takes a file name for a device: `CON`, `aux.safetensors`."""
    return name.split(".")[0].strip().lower() in DEVICES


def check_file_name(name: str, what: str = "file name") -> str:
    """Returns the name of a file if file systems can store it; raises ConceptError otherwise.

    Args:
        what: Description of the name, for messages.
    """
    odd = next((letter for letter in name if letter in _ODD or ord(letter) < 32), "")
    if is_device(name):
        raise ConceptError(f"{what} {name!r} is not allowed, because Windows reserves "
                           f"'{name.split('.')[0].strip()}' for a device; choose another name")
    if odd:
        raise ConceptError(f"{what} {name!r} is not allowed, because file names cannot hold {odd!r}")
    if name.endswith((".", " ")) and name not in (".", ".."):
        raise ConceptError(f"{what} {name!r} is not allowed, because Windows drops a dot or a space at its "
                           "end")
    if len(name.encode("utf-8", "surrogateescape")) > LONGEST_NAME:
        raise ConceptError(f"{what} '{name[:40]}...' is too long with {len(name)} letters; a file name can "
                           f"have {LONGEST_NAME} bytes")
    return name


def shortened(name: str, room: int) -> str:
    """The name if it fits into `room` bytes of UTF-8, else its beginning and a digest of the whole."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) <= room:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[:room - len(digest) - 1].decode('utf-8', 'ignore')}~{digest}"


def distinct(name: str) -> str:
    """A name whose file is its own where a disk ignores case: one with capitals gets a digest behind it."""
    if name == name.casefold():
        return name
    return f"{name}~{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


def unique_stem(stem: str, others: Iterable[str]) -> str:
    """The stem of a file name, with "-2" behind it until it differs from all others. Case is ignored, as some
    disks do."""
    taken = {other.casefold() for other in others}
    while stem.casefold() in taken:
        stem += "-2"
    return stem


def names_in(folder: Path) -> set[str]:
    """The names of what a folder holds, casefolded: Windows, macOS and other programs ignore case."""
    return {entry.name.casefold() for entry in os.scandir(folder)}


def beside(path: Path, ending: str) -> Path:
    """The hidden file `.<name><ending>` beside `path`, with a shortened name where it would be too long."""
    room = LONGEST_NAME - 1 - len(ending.encode("utf-8", "surrogateescape")) - _PARTIAL
    return path.with_name(f".{shortened(path.name, room)}{ending}")


def real_file(path: Path | str) -> Path:
    """The file that a path stands for: the target of a symbolic link, else the path itself.

    Raises:
        ConceptError: The link leads back to itself.
    """
    if not os.path.islink(path):
        return Path(path)
    target = Path(os.path.realpath(path))
    if os.path.islink(target):
        raise ConceptError(f"'{path}' is a symbolic link that leads back to itself")
    return target


def check_output(path: Path | str, what: str = "file") -> Path:
    """Checks that a file can be written, before the work whose result it will hold. Leaves nothing behind.

    Args:
        what: Description of the file, for messages.

    Returns:
        The file that will be written, see `real_file`.

    Raises:
        ConceptError: The path is a folder, its name is not allowed, or its folder cannot be written.
    """
    file = real_file(path)
    if os.path.isdir(file) or str(path).endswith(("/", os.sep)):
        raise ConceptError(f"the {what} '{path}' is a folder; give the path of a file")
    check_file_name(file.name, f"{what} name")
    if os.path.exists(file) and not os.access(file, os.W_OK):
        raise WriteError(f"the {what} '{path}' is write-protected; allow writing or choose another file")
    _check_folder(file.parent, f"the {what} '{path}' cannot be written", file.name)
    return file


def check_output_folder(folder: Path | str, what: str = "output folder") -> None:
    """Checks that files can be written into a folder, which may be missing. Leaves nothing behind.

    Raises:
        WriteError: It is a file, or it cannot be made or written.
    """
    _check_folder(Path(folder), f"the {what} '{folder}' cannot be used")


def _check_folder(folder: Path, sentence: str, name: str = "file") -> None:
    """Writes a small file into the folder, or into the nearest folder above that exists."""
    nearest = folder
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        check_file_name(nearest.name, "folder name")
        nearest = nearest.parent
    if not os.path.isdir(nearest):
        raise WriteError(f"{sentence}: '{nearest}' is not a folder")
    trial = beside(nearest / name, f".{secrets.token_hex(4)}.partial")
    try:
        trial.write_bytes(b"trial")
    except OSError as error:
        raise WriteError(f"{sentence}: {_reason(error)} in '{nearest}'") from error
    finally:
        _remove(trial)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def write_atomically(path: Path, write: Callable[[Path], object],
                     before: Callable[[], object] = lambda: None) -> None:
    """Writes a file so that readers see either the old or the new one. If anything fails, the old one stays.

    Of a symbolic link, the target is written and the link stays.

    Args:
        write: Writes to the given temporary path. The complete file is then renamed to `path`.
        before: Called when the new file is complete, before it replaces the old one.

    Raises:
        WriteError: The folder cannot be made or the file cannot be written.
    """
    path = real_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make the folder '{path.parent}': {_reason(error)}") from error
    temporary = partial_file(path, secrets.token_hex(4))
    try:
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        # safetensors makes files that only their owner can read. Keep the old file's permissions; new files
        # get the default.
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        before()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:      # safetensors reports a full disk as its own error
        raise WriteError(f"cannot write '{path}': {_reason(error)}") from error
    finally:
        _remove(temporary)


def partial_file(path: Path, token: str) -> Path:
    """The half-written file of `write_atomically`. token: 8 hex digits."""
    return beside(path, f".{token}.partial")


def _remove(path: Path) -> None:
    """Deletes a file if it can. A failure must not hide the error that came before."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def new_file(path: Path) -> Path:
    """Creates an empty file that did not exist: `path`, else `<stem>_00002<suffix>` and so on. A name that
    differs from another one only by case counts as the same.

    Two programs that call this at the same time get different files.

    Raises:
        WriteError: No file can be created.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = names_in(path.parent)
        for count in range(1, _MOST + 1):
            file = path.with_stem(f"{path.stem}_{count:05d}") if count > 1 else path
            if file.name.casefold() in taken:
                continue
            try:
                file.open("xb").close()
                return file
            except FileExistsError:
                continue
    except OSError as error:
        raise WriteError(f"cannot write '{path}': {_reason(error)}") from error
    raise WriteError(f"'{path.parent}' holds {_MOST} files like '{path.name}'; choose another folder")


def write_new(path: Path, write: Callable[[Path], object]) -> Path:
    """Writes a file beside those that exist, see `new_file`. Returns its path."""
    file = new_file(path)
    try:
        write_atomically(file, write)
    except BaseException:
        _remove(file)
        raise
    return file


def write_elsewhere(path: Path, write: Callable[[Path], object]) -> Path | None:
    """Writes what could not be written to `path` under another name: beside it, in the current folder, or
    in the system's folder for temporary files.

    Returns:
        The file, or None if none of the three can be written.
    """
    name = f"{shortened(path.stem, LONGEST_NAME - 60)}_kept{path.suffix}"
    for folder in _other_folders(path):
        try:
            return write_new(folder / name, write).absolute()
        except WriteError:
            continue
    return None


def _other_folders(path: Path) -> Iterator[Path]:
    yield path.parent
    for folder in (Path.cwd, tempfile.gettempdir):
        try:
            yield Path(folder())
        except OSError:      # a current folder that was deleted; a system without temporary files
            continue


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable where the system can open folders (not on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
