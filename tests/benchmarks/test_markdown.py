"""Tables in Markdown, and the sections that are written into documents."""

from __future__ import annotations

import pytest

from continual_concepts.benchmarks.continual.markdown import number, ranked, sections, write_sections
from continual_concepts.benchmarks.continual.summary import summarise
from continual_concepts.core.errors import ConceptError
from continual_concepts.tests.benchmarks.runs_made import levels, run

RUNS = ((21, 21), (21, 22), (22, 21))


@pytest.fixture(scope="module")
def result():
    methods = {"bound": {}, "lora": {"alone": (0.8,) * 4, "combined": 0.5},
               "ewc": {"alone": (0.5,) * 4, "combined": 0.3, "base_change": 0.08}}
    return summarise([run(name, *place, **figures) for name, figures in methods.items() for place in RUNS],
                     levels(), "bound")


def rows(text):
    lines = [line for line in text.split("\n") if line.startswith("|")]
    head = [title.strip() for title in lines[0].split("|")[1:-1]]
    assert {line.count("|") for line in lines} == {len(head) + 1}
    return [dict(zip(head, map(str.strip, line.split("|")[1:-1]), strict=True)) for line in lines[2:]]


def test_the_best_method_comes_first_between_ceiling_and_floor(result):
    found = rows(sections(result)["main"])
    names = [row["method"] for row in found]
    assert names == ["*real pictures*", "lora", "**bound**", "ewc", "*class nouns*"]
    assert ranked(result) == ["lora", "bound", "ewc"]
    named = {row["method"]: row for row in found}
    assert named["**bound**"]["alone"] == "71.4 [71, 71]" and named["**bound**"]["base change"] == "0.0"
    assert named["ewc"]["base change"] == "8.0" and named["ewc"]["kB"] == "50"
    assert named["*class nouns*"]["confused"] == "25.0" and named["*real pictures*"]["alone"] == "100.0"


def test_differences_are_said_in_words(result):
    named = {row["method"]: row["against the default"] for row in rows(sections(result)["main"])}
    assert named["lora"] == "better: alone, objects, styles; worse: combined, pairs; no difference: confused"
    assert named["**bound**"] == ""


def test_the_readme_shows_the_named_methods_alone_and_says_where_there_is_no_difference(result):
    text = sections(result)["readme"]
    found = {row["method"]: row for row in rows(text)}
    assert list(found) == ["lora", "**bound**"]
    assert found["lora"] == {"method": "lora", "alone": "86 (better)", "combined": "43",
                             "confused": "10 (no difference)", "retained": "100"}
    assert text.startswith("4 concepts, 3 runs, percent:")
    others = summarise([run("ewc", *place) for place in RUNS], levels(), "bound")
    assert "None of the methods" in sections(others)["readme"]


def test_all_sections_are_tables_of_the_same_methods(result):
    found = sections(result)
    assert len(rows(found["papers"])) == len(rows(found["judges"])) == 5
    assert {row["tried"] for row in rows(found["settings"])} == {"not tuned"}
    assert rows(found["bleed"])[0]["fido"] == "30 (30)"
    assert "seeds 21, 22; orders 21, 22; 3 runs per method" in found["main"]


def test_ablations_have_a_table_of_their_own_beside_the_whole_method(result):
    methods = {"bound": {}, "ewc": {"alone": (0.5,) * 4}, "ewc+strength=0": {"alone": (0.3,) * 4}}
    found = sections(summarise([run(name, *place, **figures) for name, figures in methods.items()
                                for place in RUNS], levels(), "bound"))
    table = {row["method"]: row for row in rows(found["ablations"])}
    assert list(table) == ["ewc", "ewc+strength=0"]
    assert table["ewc+strength=0"]["against the whole method"].startswith("worse: alone;")
    assert table["ewc"]["against the whole method"] == ""
    for name in ("main", "papers", "judges", "settings"):
        assert "ewc" in found[name] and "ewc+" not in found[name], name
    assert "left out" in sections(result)["ablations"]


@pytest.mark.parametrize(("value", "text"), [
    (0.7149, "71.5"), (None, ""), (float("nan"), ""), (-1e-9, "0.0"),
])
def test_numbers(value, text):
    assert number(value) == text


def test_sections_of_a_document_are_replaced_and_the_rest_stays(result, tmp_path):
    document = tmp_path / "page.md"
    document.write_text("# Title\n\n<!-- continual:main -->\nold\n<!-- /continual:main -->\n\nEnd\n"
                        "<!-- continual:claims -->\n<!-- /continual:claims -->\n")
    write_sections(document, result)
    text = document.read_text()
    assert sections(result)["main"] in text and "old" not in text
    assert text.startswith("# Title\n\n<!--") and "\n\nEnd\n" in text
    write_sections(document, result)
    assert document.read_text() == text


@pytest.mark.parametrize(("content", "sentence"), [
    ("# Title\n", "no marker"),
    ("<!-- continual:tables -->\nx\n<!-- /continual:tables -->\n", "a section 'tables'; sections: ablations"),
])
def test_documents_without_a_known_section_are_refused(result, tmp_path, content, sentence):
    (tmp_path / "page.md").write_text(content)
    with pytest.raises(ConceptError, match=sentence):
        write_sections(tmp_path / "page.md", result)
    assert (tmp_path / "page.md").read_text() == content
    with pytest.raises(ConceptError, match="does not exist"):
        write_sections(tmp_path / "none.md", result)
