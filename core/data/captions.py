"""Finds the captions of photos: text files, and tables such as metadata.jsonl."""

from __future__ import annotations

import codecs
import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConceptError

TEXTS = (".txt", ".caption")      # one caption per file; the first one comes first
TABLES = (".jsonl", ".csv", ".json")
NAMED_TABLES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.json")
NAME_KEYS = ("file_name", "image", "file", "path", "name")
TEXT_KEYS = ("text", "caption", "captions", "prompt")
LONGEST_CAPTION = 5000         # characters
LARGEST_TABLE = 16_000_000      # bytes
# longer marks first, because UTF-32 begins like UTF-16
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
         (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True)
class Caption:
    """A caption and the file it comes from."""

    text: str
    file: Path

    def named(self, photo: Path) -> str:
        """The caption of a photo, for messages."""
        return f"the caption of '{photo.name}' in '{self.file}'" if self.file.suffix.lower() in TABLES \
            else f"the caption '{self.file}'"


@dataclass
class Found:
    """What a search found. of: photo -> its caption or mask file; unused: file -> why it was not used, or
    what of it was not used."""

    of: dict[Path, Any] = field(default_factory=dict)
    unused: dict[Path, str] = field(default_factory=dict)


def is_caption_file(path: Path) -> bool:
    return path.suffix.lower() in (*TEXTS, *TABLES)


