"""Makes this checkout importable as `continual_concepts`, installed or not, without ever putting its root on sys.path."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _load_package() -> None:
    """Import the root `__init__.py` under the package's name, unless that name leads here already (an editable install does)."""
    # `python -m pytest` puts the current directory there, and our nodes/ would then hide ComfyUI's nodes.py
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    init = ROOT / "__init__.py"
    found = importlib.util.find_spec("continual_concepts")
    if found is not None and found.origin is not None and Path(found.origin).resolve() == init:
        return
    if "continual_concepts" in sys.modules:
        raise RuntimeError("another copy of continual_concepts was imported before these tests")
    spec = importlib.util.spec_from_file_location("continual_concepts", init, submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["continual_concepts"] = module
    spec.loader.exec_module(module)


_load_package()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies below tests/host and tests/live, before -m chooses."""
    for item in items:
        family = item.path.relative_to(ROOT / "tests").parts[0]
        if family in ("host", "live"):
            item.add_marker(family)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the reference data (`data/`, `golden/`), which is not part of the repository."""
    folder = Path(os.environ.get("CONTINUAL_CONCEPTS_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip("no reference data: set CONTINUAL_CONCEPTS_SHARED to its folder")
    return folder
