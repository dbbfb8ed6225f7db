"""The command `bank export`: exports one concept, all concepts, or the sum of deltas for a prompt."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from ..bank.bank import ConceptBank
from ..bank.concepts import ConceptInfo
from ..bank.hints import notes_on_base
from ..errors import ConceptError
from ..evaluation.previews import concept_prompt
from ..files import check_output_folder, write_new
from ..interop.comparison import compared
from ..interop.differences import DIFFERS
from ..interop.export import export_bank, export_concept, formats_of
from ..interop.factors import DEFAULT_RANK
from ..interop.prompt_export import WITHOUT_BASE, export_prompt
from ..interop.writing import DEFAULT_FORMATS, Exported, check_formats
from ..model.backbone import Backbone
from ..sampling.settings import SampleSettings
from . import backbones


def export(bank: ConceptBank, options: Namespace,
           load_backbone: Callable[[Namespace], Backbone]) -> tuple[dict, list[str]]:
    """Writes the files. The base is loaded only for refitting words, for modes that read the prompt, and to
    compare."""
    wishes = {"a name": options.name, "--all": options.all, "--prompt": options.prompt is not None}
    given = [what for what, wish in wishes.items() if wish]
    if len(given) != 1:
        raise ConceptError(f"bank export got {' and '.join(given) or 'nothing to export'}; "
                           "allowed: one of NAME, --all, --prompt TEXT")
    if options.mode != "sharp" and options.prompt is None:
        raise ConceptError(f"--mode {options.mode} says how concepts are weighted for a prompt; "
                           "give it with --prompt")
    if options.compare and options.name is None:
        raise ConceptError(f"--compare draws one concept, and {given[0]} is given; allowed with it: a name")
    check_output_folder(options.output)
    reads_prompt = options.prompt is not None and options.mode not in WITHOUT_BASE
    needs_base = options.refit or options.compare or reads_prompt
    backbone = load_backbone(options) if needs_base else None
    if backbone is not None:
        bank.check_fits(backbone.layout)
    result = _export(bank, options, backbone)
    notes = [*result.notes, *([] if backbone is None else notes_on_base(_read(bank, options),
                                                                        backbone.layout,
                                                                        backbone.fingerprint))]
    files = [str(file) for file in result.files]
    what = ({"prompt": options.prompt, "mode": options.mode} if options.prompt is not None
            else {"concept": options.name or bank.names})
    facts = {**what, "files": list(files), "notes": notes}
    if backbone is not None and options.compare:
        facts["comparison"] = str(_compare(bank, options, backbone, result))
        files.append(facts["comparison"])
    return facts, [*(f"wrote {file}" for file in files), *notes]


def _read(bank: ConceptBank, options: Namespace) -> list[ConceptInfo]:
    """The headers of the concepts that are exported."""
    names = ([options.name] if options.name is not None else bank.names if options.prompt is None
             else bank.parse(options.prompt).concepts)
    return [bank.infos[name] for name in names]


def _compare(bank: ConceptBank, options: Namespace, backbone: Backbone, exported: Exported) -> Path:
    """Draws the concept with the bank and from its files, side by side. Returns the picture's file."""
    kinds = formats_of(bank.layout, check_formats(options.formats or DEFAULT_FORMATS), options.name)
    size, info = backbones.size_of(options), bank.infos[options.name]
    settings = SampleSettings(cfg=backbones.guidance_of(options), size=(size, size))
    lost = [note.removeprefix(DIFFERS) for note in exported.notes if note.startswith(DIFFERS)]
    picture = compared(bank, info.name, concept_prompt(info.name, info.kind),
                       dict(zip(kinds, exported.files, strict=True)), lost, backbone, settings)
    first = exported.files[0]
    return write_new(first.with_name(f"{first.stem}_compared.png"),
                     lambda path: picture.save(path, format="PNG"))


def _export(bank: ConceptBank, options: Namespace, backbone: Backbone | None) -> Exported:
    formats, refit = options.formats or DEFAULT_FORMATS, backbone if options.refit else None
    if options.prompt is not None:
        return export_prompt(bank, options.prompt, options.output, formats, options.mode, options.strength,
                             options.rank, options.max_error, backbone=backbone, refit=options.refit)
    rank = DEFAULT_RANK if options.rank is None else options.rank
    common = (options.output, formats, options.strength, rank, options.max_error)
    if options.all:
        return export_bank(bank, *common, refit=refit)
    return export_concept(bank, options.name, *common, refit=refit)
