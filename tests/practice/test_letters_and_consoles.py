"""Odd letters in names, captions and prompts, and consoles that cannot print them."""

from __future__ import annotations

import io
import json
import sys
import unicodedata

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.bank.hints import notes_on, notes_on_caption
from continual_concepts.core.bank.prompts import Vocabulary, caption_with_placeholder
from continual_concepts.core.bank.tokens import check_class_noun
from continual_concepts.core.cli import sampling
from continual_concepts.core.data.folder import read_folder
from continual_concepts.core.data.training_set import check_captions
from continual_concepts.core.interop.importing import read_sources, trigger_vectors
from continual_concepts.tests.practice.photo_files import photo, refusal, skipped

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "réx") for form in ("NFC", "NFD"))


def vocabulary(*names, noun="dog"):
    return Vocabulary([ConceptInfo(name, noun, "bound", (f"{name}-1", f"{name}-2")) for name in names])


def test_a2_sibling_names_with_accents_of_their_own_fit(tmp_path):
    photo(tmp_path / f"{COMPOSED}.png")
    photo(tmp_path / f"{DECOMPOSED}-masklabel.png")
    (tmp_path / f"{DECOMPOSED}.txt").write_text("a red dog")
    facts = read_folder(tmp_path).report.photos[0]
    assert facts.caption == "a red dog" and facts.mask_from
    (tmp_path / f"{DECOMPOSED}.txt").unlink()
    (tmp_path / "captions.json").write_text(json.dumps({f"{DECOMPOSED}.png": "in a table"}))
    assert read_folder(tmp_path).report.photos[0].caption == "in a table"


@pytest.mark.parametrize("text", ["file_name;text\n0.png;a dog\n", "file_name\ttext\n0.png\ta dog\n",
                                  "File_Name, Text\n0.png, a dog\n", "\nfile_name,text\r\n0.png,a dog\r\n"])
