"""The files in the wheel and in the registry's archive, folder by folder, so that a stray file fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder -> the suffixes of its files. Files that lie directly in the root are named one by one.
CORE_ROOMS = ("attention", "bank", "cli", "comfy", "comfy/families", "conditioning", "data", "demo",
              "evaluation", "hosts", "interop", "methods", "model", "neurons", "regional", "sampling",
              "training")
PACKAGE: dict[str, set[str]] = {
    "core": {".py"}, **{f"core/{room}": {".py"} for room in CORE_ROOMS}, "nodes": {".py"},
    "core/demo/assets": {".safetensors"}, "core/demo/assets/tokenizer": {".json", ".txt"},
    "nodes/web": {".css", ".js"}, "nodes/web/docs": {".md"},
}
WHEEL = {**PACKAGE, ".": {"__init__.py"}}
REGISTRY = {
    **PACKAGE,
    ".": {"__init__.py", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md",
          "pyproject.toml", "requirements.txt", "setup.py"},
    "docs": {".md", ".png"}, "docs/first-concept": {".jpg"},
    **{f"locales/{language}": {".json"} for language in ("de", "en", "ja", "zh")},
    "subgraphs": {".json"}, "workflows": {".jpg", ".json"}, "workflows/api": {".json"},
}
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def entry(path: str) -> tuple[str, str]:
    """Folder and suffix of a path; the name instead of the suffix in the root."""
    pure = PurePosixPath(path)
    folder = str(pure.parent)
    return folder, pure.name if folder == "." else pure.suffix


def strays(paths: Iterable[str], allowed: Mapping[str, set[str]]) -> list[str]:
    """The paths that no entry of `allowed` permits."""
    return [path for path in paths if entry(path)[1] not in allowed.get(entry(path)[0], ())]


def missing(paths: Iterable[str], allowed: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """The entries of `allowed` for which there is no file."""
    expected = {(folder, what) for folder, kinds in allowed.items() for what in kinds}
    return expected - {entry(path) for path in paths}


@pytest.fixture(scope="module")
def repository(script):
    """The lists of files that the hygiene test makes."""
    return script(Path(__file__).with_name("test_publish_hygiene.py"))


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> tuple[list[str], list[str]]:
    """Builds the wheel offline from a copy of the repository.

    Returns the package's files and those of the metadata.
    """
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for path in repository.FILES:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(target)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True,
                          check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = target.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    top = "continual_concepts/"
    metadata = [name.partition(".dist-info/")[2] for name in names if not name.startswith(top)]
    return [name.removeprefix(top) for name in names if name.startswith(top)], metadata


def test_the_wheel_holds_the_package_and_nothing_else(wheel, repository):
    package, metadata = wheel
    assert strays(package, WHEEL) == [] and missing(package, WHEEL) == set()
    assert sorted(package) == sorted(path for path in repository.FILES if not strays([path], WHEEL))
    assert set(metadata) == METADATA


def test_the_registry_packs_what_people_need_and_nothing_else(repository):
    assert strays(repository.SHIPPED, REGISTRY) == [] and missing(repository.SHIPPED, REGISTRY) == set()
    assert [path for path in repository.FILES if not strays([path], REGISTRY)] == repository.SHIPPED


@pytest.mark.parametrize("path", [
    "benchmarks/__main__.py", "benchmarks/pretraining/loop.py", "benchmarks/results/bank.json",
                                  "tests/conftest.py",
    "core/notes.txt", "core/demo/assets/draft.py", "core/elsewhere/a.py", "nodes/web/docs/old.json",
                                  "scratch.py",
    ".github/workflows/tests.yml",
])
def test_a_stray_file_is_seen(path):
    assert strays([path], WHEEL) == strays([path], REGISTRY) == [path]
