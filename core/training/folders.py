"""A folder with a folder of photos per concept: which concepts are to be learned from it."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..bank.concepts import KINDS
from ..bank.tokens import check_class_noun, check_name, typed_name
from ..data.captions import LARGEST_TABLE, bytes_of, csv_records, decoded
from ..data.listing import entries, is_hidden, pictures_in, subfolders_with_pictures
from ..data.report import Skipped, counted
from ..errors import ConceptError
from .presets import SHORT_NAMES

TABLE = "concepts.csv"
# `rex`, `rex dog`, and kohya's `10_rex dog`
_FOLDER = re.compile(r"(?:\d+_)?(?P<name>\S+)(?:\s+(?P<noun>.+))?")


@dataclass(frozen=True)
class Planned:
    """One concept to learn. folder: its photos; captions, masks: as of the command `learn`, None = not
    given; kind, preset: empty = not given; variant_of: the concept that it starts from, empty = none."""

    folder: Path
    name: str
    noun: str = ""
    kind: str = ""
    captions: Path | None = None
    masks: Path | None = None
    preset: str = ""
    variant_of: str = ""


_EXAMPLES = 3      # folders that a note lists, at most
COLUMNS = tuple(field.name for field in fields(Planned))


def _rows(table: Path) -> list[dict[str, str]]:
    """The rows of a table. Raises ConceptError if it cannot be read, or for a column that is unknown or
    missing."""
    data = bytes_of(table, "table", LARGEST_TABLE)
    if len(data) > LARGEST_TABLE:
        raise ConceptError(f"the table '{table}' has more than {LARGEST_TABLE} bytes")
    text = decoded(data, table, "table")
    try:
        columns, records = csv_records(text, is_strict=True)
    except (ValueError, csv.Error) as error:
        raise ConceptError(f"the table '{table}' cannot be read: {error}") from None
    known = ", ".join(COLUMNS)
    for column in columns:
        if column not in COLUMNS:
            raise ConceptError(f"the table '{table}' has a column '{column}'; allowed: {known}")
    if not {"folder", "name"} <= set(columns):
        raise ConceptError(f"the table '{table}' needs the columns folder and name; allowed are {known}")
    rows = [{column: value.strip() for column, value in record.items()} for record in records]
    return [row for row in rows if any(row.values())]


def _inside(folder: Path, text: str, table: Path, is_confined: bool) -> Path:
    """A path of the table, relative to the folder. Raises ConceptError for one that does not exist, or that
    leaves the folder although it must not.
    """
    if is_confined and (os.path.isabs(text) or text.startswith("~") or ".." in re.split(r"[/\\]", text)):
        raise ConceptError(f"the table '{table}' names '{text}'; allowed here: paths inside the folder")
    path = folder / os.path.expanduser(text)      # leaves an unknown home folder as it is
    if not os.path.exists(path):
        raise ConceptError(f"the table '{table}' names '{text}', which does not exist in '{folder}'")
    return path


def _of_table(folder: Path, table: Path, is_confined: bool) -> list[Planned]:
    found = []
    for row in _rows(table):
        paths = {key: _inside(folder, row[key], table, is_confined) if row.get(key) else None
                 for key in ("folder", "captions", "masks")}
        if paths["folder"] is None:
            raise ConceptError(f"the table '{table}' names no folder for '{row['name']}'")
        if paths["folder"].is_dir() and not pictures_in(paths["folder"]):
            raise ConceptError(f"the table '{table}' names the folder '{row['folder']}', which holds no "
                               "pictures that can be read")
        found.append(Planned(paths["folder"], typed_name(row["name"]), row.get("noun", ""),
                             row.get("kind", ""), paths["captions"], paths["masks"],
                             row.get("preset", ""), typed_name(row.get("variant_of", ""))))
    return found


def _of_names(folder: Path) -> list[Planned]:
    """The subfolders with photos; their names say name and class noun."""
    found = []
    for path in subfolders_with_pictures(folder):
        match = _FOLDER.fullmatch(path.name)
        name, noun = (path.name, "") if match is None else (match["name"], match["noun"] or "")
        found.append(Planned(path, typed_name(name), noun))
    return found


def plan(folder: Path, table: Path | None = None, is_confined: bool = False) -> list[Planned]:
    """The concepts of a folder, all checked before any is learned.

    Args:
        folder: Holds a subfolder of photos per concept.
        table: A CSV table with the columns folder and name, and if wanted noun, kind, captions, masks,
            preset and variant_of; paths are relative to `folder`. None = the folder's concepts.csv if
            there is one, else the names of the subfolders: `rex`, `rex dog` or `10_rex dog`.
        is_confined: Whether the table may only name paths inside the folder, because others can write it.

    Raises:
        ConceptError: There are no photos; or a name, class noun, kind or preset is missing, wrong or given
            twice.
    """
    if not folder.is_dir():
        problem = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise ConceptError(f"the folder '{folder}' {problem}")
    # a link that leads nowhere is a table, too, and an error
    table = table or (folder / TABLE if os.path.lexists(folder / TABLE) else None)
    found = _of_names(folder) if table is None else _of_table(folder, table, is_confined)
    if not found:
        raise ConceptError(f"'{table or folder}' names no folder with pictures; needed is a folder of photos "
                           "per concept")
    for planned in found:
        check_name(planned.name, f"folder '{planned.folder.name}': concept name")
        check_class_noun(planned.noun)
        if planned.kind not in ("", *KINDS):
            raise ConceptError(f"kind of concept '{planned.name}' is '{planned.kind}'; allowed: "
                               f"{', '.join(KINDS)}")
        if planned.preset not in ("", *SHORT_NAMES):
            raise ConceptError(f"preset of concept '{planned.name}' is '{planned.preset}'; allowed: "
                               f"{', '.join(SHORT_NAMES)}")
        if not planned.noun and not planned.variant_of:
            raise ConceptError(f"concept '{planned.name}' has no class noun; name its folder '{planned.name} "
                               f"dog', or give the column noun of {TABLE}")
    twice = [name for name, count in Counter(planned.name for planned in found).items() if count > 1]
    if twice:
        raise ConceptError(f"the name '{twice[0]}' is given to more than one folder; give each its own")
    return found


def check_parents(found: Sequence[Planned], held: Sequence[str]) -> None:
    """Checks that what a variant starts from is learned before it. held: names in the bank.

    Raises:
        ConceptError: It is neither in the bank nor in an earlier row.
    """
    known = set(held)
    for planned in found:
        if planned.variant_of and planned.variant_of not in known:
            raise ConceptError(f"concept '{planned.name}' is a variant of '{planned.variant_of}', which is "
                               "neither in the bank nor in a row above it")
        known.add(planned.name)


def passed_over(folder: Path) -> list[Skipped]:
    """What a folder without a table holds beside the folders that are learned from."""
    parts = subfolders_with_pictures(folder)
    return [Skipped(path.name, "a folder without pictures that can be read" if path.is_dir()
                    else "not in a folder of its own")
            for path in entries(folder) if path not in parts and not is_hidden(path)]


def read_as(found: Sequence[Planned]) -> list[str]:
    """A note on folders whose names have more words than name and class noun: what was read. found: read from
    the names of folders."""
    read = [f"'{planned.folder.name}' is <{planned.name}>, a {planned.noun}" for planned in found
            if " " in planned.noun]
    if not read:
        return []
    more = f"; and {len(read) - _EXAMPLES} more" if len(read) > _EXAMPLES else ""
    return [f"the first word of a folder's name is the concept's name: {'; '.join(read[:_EXAMPLES])}{more}; "
            f"rename the folder, or make a table {TABLE}, where that is not meant"]


def headline(where: str, held: int, learned: int, known: int) -> str:
    """The first line of the report on a folder.

    Args:
        where: The bank, for a sentence.
        held: How many concepts it holds now.
        learned, known: How many of the folder were learned now, and how many it held already.
    """
    was, knew = ("was" if count == 1 else "were" for count in (learned, known))
    return (f"{where} holds {counted(held, 'concept')}; {learned} {was} learned now, "
            f"{known} {knew} there already")


def reasons(failed: Mapping[str, Sequence[str]]) -> list[str]:
    """What was not learned, a phrase per reason. failed: message -> names."""
    return [f"{', '.join(f'<{name}>' for name in names)}: {why}" for why, names in failed.items()]
