"""The inputs of Concept Learner that everybody sees: name, class noun and preset."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.bank.concepts import ConceptInfo
from ..core.bank.tokens import check_class_noun, check_name, typed_name
from ..core.comfy.families import find_sites
from ..core.comfy.text import text_widths
from ..core.errors import ConceptError
from ..core.interop.export import EXPORTING
from ..core.training.presets import (
    AS_SET,
    EFFORTS,
    ELSEWHERE,
    HERE,
    NORMAL,
    READERS,
    SUBJECTS,
    Preset,
    check_for_others,
    for_other_programs,
    preset_for,
    shown_values,
)
from .schema import with_options


def preset_inputs() -> list[io.Input]:
    """The inputs `preset` and `effort`.

    The page fills inputs that a saved graph lacks with their defaults. So the default is no preset, and a new
    node gets its preset from web/learner.js, which also shows the values.
    """
    subject = io.Combo.Input(
        "preset", options=[AS_SET, *SUBJECTS], default=AS_SET, optional=True,
        tooltip="What you teach. Chooses kind, method, steps, learning rates, resolution and batch size for "
                f"the model's family; '{AS_SET}' uses the inputs as they are.")
    return [
        with_options(subject, preset_values={reader: shown_values(reader) for reader in READERS}),
        io.Combo.Input("effort", options=list(EFFORTS), default=NORMAL, optional=True,
                       tooltip=f"How long a preset learns; no effect with '{AS_SET}'."),
    ]


def reader_input() -> io.Input:
    """The input `readable_by`."""
    return io.Combo.Input(
        "readable_by", display_name="readable by", options=list(READERS), default=HERE, optional=True,
        tooltip=f"'{ELSEWHERE}': the preset learns a plain LoRA with one vector per word, which Export "
                "Concept writes without loss; two such concepts in one prompt mix more. No effect with "
                f"'{AS_SET}'.")


def checked_name(name: str) -> str:
    """The name. Raises ConceptError if it is missing or not allowed."""
    if not name.strip():
        raise ConceptError("concept name is empty; type into 'name' letters, digits, - or _, which you will "
                           "use in prompts, such as rex")
    return check_name(typed_name(name))


def checked_noun(noun: str, is_refined: bool) -> str:
    """The class noun. Raises ConceptError if it is missing or not allowed; a refined concept has its own."""
    noun = check_class_noun(noun)
    if not noun and not is_refined:
        raise ConceptError("class noun is empty; type into 'class_noun' what it is, in a word that the model "
                           "knows, such as dog")
    return noun


def chosen_preset(given: dict, known: ConceptInfo | None) -> Preset | None:
    """The preset for the family of the MODEL; None for 'as set'.

    Args:
        given: The inputs of the node.
        known: The concept that is refined, or None.

    Raises:
        ConceptError: Preset, effort or MODEL is unknown, or the preset is not for the concept's kind.
    """
    if given["preset"] == AS_SET:
        return None
    if given["readable_by"] not in READERS:
        raise ConceptError(f"'readable by' is {given['readable_by']!r}; allowed: {', '.join(READERS)}")
    if given["preset"] not in SUBJECTS:
        raise ConceptError(f"preset is {given['preset']!r}; allowed: {', '.join((AS_SET, *SUBJECTS))}")
    layout = find_sites(given["model"], text_widths(given["clip"])).layout
    if given["readable_by"] == ELSEWHERE:
        layout.refuse_joint(EXPORTING)
    chosen = preset_for(given["preset"], given["effort"], layout)
    if known is not None and known.kind != chosen.kind:
        raise ConceptError(f"preset is {chosen.subject!r}, and the kind of concept '{known.name}' is "
                           f"{known.kind!r}; refining keeps it, so choose a preset for it, or {AS_SET!r}")
    return for_other_programs(chosen) if given["readable_by"] == ELSEWHERE else chosen


def with_preset(given: dict, chosen: Preset, known: ConceptInfo | None) -> dict:
    """The inputs with the preset's values. A refined concept keeps its method and rates."""
    own = {"method": chosen.method, **chosen.rates}
    settings = given.get("method_settings") or {}
    if known is not None:
        own = {"method": known.method, "lr": 0.0, "token_lr": 0.0}
    elif chosen.settings:
        check_for_others(settings)
        settings = {**chosen.settings, **settings}
    training = {name: chosen.training[name] for name in ("steps", "resolution", "batch_size")}
    return {**given, "kind": chosen.kind, **own, **training, "method_settings": settings}
