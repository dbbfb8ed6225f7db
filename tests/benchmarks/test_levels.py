"""Floor and ceiling are measured once for a base and number of pictures."""

from __future__ import annotations

import pytest

from continual_concepts.benchmarks.continual.levels import file_of, measured, read
from continual_concepts.core.errors import ConceptError
from continual_concepts.tests.benchmarks.runs_made import levels


def test_levels_are_measured_once_for_each_origin(tmp_path):
    calls, file = [], file_of(tmp_path / "runs", 4)

    def measure():
        calls.append(1)
        return {name: value for name, value in levels().items() if name != "origin"}

    assert read(file) is None
    first = measured(file, {"base": "abc"}, measure)
    assert measured(file, {"base": "abc"}, measure) == first == levels() and len(calls) == 1
    assert measured(file, {"base": "xyz"}, measure)["origin"] == {"base": "xyz"} and len(calls) == 2
    assert [path.name for path in file.parent.iterdir()] == ["levels-n4.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"origin": {}}'])
def test_a_broken_file_is_named(tmp_path, content):
    file = file_of(tmp_path, 4)
    file.write_text(content)
    with pytest.raises(ConceptError, match="levels-n4.json' cannot be read"):
        measured(file, {}, levels)
