"""The command `bank`: list, show, remove, rename, merge, verify, export, import, share, restore."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from ..bank.bank import ConceptBank, differ, renamed_in
from ..bank.concepts import Concept, ConceptInfo
from ..bank.format import open_bank, verify_bank
from ..bank.store import add_concept, change_bank, restore, versions
from ..bank.tokens import check_class_noun, check_name
from ..data.report import counted
from ..demo.base import notes_on_weights
from ..errors import ConceptError
from ..evaluation.collisions import collisions_of, composition_of, header_warnings
from ..evaluation.inspection import Inspection, inspect
from ..evaluation.photo_encoder import photo_encode
from ..interop.importing import concept_of, read_sources
from ..interop.sharing import share
from . import backbones
from .export import export
from .result import Result
from .shown import day, lines_of


def _line(info: ConceptInfo) -> str:
    origin = info.provenance
    kind = f"{info.class_noun:<16} {info.kind:<7} {info.method:<10}"
    parent = f", variant of <{origin.variant_of}>" if origin.variant_of else ""
    terms = f", {info.terms}" if info.terms else ""
    photos = counted(len(origin.images), "photo")
    return f"{info.placeholder:<20} {kind} {photos}  {day(origin.date)}{parent}{terms}"


def _list(options: Namespace) -> Result:
    """Prints one line per concept, from the header alone."""
    bank = open_bank(options.bank)
    infos = list(bank.infos.values())
    collisions = collisions_of(infos)
    warnings = [*(collision.sentence for collision in collisions), *header_warnings(bank)]
    facts = {"concepts": [info.to_json() for info in infos],
             "collisions": [asdict(collision) for collision in collisions], "warnings": warnings}
    lines = [*map(_line, infos), *(f"warning: {warning}" for warning in warnings)]
    return facts, lines or ["the bank is empty"]


def _facts(bank: ConceptBank, concept: Concept, inspection: Inspection) -> dict:
    """All facts of one concept as JSON values."""
    info = concept.info
    nearest = [inspection.nearest(info.name, measure) for measure in inspection.likeness]
    collisions = [collision for collision in inspection.collisions
                  if info.name in (collision.one, collision.other)]
    facts = {
        **info.to_json(),
        "placeholder": info.placeholder,
        "bytes": concept.nbytes(),
        "deltas": len(concept.deltas),
        "layer_copies": concept.tokens.copies,
        "cover_bytes": len(concept.thumbnail),
        "composes": composition_of(info),
        "made_on": bank.layout.describe(),
        "most_like": {near.measure: {"name": near.name, "cosine": round(near.cosine, 4)}
                      for near in nearest if near is not None},
        "collides_with": inspection.partners(info.name),
        "warnings": [collision.sentence for collision in collisions],
    }
    return json.loads(json.dumps(facts))


def _show(options: Namespace) -> Result:
    """Prints all facts of one concept, similar concepts and collisions; of every concept without a name."""
    bank = open_bank(options.bank)
    if options.name is not None:
        inspection = inspect(bank, photo_encode(bank.layout), bank[options.name].name)
        facts = _facts(bank, bank[options.name], inspection)
        return facts, lines_of(facts)
    inspection = inspect(bank, photo_encode(bank.layout))
    every = [{"name": facts.name, "fault": facts.fault} if facts.fault
             else _facts(bank, bank[facts.name], inspection) for facts in inspection.facts]
    lines = [line for facts in every for line in (*lines_of(facts), "")]
    return {"concepts": every}, lines[:-1] or ["the bank is empty"]


def _verify(options: Namespace) -> Result:
    """Reads every concept and checks it."""
    lines = verify_bank(options.bank)
    facts = {"bank": str(options.bank), "concepts": len(lines), "sound": True}
    return facts, [*lines, f"{options.bank}: {counted(len(lines), 'concept')}, all sound"]


def _export(options: Namespace) -> Result:
    return export(open_bank(options.bank), options, backbones.load_backbone)


def _import(options: Namespace) -> Result:
    check_name(options.name)
    options.noun = check_class_noun(options.noun)
    file = backbones.bank_output(options.bank)
    stored = open_bank(file) if file.exists() else None
    if stored is not None and options.name in stored:
        raise ConceptError(f"the bank already holds a concept '{options.name}'; choose another name or "
                           "remove it first")
    sources = read_sources(options.lora, options.embedding, options.which)      # before the base is loaded
    backbone = backbones.load_backbone(options)
    bank = stored or ConceptBank(backbone.layout)
    bank.check_fits(backbone.layout)
    result = concept_of(options.name, options.noun, options.kind, bank.layout, backbone.text, sources,
                        options.trigger, options.which, backbone)
    add_concept(options.bank, result.concept, {}, bank)
    facts = {"concept": options.name, "bank": str(options.bank), "notes": list(result.notes)}
    return facts, [*result.notes, f"{options.bank} holds <{options.name}>"]


def _changed(bank: ConceptBank, file: Path, change: str) -> Result:
    names = ", ".join(f"<{name}>" for name in bank.names) or "no concepts"
    return {"bank": str(file), "concepts": bank.names}, [f"{change}; {file} holds {names}"]


def _merge(options: Namespace) -> Result:
    backbones.bank_output(options.output)
    merged = open_bank(options.bank).merge(open_bank(options.other))
    notes = notes_on_weights(merged.infos.values(), merged.layout)

    def change(stored: ConceptBank | None) -> ConceptBank:
        if stored is None:
            return merged
        renamed = renamed_in(merged, stored)
        lost = [name for name in stored.names if name not in merged and name not in renamed]
        if lost:
            names = ", ".join(f"<{name}>" for name in lost)
            raise ConceptError(f"the bank '{options.output}' holds {names}, which the merged bank lacks; "
                               "choose another --output")
        notes.extend(f"renamed: <{old}> is <{new}> now" for old, new in renamed.items())
        replaced = [name for name in stored.names
                    if name in merged and differ(name, stored, merged, reads=True)]
        if replaced:
            names = ", ".join(f"<{name}>" for name in replaced)
            notes.append(f"replaced: {names}; the earlier file is kept as a version, see bank restore")
        return merged

    facts, lines = _changed(change_bank(options.output, change), options.output, "merged")
    return facts | {"notes": notes}, lines


def _change(file: Path, change: Callable[[ConceptBank], ConceptBank]) -> ConceptBank:
    """Changes an existing bank under its lock. Raises ConceptError if there is no bank."""
    open_bank(file)      # do not create a lock for a missing file

    def change_existing(bank: ConceptBank | None) -> ConceptBank:
        if bank is None:
            raise ConceptError(f"the bank '{file}' does not exist any more")
        return change(bank)

    return change_bank(file, change_existing)


def _remove(options: Namespace) -> Result:
    changed = _change(options.bank, lambda bank: bank.remove(options.name))
    return _changed(changed, options.bank, f"removed <{options.name}>")


def _rename(options: Namespace) -> Result:
    if options.name == options.new:
        raise ConceptError(f"the new name '{options.new}' is the old one; give another")
    changed = _change(options.bank, lambda bank: bank.rename(options.name, options.new))
    return _changed(changed, options.bank, f"renamed <{options.name}> to <{options.new}>")


def _restore(options: Namespace) -> Result:
    """Restores a version, or lists the versions if no number is given."""
    if options.number is not None:
        restored = restore(options.bank, options.number)
        return _changed(restored, options.bank, f"restored version {options.number}")
    rows, lines = [], []
    found = versions(options.bank)
    if not found:
        open_bank(options.bank)      # says so if there is no bank
    for version in found:
        changed = datetime.fromtimestamp(version.changed).isoformat(" ", "seconds")
        names = _names(version.path)
        rows.append({"version": version.number, "changed": changed, "concepts": names})
        lines.append(f"{version.number}: {changed}, {', '.join(names) or 'nothing readable'}")
    if rows:
        lines.append(f"to restore one, add --version and its number, such as --version {rows[0]['version']}")
    return {"bank": str(options.bank), "versions": rows}, lines or ["there are no earlier versions"]


def _names(path: Path) -> list[str]:
    """Names of a version's concepts; empty if its file is damaged."""
    try:
        return open_bank(path).names
    except ConceptError:
        return []


def _share(options: Namespace) -> Result:
    lines = share(open_bank(options.bank), options.name, options.output, options.licence, options.author)
    return {"concept": options.name, "file": str(options.output), "notes": lines}, lines


ACTIONS = {"list": _list, "show": _show, "verify": _verify, "export": _export, "import": _import,
           "share": _share, "merge": _merge, "remove": _remove, "rename": _rename, "restore": _restore}


def bank(options: Namespace) -> Result:
    """Runs the requested action."""
    return ACTIONS[options.action](options)
