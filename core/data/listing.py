"""Lists the files of a folder of photos."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ..errors import ConceptError
from .masks import masks_among
from .reading import is_photo, is_picture

MASKS, CAPTIONS = "masks", "captions"      # subfolders that are used without being asked for
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db")
REPEATS = re.compile(r"(\d{1,4})_\S.*")      # kohya's folder names: 10_dog


def repeats_of(folder: Path) -> int:
    """The repeats in a folder's name: 10 for `10_dog`, else 1."""
    match = REPEATS.fullmatch(folder.name)
    return max(1, int(match[1])) if match else 1


def entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConceptError(f"the folder '{folder}' cannot be read: {error.strerror}") from None


def is_hidden(path: Path) -> bool:
    """Whether a file belongs to the system or is hidden."""
    return path.name.startswith(".") or path.name.lower() in SYSTEM_FILES


def visible_files(path: Path) -> list[Path]:
    """The visible files of a folder; a file itself."""
    return [path] if path.is_file() else [entry for entry in entries(path) if entry.is_file()
                                          and not is_hidden(entry)]


def pictures_in(folder: Path) -> list[Path]:
    """The photos of a folder by name: no hidden files, no masks beside photos."""
    files = [path for path in entries(folder) if is_picture(path.name) and not is_hidden(path)
             and path.is_file()]
    masks = set(masks_among(files))
    return [path for path in files if path not in masks]


def holds_photos(folder: Path) -> bool:
    """Whether a folder holds photos, also such as can be read only after a package is installed."""
    return any(is_photo(path.name) and not is_hidden(path) for path in entries(folder))


def file_digests(folder: Path | str) -> list[str]:
    """What identified the photos of a folder in early versions: 16 hex digits of SHA-256 over each file."""
    folder = Path(folder)
    files = [folder] if folder.is_file() else pictures_in(folder) if folder.is_dir() else []
    return [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]


def subfolders_with_pictures(folder: Path) -> list[Path]:
    """The visible subfolders that hold photos, without those of masks and captions."""
    return [path for path in entries(folder) if path.is_dir() and not is_hidden(path)
            and path.name.lower() not in (MASKS, CAPTIONS) and pictures_in(path)]
