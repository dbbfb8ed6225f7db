"""The command `learn-all`: every subfolder of photos becomes a concept of one bank."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from ..bank.format import open_bank
from ..errors import ConceptError
from ..evaluation.inspection import inspect
from ..evaluation.inspection import lines as inspection_lines
from ..evaluation.photo_encoder import photo_encode
from ..files import unique_stem
from ..training.folders import TABLE, Planned, check_parents, headline, passed_over, plan, read_as, reasons
from .learning import check_options, learn
from .result import Result, complain, one_sentence, say
from .sheets import check_sheet


def _sheets(found: list[Planned], folder: Path | None) -> list[Path | None]:
    """The contact sheet of each concept; None without a folder of sheets. Files have different names even
    where a disk ignores case."""
    if folder is None:
        return [None] * len(found)
    stems: list[str] = []
    for planned in found:
        stems.append(unique_stem(planned.name, stems))
    return [folder / f"{stem}.png" for stem in stems]


def _options(planned: Planned, options: Namespace, sheet: Path | None = None) -> Namespace:
    """The options of `learn` for one concept. sheet: its contact sheet."""
    own = {"images": planned.folder, "name": planned.name, "noun": planned.noun, "kind": planned.kind or None,
           "captions": planned.captions, "masks": planned.masks, "words": (), "subfolders": False,
           "preset": planned.preset or options.preset, "variant_of": planned.variant_of,
           "keep_states": None, "sample_prompts": (), "samples": None, "states_picture": None,
           "contact_sheet": sheet}
    return Namespace(**{**vars(options), **own})


def _check(options: Namespace, found: list[Planned], sheets: list[Path | None]) -> None:
    """Checks what concerns all concepts, before any is learned. sheets: their contact sheets."""
    for planned in found:
        check_options(_options(planned, options))
    check_parents(found, open_bank(options.bank).names if os.path.exists(options.bank) else ())
    if options.contact_sheets is not None:
        # without a table, a folder of sheets would be learned from by the next run
        read = [options.folder, options.prior,
                *(path for planned in found for path in (planned.folder, planned.captions, planned.masks))]
        for sheet in sheets:
            if sheet is not None:
                check_sheet(sheet, read)


def _sentence(failed: dict[str, list[str]], count: int) -> str:
    """What was not learned. failed: message -> names."""
    lost = sum(map(len, failed.values()))
    kept = "the bank holds the others, and the same command" if lost < count else "the same command"
    was = "was" if lost == 1 else "were"
    return f"{lost} of {count} concepts {was} not learned; {kept} tries again: {'; '.join(reasons(failed))}"


def _report(options: Namespace, facts: list[dict]) -> list[str]:
    """How many concepts were learned, and a line per concept of the bank. facts: of this run's concepts."""
    if not facts:
        return []      # nothing was learned, or another process writes and reports
    bank = open_bank(options.bank)
    learned = sum(fact["learned"] for fact in facts)
    return [headline(str(options.bank), len(bank), learned, len(facts) - learned),
            *inspection_lines(inspect(bank, photo_encode(bank.layout)))]


def learn_all(options: Namespace) -> Result:
    """Learns all concepts, one after another, and reports on the bank at the end. A concept that fails does
    not stop the others.

    Raises:
        ConceptError: Some concepts were not learned. The bank holds the others.
    """
    found, facts = plan(options.folder, options.table), []
    failed: dict[str, list[str]] = {}
    has_table = options.table is not None or os.path.lexists(options.folder / TABLE)
    skipped = [] if has_table else passed_over(options.folder)
    sheets = _sheets(found, options.contact_sheets)
    _check(options, found, sheets)
    for note in [] if has_table else read_as(found):
        complain(f"note: {note}")
    for file in skipped:
        complain(f"warning: '{file.name}' is not used: {file.reason}")
    for number, (planned, sheet) in enumerate(zip(found, sheets, strict=True), start=1):
        if not options.json:
            say(f"{number} of {len(found)}: <{planned.name}>, {planned.noun}, from '{planned.folder}'")
        try:
            with one_sentence():
                result = learn(_options(planned, options, sheet))
        except ConceptError as error:
            failed.setdefault(str(error), []).append(planned.name)
            if not options.json:
                say(f"not learned: <{planned.name}>: {error}")
            continue
        if result is not None:
            facts.append(result[0])
    lines = _report(options, facts)
    if failed:
        if not options.json:
            say("\n".join(lines))
        raise ConceptError(_sentence(failed, len(found)))
    unused = [{"name": file.name, "reason": file.reason} for file in skipped]
    return {"bank": str(options.bank), "concepts": facts, "skipped": unused}, lines
