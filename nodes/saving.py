"""Whether what a node learns can be saved: asked before it is learned, not minutes later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..core.bank.format import open_bank
from ..core.errors import ConceptError
from .folders import new_bank_file

ALLOW_FEWER = "allow removing concepts"


def lacking(file: str, lost: Iterable[str]) -> str:
    """Says that a bank file holds concepts that the bank to be saved lacks, and what to do."""
    return (f"'{file}' holds {', '.join(f'<{name}>' for name in lost)}, which this bank lacks; join both "
            "with Load Concept Bank and Merge Concept Banks (nothing is learned again), choose another "
            f"bank_name, or switch '{ALLOW_FEWER}' on")


def check_saving(prompt: object, node: str | None, names: Iterable[str]) -> None:
    """Checks the nodes Save Concept Bank that take a learner's bank.

    Args:
        prompt: The graph that runs, as the server gives it; anything else is not checked.
        node: Id of the learner, whose first output is the bank.
        names: What its bank will hold.

    Raises:
        ConceptError: Such a node would refuse the bank, because its file holds other concepts.
    """
    held = set(names)
    for given in _savers(prompt, node):
        name = given.get("bank_name")
        if not isinstance(name, str) or given.get("allow_fewer") is not False:
            continue      # another node gives it later, or concepts may go
        file = new_bank_file(name)
        lost = [stored for stored in open_bank(file).names if stored not in held] if file.exists() else []
        if lost:
            raise ConceptError(f"this bank could not be saved, so nothing was learned: '{file.name}' holds "
                               f"{', '.join(f'<{stored}>' for stored in lost)}; connect Load Concept Bank to "
                               "the input 'bank' (template 04 Add a second concept shows it), choose another "
                               f"bank_name in Save Concept Bank, or switch its '{ALLOW_FEWER}' on")


def _savers(prompt: object, node: str | None) -> list[Mapping[str, Any]]:
    """The inputs of all nodes Save Concept Bank that take a node's first output."""
    nodes = prompt.values() if isinstance(prompt, Mapping) else ()
    savers = [entry.get("inputs") for entry in nodes
              if isinstance(entry, Mapping) and entry.get("class_type") == "ConceptBankSave"]
    return [given for given in savers if isinstance(given, Mapping) and given.get("bank") == [node, 0]]
