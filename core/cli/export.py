"""The command `bank export`: a concept, all of them, or what a bank gives for a prompt."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from ..bank.bank import ConceptBank
from ..errors import ConceptError
from ..interop.export import export_bank, export_concept
from ..interop.factors import DEFAULT_RANK
from ..interop.prompt_export import WITHOUT_BASE, export_prompt
from ..interop.writing import DEFAULT_FORMATS, Exported
from ..model.backbone import Backbone


def export(known: ConceptBank, options: Namespace, load_backbone: Callable[[Namespace], Backbone]) -> tuple[dict, list[str]]:
    """The base is loaded only when it is needed: to re-fit words, and for modes that read the prompt."""
    given = [what for what, there in (("a name", options.name), ("--all", options.all), ("--prompt", options.prompt is not None)) if there]
    if len(given) != 1:
        raise ConceptError(f"bank export got {' and '.join(given) or 'nothing to export'}; allowed: one of NAME, --all, --prompt TEXT")
    if options.mode != "sharp" and options.prompt is None:
        raise ConceptError(f"--mode {options.mode} says how concepts are weighted for a prompt; give it with --prompt")
    needs_base = options.refit or (options.prompt is not None and options.mode not in WITHOUT_BASE)
    backbone = load_backbone(options) if needs_base else None
    if backbone is not None:
        known.check_fits(backbone.layout)
    result = _export(known, options, backbone)
    files = [str(file) for file in result.files]
    what = {"prompt": options.prompt, "mode": options.mode} if options.prompt is not None else {"concept": options.name or known.names}
    return {**what, "files": files, "notes": list(result.notes)}, [*(f"wrote {file}" for file in files), *result.notes]


def _export(known: ConceptBank, options: Namespace, backbone: Backbone | None) -> Exported:
    formats = options.formats or DEFAULT_FORMATS
    if options.prompt is not None:
        return export_prompt(known, options.prompt, options.output, formats, options.mode, options.strength, options.rank,
                             options.max_error, backbone=backbone, refit=options.refit)
    more = (options.output, formats, options.strength, DEFAULT_RANK if options.rank is None else options.rank, options.max_error)
    refit = backbone if options.refit else None
    return export_bank(known, *more, refit=refit) if options.all else export_concept(known, options.name, *more, refit=refit)
