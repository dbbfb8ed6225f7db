"""Help pages list the inputs of a node in the node's own order, with the advanced ones below a heading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = Path(__file__).resolve().parents[2] / "nodes" / "web" / "docs"
HEADING = "### Advanced inputs"


def is_advanced(entry) -> bool:
    return bool((entry.extra_dict or {}).get("advanced"))


def listed(text: str, ids: set[str]) -> list[str]:
    """The inputs that the entries of a list are about, in order. Entries may name several."""
    heads = re.findall(r"^\* (.+?): ", text, re.M) or re.findall(r"^(`[^`]+`): ", text, re.M)
    return [name for head in heads for name in re.findall(r"`(\w+)`", head) if name in ids]


@pytest.mark.parametrize("page", sorted(path.stem for path in PAGES.glob("*.md")))
def test_inputs_are_listed_as_on_the_node(pack, page):
    entries = getattr(pack, page).define_schema().inputs
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Inputs?\n(.+?)^## ", text, re.M | re.S)
    everyday, heading, more = section.partition(f"{HEADING}\n")
    ids = {entry.id for entry in entries}
    assert listed(everyday, ids) == [entry.id for entry in entries if not is_advanced(entry)]
    assert listed(more, ids) == [entry.id for entry in entries if is_advanced(entry)]
    assert bool(heading) == any(map(is_advanced, entries))
