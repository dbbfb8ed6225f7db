"""Whether what a node learns can be saved: asked before it is learned, not minutes later."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from ..core.bank.format import open_bank
from ..core.bank.tokens import typed_name
from ..core.errors import ConceptError
from .folders import new_bank_file
from .progress import running_item

ALLOW_FEWER = "allow removing concepts"
SAVE = "ConceptBankSave"
UNSAVED = "this bank could not be saved, so nothing was learned"
WITHOUT_BANK = "connect Load Concept Bank to the input 'bank' (template 04 Add a second concept shows it)"
WITH_BANK = "join that file and the bank at the input 'bank' with Merge Concept Banks first"
LEARNER = "ConceptLearner"
BANKS = (0, 4)      # outputs of a learner that are banks; the second one is the proposed bank


def lost_names(stored: Iterable[str], kept: Container[str]) -> str:
    """The names of a bank file that a bank to be saved there lacks, as text; empty if it lacks none."""
    return ", ".join(f"<{name}>" for name in stored if name not in kept)


def check_saving(graph: object, node: str | None, names: Iterable[str]) -> None:
    """Checks the nodes Save Concept Bank that take a learner's bank, directly or through further learners.

    Args:
        graph: What runs: id -> type and inputs of each node, as the server gives it. Anything else is not
            checked, and neither is what other nodes give later.
        node: Id of the learner.
        names: What its bank will hold.

    Raises:
        ConceptError: Such a node would refuse the bank, because its file holds other concepts or is damaged.
    """
    nodes = graph if isinstance(graph, Mapping) else {}
    held, item = set(names), running_item()
    for saver, given in _of_type(nodes, SAVE):
        further = _learned_between(nodes, given.get("bank"), node)
        name, may_remove = given.get("bank_name"), given.get("allow_fewer")
        if further is None or not isinstance(name, str) or not isinstance(may_remove, bool):
            continue
        if item is not None and saver not in item[4]:      # it is no output that runs
            continue
        file = new_bank_file(name)
        try:
            lost = lost_names(open_bank(file).names if file.exists() else [], held | further)
        except ConceptError as error:
            raise ConceptError(f"{UNSAVED}: {error}") from error
        if lost and not may_remove:
            join = WITH_BANK if len(held) > 1 else WITHOUT_BANK
            raise ConceptError(f"{UNSAVED}: '{file.name}' holds {lost}; {join}, choose another bank_name in "
                               f"Save Concept Bank, or switch its '{ALLOW_FEWER}' on")


def _of_type(nodes: Mapping, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Id and inputs of each node of a type."""
    for number, entry in nodes.items():
        given = entry.get("inputs") if isinstance(entry, Mapping) else None
        if isinstance(given, Mapping) and entry.get("class_type") == kind:
            yield str(number), given


def _learned_between(nodes: Mapping, link: object, node: str | None) -> set[str] | None:
    """The names that further learners add between a node's bank and a link; None if the link does not come
    from it, or if a name is not known yet."""
    learners, added = dict(_of_type(nodes, LEARNER)), set[str]()
    for _ in range(len(learners) + 1):      # a chain cannot be longer
        source, output = link if isinstance(link, (list, tuple)) and len(link) == 2 else (None, None)
        if output not in BANKS or source is None:
            return None
        if str(source) == node:
            return added
        given = learners.get(str(source), {})
        name, link = given.get("name"), given.get("bank")
        if not isinstance(name, str):
            return None
        added.add(typed_name(name))
    return None
