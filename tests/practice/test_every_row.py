"""Every situation of practice has a test, named by its row."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROWS = {"a": range(1, 14), "b": range(1, 13), "c": range(1, 6), "d": range(1, 6), "e": range(1, 8),
        "f": range(1, 5), "g": (*range(1, 6), *range(7, 17))}


def test_every_row_has_a_test():
    text = "\n".join(path.read_text() for path in sorted(TESTS.rglob("test_*.py")))
    tested = set(re.findall(r"^def test_([a-g]\d+)_", text, re.M))
    assert {f"{letter}{number}" for letter, numbers in ROWS.items() for number in numbers} - tested == set()
