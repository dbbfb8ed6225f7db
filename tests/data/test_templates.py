"""Caption templates: their number and form, which photo gets which, and how they are learned."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from continual_concepts.core.bank.prompts import caption_with_placeholder
from continual_concepts.core.data.folder import read_folder
from continual_concepts.core.data.templates import TEMPLATES, template_of
from continual_concepts.core.errors import ConceptError


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        Image.new("RGB", (40, 30), (40 * number, 90, 20)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.txt").write_text("rex the dog on a sofa")
    return tmp_path


def test_there_are_as_many_as_the_papers_have():
    assert {kind: len(set(sentences)) for kind, sentences in TEMPLATES.items()} == {"object": 27, "style": 16}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_each_sentence_has_one_place_for_the_concept(kind):
    for sentence in TEMPLATES[kind]:
        assert sentence.count("{}") == 1 and not re.search(r"\s\s|^\s|\s$", sentence)
        assert caption_with_placeholder(sentence, "rex", "photo") == sentence.replace("{}", "<rex>")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_all_take_turns_and_neighbours_differ(kind):
    count = len(TEMPLATES[kind])
    drawn = [template_of(kind, number) for number in range(count)]
    assert set(drawn) == set(TEMPLATES[kind]) and template_of(kind, count) == drawn[0]
    assert all(one.split("{}")[0].split()[:2] != other.split("{}")[0].split()[:2] or kind == "object"
               for one, other in zip(drawn, drawn[1:], strict=False))


def test_only_photos_without_a_caption_get_one(folder):
    read = read_folder(folder, templates="object")
    captions = [picture.caption for picture in read.pictures]
    assert captions == [template_of("object", 0), "rex the dog on a sofa",
                        template_of("object", 2), template_of("object", 3)]
    assert [photo.caption for photo in read.report.photos] == ["", "rex the dog on a sofa", "", ""]
    assert f"learned as '{captions[0].format('<name>')}'" in read.report.photos[0].line()
    assert not [warning for warning in read.report.warnings if warning.kind == "caption"]


def test_without_the_option_nothing_changes(folder):
    read = read_folder(folder)
    assert [picture.caption for picture in read.pictures] == ["", "rex the dog on a sofa", "", ""]
    assert [warning.kind for warning in read.report.warnings] == ["caption"]


def test_subfolders_go_on_counting(folder, tmp_path):
    outer = tmp_path / "outer"
    for part in "ab":
        (outer / part).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 30), (40 * number, 9, 20)).save(outer / part / f"{number}.png")
    read = read_folder(outer, subfolders=True, templates="style")
    assert [picture.caption for picture in read.pictures] == [template_of("style", i) for i in range(4)]


def test_another_kind_is_refused():
    with pytest.raises(ConceptError, match="allowed: object, style"):
        template_of("face", 0)
