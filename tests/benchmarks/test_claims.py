"""Every row that docs/claims.md names can be run."""

from __future__ import annotations

import re
from pathlib import Path

from continual_concepts.benchmarks.continual.runs import Run
from continual_concepts.core.methods import METHODS, make

CLAIMS = Path(__file__).parents[2] / "docs" / "claims.md"


def test_every_row_is_a_method_with_settings_that_it_has():
    rows = {row for row in re.findall(r"`([^`]+)`", CLAIMS.read_text(encoding="utf-8"))
            if row.partition("+")[0] in METHODS}
    assert len(rows) > 40
    for row in sorted(rows):
        method, _, overrides = row.partition("+")
        run = Run(method, 3, 0, 0, overrides=overrides)
        make(method, run.settings())
        assert not overrides or run.settings() or run.sampling(), row
