"""What a bank file would lose by a save. Learners ask before they learn whether their bank can be saved, not
minutes later."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from ..core.bank.bank import ConceptBank, renamed_in
from ..core.bank.format import open_bank
from ..core.bank.tokens import typed_name
from ..core.errors import ConceptError
from .folders import new_bank_file
from .learning import KEEP
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


def check_saving(graph: object, node: str | None, bank: ConceptBank | None, names: Iterable[str]) -> None:
    """Checks the nodes Save Concept Bank that take a learner's bank, directly or through further learners.

    Args:
        graph: What runs: id -> type and inputs of each node, as the server gives it. Anything else is not
            checked, and neither is what other nodes give later.
        node: Id of the learner.
        bank: The bank that it adds to; None for a new one.
        names: What it learns, new or again.

    Raises:
        ConceptError: Such a node would refuse the bank, because its file holds other concepts or is damaged.
    """
    nodes = graph if isinstance(graph, Mapping) else {}
    learned, item = set(names), running_item()
    held = learned | set(() if bank is None else bank.names)
    for saver, given in _of_type(nodes, SAVE):
        further = _learned_between(nodes, given.get("bank"), node)
        name, may_remove = given.get("bank_name"), given.get("allow_fewer")
        if further is None or not isinstance(name, str) or not isinstance(may_remove, bool):
            continue
        if item is not None and saver not in item[4]:      # it is no output that runs
            continue
        if bank is not None:
            _check_readable(bank, learned | {name for name, again in further.items() if again})
        file = new_bank_file(name)
        try:
            stored = open_bank(file) if file.exists() else None
        except ConceptError as error:
            raise ConceptError(f"{UNSAVED}: {error}") from error
        if stored is None or may_remove:
            continue
        renamed = {} if bank is None else renamed_in(bank, stored)
        kept = {old for old, new in renamed.items() if new not in learned and not further.get(new)}
        if lost := lost_names(stored.names, {*held, *further, *kept}):
            join = f"{WITHOUT_BANK if bank is None else WITH_BANK}, "
            if bank is not None and not is_for_base_of(bank, stored):
                join = "its base is another one; "
            raise ConceptError(f"{UNSAVED}: '{file.name}' holds {lost}; {join}choose another bank_name in "
                               f"Save Concept Bank, or switch its '{ALLOW_FEWER}' on")


def is_for_base_of(bank: ConceptBank, stored: ConceptBank) -> bool:
    """Whether both banks are for bases of one kind, so that they can be merged."""
    return bank.layout.fingerprint == stored.layout.fingerprint


def _check_readable(bank: ConceptBank, replaced: Container[str]) -> None:
    """Reads the concepts that a save would write beside the learned ones. Raises ConceptError for a damaged
    one: no file could take the bank."""
    for name in bank.names:
        try:
            if name not in replaced:
                bank.passing(name)
        except ConceptError as error:
            raise ConceptError(f"{UNSAVED}: {error}; if it is damaged, remove this concept with Edit "
                               "Concept Bank before it learns") from error


def _of_type(nodes: Mapping, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Id and inputs of each node of a type."""
    for number, entry in nodes.items():
        given = entry.get("inputs") if isinstance(entry, Mapping) else None
        if isinstance(given, Mapping) and entry.get("class_type") == kind:
            yield str(number), given


def _learned_between(nodes: Mapping, link: object, node: str | None) -> dict[str, bool] | None:
    """The names that further learners add between a node's bank and a link -> whether they learn a known one
    again; None if the link does not come from it, or if a name is not known yet."""
    learners, added = dict(_of_type(nodes, LEARNER)), dict[str, bool]()
    for _ in range(len(learners) + 1):      # a chain cannot be longer
        source, output = link if isinstance(link, (list, tuple)) and len(link) == 2 else (None, None)
        if output not in BANKS or source is None:
            return None
        if str(source) == node:
            return added
        given = learners.get(str(source), {})
        name, link = given.get("name"), given.get("bank")
        if not isinstance(name, str):      # another node gives it later
            return None
        if_known = given.get("if_known", KEEP)
        added[typed_name(name)] = isinstance(if_known, str) and if_known != KEEP
    return None