def test_a2_sibling_tables_of_spreadsheets_are_read(tmp_path, text):
    photo(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text(text, newline="")
    assert read_folder(tmp_path).report.photos[0].caption == "a dog"


def test_a2_sibling_a_table_without_the_columns_says_which_it_needs(tmp_path):
    photo(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text("Datei,Beschreibung\n0.png,a dog\n")
    assert "needed are file_name and text" in skipped(read_folder(tmp_path).report)["metadata.csv"]


def test_a2_sibling_line_separators_within_a_caption_end_no_line(tmp_path):
    photo(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name":"0.png","text":"a\u2028b"}\n', encoding="utf-8")
    assert read_folder(tmp_path).report.photos[0].caption == "a\u2028b"
    (tmp_path / "metadata.jsonl").write_text('{"file_name":"0.png","text":"a"}\n\n{oops\n')
    assert "line 3:" in refusal(lambda: read_folder(tmp_path))


def test_a2_sibling_a_photo_twice_in_one_table_is_told(tmp_path):
    photo(tmp_path / "0.png")
    row = '{"file_name":"0.png","text":"%s"}\n'
    (tmp_path / "metadata.jsonl").write_text(row % "a" + row % "b")
    read = read_folder(tmp_path).report
    assert read.photos[0].caption == "a"
    assert "several times, and the first" in skipped(read)["metadata.jsonl"]


def test_f1_sibling_captions_name_concepts_in_any_form_of_accents():
    known = vocabulary(COMPOSED)
    assert known.parse_caption(f"<{DECOMPOSED}> on grass").concepts == (COMPOSED,)
    assert caption_with_placeholder(f"<{DECOMPOSED}> on grass", COMPOSED, "dog") == f"<{COMPOSED}> on grass"


@pytest.mark.parametrize("typed", ["<rex:0.8>", "＜rex＞", "<rex,>", "&lt;rex&gt;"])
def test_f1_sibling_near_misses_in_captions_are_told(tmp_path, typed):
    photo(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text(f"{typed} on grass", encoding="utf-8")
    warning, = check_captions(read_folder(tmp_path).pictures, vocabulary("rex").infos.values())
    assert warning.photos == (0,)
    assert warning.text.endswith(f"0.txt' has '{typed}', which is plain text in a caption; "
                                 "for the concept write <rex>")


def test_f1_sibling_exact_placeholders_in_captions_give_no_note():
    assert notes_on_caption(vocabulary("rex"), "<rex> and <rex-1>, 3 < 5 > 2, <b>", "caption 1") == []


@pytest.mark.parametrize("odd", ["\ud800", "\ufdd0", "\ufdd4"])
def test_f1_sibling_half_characters_are_refused_in_one_sentence(odd):
    known = vocabulary("rex")
    for call in (lambda: known.parse(f"a {odd} <rex>"), lambda: known.parse_caption(f"a {odd} dog"),
                 lambda: check_class_noun(f"do{odd}g"), lambda: trigger_vectors((), f"s{odd}ks")):
        assert f"U+{ord(odd):04X}" in refusal(call)


@pytest.mark.parametrize(("typed", "meant"), [("<Rex:.5>", "<rex:.5>"), ("<rexx:1.>", "<rex:1.>")])
def test_f1_sibling_weights_without_a_digit_before_or_after_the_point(typed, meant):
    known = vocabulary("rex")
    assert meant in notes_on(known, [known.parse(typed)])[0]


@pytest.mark.parametrize("prompt", ["a photo of a cat", "in the style of an old master", "a blue sky",
                                    "(blue:1.3) eyes", "an a-frame house", "cats and bluebirds"])
def test_f3_sibling_ordinary_words_give_no_note(prompt):
    known = Vocabulary([ConceptInfo(name, noun, "bound", (f"{name}-1",))
                        for name, noun in (("cat", "cat"), ("blue", "paint"), ("style", "art"))])
    assert notes_on(known, [known.parse(prompt)]) == []


def test_f3_sibling_embeddings_that_comfyui_loads_are_no_text():
    known = vocabulary("rex")
    prompt = known.parse("embedding:rex on grass")
    assert notes_on(known, [prompt]) and not notes_on(known, [prompt], loads_embeddings=True)


def test_e7_sibling_a_trigger_that_names_a_concept_is_refused():
    assert "<rex>" in refusal(lambda: trigger_vectors((), "<rex> dog"))


def test_e_sibling_a_bank_is_no_lora_and_no_embedding(learned):
    for files in ((learned, None), (None, learned)):
        assert "is a bank of this program" in refusal(lambda files=files: read_sources(*files))


def test_b8_sibling_names_with_accents_of_their_own_are_accepted(run, tmp_path):
    answer = run("bank", "show", tmp_path / "none.safetensors", DECOMPOSED)
    assert "there is no bank file" in answer.sentence
    assert "holds no pictures" in run("learn", tmp_path, "--bank", tmp_path / "b.safetensors", "--name",
                                     DECOMPOSED, "--noun", "dog").sentence


class _Console(io.TextIOWrapper):
    """A console of an encoding that lacks most letters."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


def test_c_sibling_a_console_without_the_letters_prints_escapes(run, photos, learned, monkeypatch):
    Image.open(photos / "0.png").save(photos / "猫.png")
    console = _Console()
    monkeypatch.setattr(sys, "stdout", console)
    answer = run("learn", photos, "--bank", learned, "--name", "mimi", "--noun", "cat",
                 "--steps", 1)
    assert answer.code == 0
    console.flush()
    assert b"\\u732b.png" in console.buffer.getvalue()


class _Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_c_sibling_a_full_output_ends_no_run(run, photos, tmp_path, monkeypatch):
    bank = tmp_path / "b.safetensors"
    monkeypatch.setattr(sys, "stdout", _Full())
    answer = run("learn", photos, "--bank", bank, "--name", "mimi", "--noun", "cat",
                 "--steps", 1)
    assert answer.code == 1 and bank.exists()
    assert "the output cannot be printed (No space left on device)" in answer.err


@pytest.mark.parametrize("arguments", [("bank", "list", "none.safetensors"), ("sample",), ("bank",),
                                       ("sample", "x", "--count", "0"), ("sample", "a <rex>")])
def test_json_holds_the_error_of_a_failed_command(run, arguments):
    answer = run(*arguments, "--json")
    assert answer.code != 0
    assert json.loads(answer.out)["error"] in answer.sentence


def test_json_after_two_dashes_is_a_prompt(run, tmp_path):
    answer = run("sample", "--count", 1, "--steps", 1, "--output", tmp_path, "--", "--json")
    assert answer.code == 0 and answer.out.startswith("wrote ")


def test_d_sibling_an_empty_base_and_a_lack_of_memory_are_one_sentence(run, tmp_path, monkeypatch):
    assert "--base: the path is empty" in run("sample", "a dog", "--base", "").sentence
    # PyTorch's own error, which a picture of any size may meet
    monkeypatch.setattr(sampling, "sample_regions", lambda *_: torch.empty(10**15))
    assert "not enough memory" in run("sample", "a dog", "--output", tmp_path).sentence


def test_c_sibling_restore_of_a_missing_bank_and_a_rename_to_itself(run, learned, tmp_path):
    assert "there is no bank file" in run("bank", "restore", tmp_path / "none.safetensors").sentence
    assert "is a folder" in run("bank", "restore", tmp_path).sentence
    assert "is the old one" in run("bank", "rename", learned, "rex", "<rex>").sentence
    assert "no earlier versions" in run("bank", "restore", learned).out
