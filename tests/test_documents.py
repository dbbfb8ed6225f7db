"""The README is short and plain, and links between documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
DOCUMENTS = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def text_of(document: Path) -> str:
    """Without blocks of code, which hold brackets of their own."""
    return re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)


def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(document), re.M)
    kept = (re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document):
    for target in LINK.findall(text_of(document)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name}: {target}"
        assert not anchor or file.suffix != ".md" or anchor in anchors_of(file), f"{document.name}: {target}"


HELP = sorted((ROOT / "nodes" / "web" / "docs").glob("*.md"))


@pytest.mark.parametrize("document", [*DOCUMENTS, *HELP], ids=lambda path: path.name)
def test_a_placeholder_is_code_in_every_text(document):
    """Pages read `<rex>` outside of code as HTML and show nothing."""
    assert not re.findall(r"(?<!\\)</?[A-Za-z][^>\n]*>", re.sub(r"`[^`]*`", "", text_of(document)))


def test_every_page_can_be_reached_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        document = ahead.pop()
        if document in seen:
            continue
        seen.add(document)
        for target in LINK.findall(text_of(document)):
            file = (document.parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" and file.exists():
                ahead.append(file)
    assert set((ROOT / "docs").glob("*.md")) <= seen


def test_the_site_shows_every_page():
    """`make docs` builds it, and fails for a link that leads nowhere."""
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"^ +- [^:]+: (\S+\.md)$", site, re.M)
    assert len(pages) == len(set(pages))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(pages)


def test_the_readme_has_at_most_a_thousand_words_and_short_sentences():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) <= 1000
    plain = re.sub(r"\]\([^)]*\)", "]", text_of(ROOT / "README.md"))
    blocks = re.split(r"\n\s*\n|\n(?=[*|#\d])", plain)
    sentences = [sentence for block in blocks if not block.startswith("|")
                 for sentence in re.split(r"(?<=[.:?;])\s+", " ".join(block.split()))]
    long = [sentence for sentence in sentences if len(sentence.split()) > 30]
    assert not long
