"""The oldest versions of other packages that work."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version

from .errors import ConceptError

# pyproject.toml declares the same bounds. torch stands there in the extras only, so pip may leave an old one.
OLDEST = {
    "torch": "2.6" if sys.version_info >= (3, 13) else "2.4",
    "diffusers": "0.31", "filelock": "3.0.12", "numpy": "1.25", "pillow": "10.3", "safetensors": "0.4.4",
    "tqdm": "4.42.1", "transformers": "4.43",
}


def _numbers(text: str) -> tuple[int, ...]:
    """`2.14.1+cu130` -> (2, 14, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])[:3])


def own_version() -> str:
    """The installed version of this package; "unknown" for a clone that is not installed."""
    try:
        return version("continual-concepts")
    except PackageNotFoundError:
        return "unknown"


def check_versions() -> None:
    """Raises ConceptError if an installed package is older than the oldest version that works."""
    old = []
    for package, oldest in OLDEST.items():
        try:
            installed = version(package)
        except PackageNotFoundError:      # its import says so
            continue
        if _numbers(installed) < _numbers(oldest):
            old.append(f"{package} {installed} (needed: {oldest} or newer)")
    if old:
        raise ConceptError(f"these installed packages are too old: {', '.join(old)}; "
                           "upgrade them with pip in the Python that runs this")
