"""Adds files from outside docs/ to the site that mkdocs builds: the README as its first page, the help pages
of the nodes, and the results that documents show. Links between files are changed to where they lie in the
site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "https://github.com/continual-concepts/continual-concepts/blob/main/"
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md",
         "SECURITY.md": "SECURITY.md"}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def place_of(path: str) -> str:
    """Where a file of the repository lies in the site; "" for a file that is not in it."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("nodes/web/docs/"):
        return f"help/{posixpath.basename(path)}"
    if path.startswith("benchmarks/results/") and path.endswith(".png"):
        return f"results/{posixpath.basename(path)}"
    return ""


def on_files(files, config):
    """Adds the files that do not lie in docs/."""
    help_pages = sorted((ROOT / "nodes" / "web" / "docs").glob("*.md"))
    pictures = sorted((ROOT / "benchmarks" / "results").glob("*.png"))
    for path in [*(ROOT / name for name in PAGES), *help_pages, *pictures]:
        inside = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place_of(inside), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page. A missing file stays as it is, so that the strict build names it."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()

    def changed(match: re.Match) -> str:
        target, hash_sign, anchor = match[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            return match[0]
        place = place_of(path)
        here = posixpath.dirname(page.file.src_uri) or "."
        link = posixpath.relpath(place, here) if place else SOURCE + path
        return f"{match[1]}{link}{hash_sign}{anchor}{match[3]}"

    return LINK.sub(changed, markdown)