def decoded(data: bytes, file: Path, what: str = "caption file") -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Args:
        what: What the file is, for messages.

    Raises:
        ConceptError: It is in another encoding.
    """
    mark, encoding = next(((m, e) for m, e in MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark):].decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:      # also UTF-16 without a mark
        raise ConceptError(f"the {what} '{file}' is not in UTF-8; save it as UTF-8 (UTF-16 with a byte "
                           "order mark is read as well)")
    return text


def bytes_of(file: Path, what: str, most: int) -> bytes:
    """The first `most` bytes of a file, and one more if it is longer.

    Raises:
        ConceptError: It cannot be read; the reason follows the first colon.
    """
    try:
        with file.open("rb") as opened:
            return opened.read(most + 1)
    except OSError as error:
        raise ConceptError(f"the {what} '{file}' cannot be read: {error.strerror or error}") from None


def _text_of(file: Path) -> str:
    what = f"the caption '{file}'"
    largest = 4 * (LONGEST_CAPTION + 1)      # bytes: up to 4 per character, and the mark
    data = bytes_of(file, "caption", largest)
    if len(data) > largest:
        raise _too_long(what)
    return _checked(decoded(data, file), what)


def _checked(text: str, what: str) -> str:
    """A caption without space around it. Raises ConceptError if it is too long."""
    if len(text) > LONGEST_CAPTION:
        raise _too_long(what)
    return text.strip()


def _too_long(what: str) -> ConceptError:
    return ConceptError(f"{what} is longer than {LONGEST_CAPTION} characters, the most that is allowed")


Rank = tuple[int, int]      # how well a name fits a photo, smaller is better


def _letters(name: str) -> str:
    """A name for comparison: in any case, with accents in one form, since macOS has two signs for é."""
    return unicodedata.normalize("NFC", name).casefold()


class PhotoNames:
    """Photos by name, without and with their suffix, in any case and form of letters."""

    def __init__(self, photos: Iterable[Path]) -> None:
        self._photos: dict[str, list[Path]] = {}
        for photo in photos:
            for name in (photo.stem, photo.name):
                self._photos.setdefault(_letters(name), []).append(photo)

    def ranked(self, name: str) -> list[tuple[Rank, Path]]:
        """The photos that a name fits. Equal case of letters ranks first, then a name without suffix."""
        def rank(photo: Path) -> Rank:
            return int(name not in (photo.stem, photo.name)), int(_letters(name) != _letters(photo.stem))

        return [(rank(photo), photo) for photo in self._photos.get(_letters(name), ())]


def find_captions(photos: Sequence[Path], files: Iterable[Path]) -> Found:
    """Assigns captions to photos.

    A text file has the photo's name, with or without its suffix: `a.txt` or `a.jpg.txt`. It comes before a
    table that names the photo, `.txt` before `.caption`, and equal case before other case.

    Args:
        photos: Picture files.
        files: Text files and tables.

    Returns:
        `of`: photo -> `Caption`.

    Raises:
        ConceptError: A caption is too long, or not in a known encoding; or a table of a standard name is
            damaged.
    """
    files = sorted(files)
    found = Found()
    names = PhotoNames(photos)
    texts = [file for file in files if file.suffix.lower() in TEXTS]
    fits = [(photo, (*rank, TEXTS.index(file.suffix.lower())), file) for file in texts
            for rank, photo in names.ranked(file.stem)]
    chosen, found.unused = choose(texts, fits, "caption", "a text, but no photo has this name")
    found.of = {photo: Caption(_text_of(file), file) for photo, file in chosen.items()}
    for file in (file for file in files if file.suffix.lower() in TABLES):
        _add_table(found, names, file)
    return found


def choose(files: Iterable[Path], fits: Iterable[tuple[Path, tuple[int, ...], Path]], what: str,
           reason: str) -> tuple[dict[Path, Path], dict[Path, str]]:
    """Chooses the best file for each photo.

    Args:
        fits: photo, rank, and a file that fits it.
        what, reason: What the files are, and why they are not used if they fit no photo; for the report.

    Returns:
        photo -> file, and file -> why it is not used.
    """
    chosen: dict[Path, Path] = {}
    losers: dict[Path, str] = {}
    for photo, _, file in sorted(fits):
        best = chosen.setdefault(photo, file)
        if best != file:
            losers[file] = f"'{photo.name}' has its {what} from '{best.name}'"
    used = set(chosen.values())
    return chosen, {file: losers.get(file, reason) for file in files if file not in used}


def _add_table(found: Found, names: PhotoNames, file: Path) -> None:
    """Adds the captions of one table for photos that have none yet."""
    is_named = file.name.lower() in NAMED_TABLES
    try:
        rows = _rows(file)
    except ConceptError as error:
        if is_named:
            raise
        found.unused[file] = str(error).partition(": ")[2] or "it is not in UTF-8"
        return
    absent, lost, used = [], [], 0
    for name, text in rows:
        last = name.replace("\\", "/").rpartition("/")[2]
        ranks = names.ranked(last)
        best = min((rank[0] for rank, _ in ranks), default=0)
        owners = [photo for rank, photo in ranks if rank[0] == best]
        used += bool(owners)
        absent += [] if owners else [last]
        for photo in owners:
            present = found.of.get(photo)
            if present is None:
                found.of[photo] = Caption(_checked(text, f"the caption of '{photo.name}' in '{file}'"), file)
            elif present.text != text.strip():
                lost.append(f"'{photo.name}' is in it several times, and the first caption is used"
                            if present.file == file else
                            f"'{photo.name}' has its caption from '{present.file.name}'")
    if not used:
        found.unused[file] = "it has no captions of these photos" + ("" if rows else _wanted(file))
    elif absent or lost:
        found.unused[file] = "; ".join([*lost, *([f"no photo is named {_listed(absent)}"] if absent else [])])


def _wanted(file: Path) -> str:
    """What a table needs in which no name and caption were found."""
    place = {".csv": "row", ".jsonl": "line"}.get(file.suffix.lower())
    return "" if place is None else f"; needed are {NAME_KEYS[0]} and {TEXT_KEYS[0]} in every {place}"


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(f"'{name}'" for name in names[:5])
    return f"{text} and {len(names) - 5} more" if len(names) > 5 else text


def _rows(file: Path) -> list[tuple[str, str]]:
    """Names and captions of a table.

    Raises:
        ConceptError: It cannot be read; the reason follows the first colon.
    """
    data = bytes_of(file, "captions", LARGEST_TABLE)
    if len(data) > LARGEST_TABLE:
        raise ConceptError(f"the captions '{file}' cannot be read: it has more than {LARGEST_TABLE} bytes")
    text = decoded(data, file)
    try:
        if file.suffix.lower() == ".csv":
            return _entries(csv_records(text)[1])
        if file.suffix.lower() == ".jsonl":
            return _entries(list(_json_lines(text)))
        return _entries(json.loads(text))
    except (ValueError, RecursionError, csv.Error) as error:
        kind = file.suffix[1:].upper()
        raise ConceptError(f"the captions '{file}' cannot be read: it is no valid {kind} ({error})") from None


def csv_records(text: str, is_strict: bool = False) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a CSV table, and its rows by column. Spreadsheets separate columns by commas, semicolons
    or tabs.

    Args:
        is_strict: Whether a quote that is not closed is an error. It would hide the rows behind it.

    Raises:
        ValueError or csv.Error: A column is there twice, or a row has more cells than there are columns.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\n ")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True,
                      strict=is_strict)
    columns = [column.strip().lower() for column in next(rows, [])]
    while columns and not columns[-1]:
        columns.pop()
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"the column '{twice}' is there twice")
    records = []
    for row in rows:
        further = next((cell for cell in row[len(columns):] if cell.strip()), None)
        if further is not None:
            raise ValueError(f"line {rows.line_num} has no column for '{further[:40].strip()}'; put a text "
                             f"with '{separator}' into double quotes")
        if row:
            records.append(dict(zip(columns, [*row, *[""] * (len(columns) - len(row))], strict=False)))
    return columns, records


def _json_lines(text: str) -> Iterator[object]:
    """The values of a JSONL table. Raises ValueError with the number of a damaged line."""
    # only these end a line: a caption may hold other signs that str.splitlines splits at
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {getattr(error, 'msg', error)}") from None


def _entries(value: object) -> list[tuple[str, str]]:
    """Names and captions: of a list of records with a name, or of an object name -> text or record."""
    pairs: list[tuple[object, object]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        records = [record for record in value if isinstance(record, dict)]
        pairs = [(next((record[key] for key in NAME_KEYS if record.get(key)), None), record)
                 for record in records]
    texts = [(name, _caption_in(content)) for name, content in pairs]
    return [(name, text) for name, text in texts if isinstance(name, str) and text]


def _caption_in(content: object) -> str:
    """The caption in a table's entry: a text, the first of several, or a record with a caption and tags."""
    if isinstance(content, list):
        content = content[0] if content else ""
    if isinstance(content, dict):
        texts = [_caption_in(content[key]) for key in TEXT_KEYS if content.get(key)][:1]
        tags = content.get("tags")
        tags = ", ".join(map(str, tags)) if isinstance(tags, list) else tags
        # as kohya's scripts join them
        return ", ".join([*texts, *([tags] if isinstance(tags, str) and tags.strip() else [])])
    return content if isinstance(content, str) else ""
