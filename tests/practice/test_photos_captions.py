"""Captions as people bring them: each is taken, or named with the reason."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.data.folder import read_folder
from continual_concepts.core.data.pictures import captions_for, captions_text
from continual_concepts.core.data.report import prior_warnings
from continual_concepts.core.data.training_set import check_captions
from continual_concepts.core.methods import METHODS
from continual_concepts.tests.practice.photo_files import photo, refusal, skipped

# A2


@pytest.mark.parametrize(("file", "content"), [
    ("a.caption", "a red dog"), ("a.TXT", "a red dog"), ("a.jpg.txt", "a red dog"), ("A.txt", "a red dog"),
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": "a red dog"}\n'),
    ("metadata.csv", "file_name,text\na.jpg,a red dog\n"), ("captions.json", '{"a.jpg": "a red dog"}'),
    ("captions.json", '[{"image": "photos/a.jpg", "caption": ["a red dog", "another"]}]'),
    ("meta_cap.json", '{"C:\\\\train\\\\a": {"caption": "a red dog"}}'),
    ("meta_cap.json", '{"a": {"caption": "a red", "tags": "dog"}}'), ("captions/a.txt", "a red dog")])
def test_a2_caption_dialects(tmp_path, file, content):
    photo(tmp_path / "a.jpg")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    photos = read_folder(tmp_path)
    assert photos.pictures[0].caption.replace(", ", " ") == "a red dog"
    assert photos.report.photos[0].caption_from == file and not photos.report.skipped


def test_a2_other_case_and_what_does_not_match(tmp_path):
    photo(tmp_path / "Dog.jpg")
    photo(tmp_path / "b.jpg")
    (tmp_path / "dog.txt").write_text("a red dog")
    (tmp_path / "c.txt").write_text("of no photo")
    photos = read_folder(tmp_path)
    assert [picture.caption for picture in photos.pictures] == ["a red dog", ""]
    assert "no photo has this name" in skipped(photos.report)["c.txt"]
    assert "b.jpg has no caption" in " ".join(photos.report.lines())


def test_a2_sibling_the_first_of_two_captions_is_told(tmp_path):
    photo(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "a.caption").write_text("second")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "third"}\n'
                                             '{"file_name": "gone.jpg", "text": "x"}')
    photos = read_folder(tmp_path)
    assert photos.pictures[0].caption == "first"
    reasons = skipped(photos.report)
    assert reasons["a.caption"] == "'a.jpg' has its caption from 'a.txt'"
    assert "'a.txt'" in reasons["metadata.jsonl"] and "gone.jpg" in reasons["metadata.jsonl"]


def test_a2_a_caption_folder_without_a_match_is_refused(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    (tmp_path / "texts").mkdir()
    for content in ("", "b.txt"):
        if content:
            (tmp_path / "texts" / content).write_text("a dog")
        text = refusal(lambda: read_folder(tmp_path / "photos", captions=tmp_path / "texts"))
        assert str(tmp_path / "photos") in text and str(tmp_path / "texts") in text and "a.txt" in text


def test_a2_sibling_a_damaged_table_is_refused_by_name(tmp_path):
    photo(tmp_path / "a.jpg")
    (tmp_path / "workflow.json").write_text("{")      # whatever it is, it is only named
    assert "no valid JSON" in skipped(read_folder(tmp_path).report)["workflow.json"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name"')
    assert "metadata.jsonl" in refusal(lambda: read_folder(tmp_path))


def test_a2_sibling_a_caption_of_a_book_in_a_table(tmp_path):
    photo(tmp_path / "a.jpg")
    (tmp_path / "captions.json").write_text(json.dumps({"a": "dog " * 2000}))
    assert "'a.jpg'" in (said := refusal(lambda: read_folder(tmp_path))) and "5000 characters" in said


# A3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a3_encodings_that_are_read(tmp_path, encoding):
    photo(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("ein Hündchen, 犬", encoding=encoding)
    assert read_folder(tmp_path).pictures[0].caption == "ein Hündchen, 犬"


@pytest.mark.parametrize(("encoding", "text"), [
    ("shift-jis", "犬の写真"), ("gbk", "一只狗的照片"), ("cp1252", "un caf\xe9"), ("utf-16-le", "a dog")])
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_a3_other_encodings_are_named(tmp_path, encoding, text, name):
    photo(tmp_path / "a.jpg")
    content = json.dumps({"file_name": "a.jpg", "text": text}, ensure_ascii=False) if "json" in name else text
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert name in (said := refusal(lambda: read_folder(tmp_path))) and "UTF-8" in said


# A9


def test_a9_a_photo_without_a_caption_keeps_the_others():
    for captions in (["a", "b", "", "d", "e"], ["a", "", "", "", ""], ["", "", "", "", "e"],
                     ["a", "b", "c", "d", ""]):
        assert captions_for(5, [captions_text(captions)]) == captions
    assert captions_text(["", ""]) == "" and captions_for(2, [""]) == []


def test_a9_sibling_lines_and_lists_of_captions():
    assert captions_for(2, ["a"]) == captions_for(2, ["a\n"]) == ["a", "a"]      # one for all
    assert captions_for(2, [captions_text(["a", ""])]) == ["a", ""]
    assert captions_for(2, ["a\n\nb"]) == captions_for(2, ["a\nb\n\n"]) == ["a", "b"]
    assert captions_for(3, ["a", "", "c"]) == ["a", "", "c"]
    assert "2 captions for 5 pictures" in refusal(lambda: captions_for(5, ["a\nb"]))


# A10


def test_a10_prior_pictures_without_captions(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text("a dog in a park")
    photos = read_folder(tmp_path, is_prior=True, class_noun="dog")
    assert [picture.caption for picture in photos.pictures] == ["a photo of a dog", "a dog in a park"]


def test_a10_sibling_without_a_class_noun(tmp_path):
    photo(tmp_path / "a.jpg")
    assert read_folder(tmp_path, is_prior=True).pictures[0].caption == "a photo"


# A11


def test_a11_prior_pictures_of_word_bound_concepts_are_told(photos, learn):
    outcome = learn(photos, "--prior", photos)
    assert outcome.code == 0 and outcome.out.count("prior pictures have no effect") == 1


def test_a11_sibling_methods_that_use_prior_pictures_say_nothing():
    silent = {name for name, entry in METHODS.items() if not prior_warnings(entry.method.composition)}
    assert "bound" not in silent and {"lora_m", "cidm", "custom_diffusion"} <= silent


def test_a11_sibling_prior_pictures_that_are_photos_of_the_concept_are_told(photos, learn, tmp_path):
    """Also a smaller copy, which has another digest."""
    photo(tmp_path / "prior" / "another.png")
    with Image.open(photos / "1.png") as image:
        image.resize((24, 16)).save(tmp_path / "prior" / "copy.png")
    shutil.copy(photos / "2.png", tmp_path / "prior" / "same.png")
    outcome = learn(photos, "--prior", tmp_path / "prior", "--method", "lora_m")
    assert outcome.code == 0
    assert "copy.png and same.png are photos of the concept, too; prior pictures should" in outcome.out


# F4


def test_f4_a_caption_that_names_an_unknown_concept_is_named(photos, learn):
    (photos / "1.txt").write_text("a photo of <nobody>")
    said = learn(photos).sentence
    assert "1.txt" in said and "<nobody>" in said and "prompt" not in said


def test_f4_sibling_in_a_table_and_in_prior_captions(photos, learn, tmp_path):
    (photos / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "<nobody>"}')
    assert "the caption of '1.png' in '" in (said := learn(photos).sentence) and "metadata.jsonl" in said
    (photos / "metadata.jsonl").unlink()
    photo(tmp_path / "prior" / "a.png")
    (tmp_path / "prior" / "a.txt").write_text("a <nobody>")
    assert "a.txt" in learn(photos, "--prior", tmp_path / "prior").sentence


def test_f4_sibling_the_concept_itself_and_its_words_are_known(photos):
    info = ConceptInfo("rex", "dog", "bound", ("rex-1", "rex-2"))
    for text in ("<rex>", "<rex-1> <rex-2>", "a dog"):
        (photos / "1.txt").write_text(text)
        check_captions(read_folder(photos).pictures, [info])
