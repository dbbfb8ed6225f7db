"""The contact sheet that `learn` writes: it never replaces another file, and is never read as a photo."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..data.contact_sheet import contact_sheet
from ..data.report import Report
from ..errors import ConceptError
from ..files import check_output, write_atomically

KEY, MARK = "Software", "continual-concepts contact sheet"      # a text in the PNG file


def check_sheet(sheet: Path, read: Iterable[Path | None], what: str = "contact sheet") -> None:
    """Checks a contact sheet, or another picture, before any work.

    Args:
        sheet: Its file.
        read: The folders that photos, captions and masks are read from. A sheet in one of them would be read
            as a photo by the next run. None and single files do not count.
        what: Description of the picture, for messages.

    Raises:
        ConceptError: The sheet cannot be written, is no PNG file, would replace another file, or lies in one
            of these folders.
    """
    file = check_output(sheet, what)
    if file.suffix.lower() != ".png":
        raise ConceptError(f"the {what} '{sheet}' does not end in .png; give the path of a PNG file")
    if os.path.exists(file) and not _is_sheet(file):
        raise ConceptError(f"the {what} '{sheet}' would replace a file that is no {what}; "
                           "choose another path")
    place = Path(os.path.realpath(file.parent))
    for folder in read:
        if folder is not None and folder.is_dir() and place.is_relative_to(os.path.realpath(folder)):
            raise ConceptError(f"the {what} '{sheet}' lies in '{folder}', where it would be taken for "
                               "a photo; choose a path outside")


def _is_sheet(file: Path) -> bool:
    try:
        with Image.open(file, formats=("PNG",)) as image:
            return image.info.get(KEY) == MARK
    except Exception:      # PIL's plugins raise arbitrary exceptions for damaged files
        return False


def write_sheet(sheet: Path, report: Report) -> None:
    """Draws the report on photos into a PNG file that `check_sheet` knows again."""
    write_picture(sheet, contact_sheet(report))


def write_picture(sheet: Path, picture: Image.Image) -> None:
    """Writes a picture as a PNG file that `check_sheet` knows again."""
    mark = PngInfo()
    mark.add_text(KEY, MARK)
    write_atomically(sheet, lambda path: picture.save(path, format="PNG", pnginfo=mark))
