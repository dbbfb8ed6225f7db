"""What ComfyUI's registry, pip and citation tools read of a release: versions agree and fields are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RAW = "https://raw.githubusercontent.com/continual-concepts/continual-concepts/main/"


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_all_files_name_the_same_version(project):
    version = project["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)      # the registry's form
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest, date = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", changes, re.M).groups()
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert newest == version
    assert f"\nversion: {version}\n" in citation and f"\ndate-released: {date}\n" in citation


def test_the_changes_tell_how_to_move_to_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^### If you come from \d", changes, re.M)


def test_the_registry_accepts_the_project(project):
    """The fields that `comfy node validate` and the registry read, with the limits of its documentation."""
    package, comfy = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,98}", package["name"]) and "comfy" not in package["name"]
    assert package["license"] == {"file": "LICENSE"} and (ROOT / "LICENSE").is_file()
    assert package["urls"]["Repository"].startswith("https://github.com/")
    assert re.fullmatch(r"[a-z0-9-]+", comfy["PublisherId"]) and comfy["DisplayName"].strip()
    for part in comfy["requires-comfyui"].split(","):
        assert re.fullmatch(r"(==|>=|<=|!=|>|<|~=)\d+\.\d+\.\d+", part)
    prefixes = ("Operating System :: ", "Environment :: GPU :: ")      # it understands no others
    assert all(entry.startswith(prefixes) for entry in package["classifiers"])
    assert {"S102", "S307", "E702"} <= set(project["tool"]["ruff"]["lint"]["select"])      # its own rules


@pytest.mark.parametrize(("field", "proportions", "most"), [("Icon", 1, 400), ("Banner", 21 / 9, 2520)])
def test_pictures_of_the_registry_are_there(project, field, proportions, most):
    address = project["tool"]["comfy"][field]
    assert address.startswith(RAW)
    size = Image.open(ROOT / address.removeprefix(RAW)).size
    assert max(size) <= most and abs(size[0] / size[1] - proportions) < 0.01
