"""Many individuals of one class: who they are, and the matrix of their pairs."""

from __future__ import annotations

import json
from itertools import combinations

import pytest

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import one_class
from continual_concepts.benchmarks.continual.concepts import concepts
from continual_concepts.benchmarks.continual.one_class import confusions, figures, individuals
from continual_concepts.core.errors import ConceptError


def test_the_individuals_differ_and_are_no_tasks_of_the_benchmark():
    ten = individuals("dog", 10)
    assert len({concept.name for concept in ten}) == 10 and {concept.thing.kind for concept in ten} == {"dog"}
    looks = [(thing.body, thing.second, thing.pattern, thing.accessory) for thing in (c.thing for c in ten)]
    assert len(set(looks)) == 10 and individuals("dog", 3) == ten[:3]
    assert not {concept.thing for concept in ten} & {concept.thing for concept in concepts(50)}


@pytest.mark.parametrize(("kind", "count"), [("unicorn", 3), ("dog", 1)])
def test_wrong_values_are_one_sentence(kind, count):
    with pytest.raises(ConceptError, match="allowed"):
        individuals(kind, count)


def test_the_matrix_has_every_pair_twice():
    names = ["a", "b", "c"]
    pairs = [{"concepts": list(pair), "confused": share, "alignment": [share, 1.0]}
             for pair, share in zip(combinations(names, 2), (0.1, 0.2, 0.3), strict=True)]
    assert confusions(names, pairs) == [[None, 0.1, 0.2], [0.1, None, 0.3], [0.2, 0.3, None]]
    found = figures({"concepts": names, "judges": {"encoder": {"alone": [0.5, 0.7, 0.9], "pairs": pairs,
                                                               "bleed": [[1.0] * 3] * 3}}})["encoder"]
    assert found["alone"] == pytest.approx(0.7) and found["confused"] == pytest.approx(0.2)
    assert found["beside"] == pytest.approx((0.1 + 0.2 + 0.3 + 3) / 6)


@pytest.mark.parametrize(("methods", "sentence"), [
    ("nonsense", "unknown method 'nonsense'"), ("bound+rank=2", "methods names 'bound+rank=2'")])
def test_wrong_methods_are_one_sentence(tmp_path, capsys, methods, sentence):
    assert main(["one-class", "--json", str(tmp_path / "r.json"), "--methods", methods]) == 1
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_table_is_printed_line_by_line(tmp_path, capsys, monkeypatch):
    values = {"alone": 0.9, "beside": 0.8, "confused": 0.1, "confusions": []}
    made = {"methods": {"slots": {"steps": 200, "encoder": values, "template": values}}}
    monkeypatch.setattr(one_class, "one_class", lambda *_: made)
    assert main(["one-class", "--json", str(tmp_path / "r.json"), "--methods", "slots"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["method", "judge"], ["slots", "encoder"], ["slots", "template"]]


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    file = tmp_path / "result.json"
    assert main(["one-class", "--json", str(file), "--count", "2", "--methods", "slots"]) == 0
    result = json.loads(file.read_text())
    assert result["individuals"] == ["dog1", "dog2"]
    assert result["methods"]["slots"]["encoder"]["confusions"][0][0] is None
    assert (tmp_path / "result-slots.png").exists()
