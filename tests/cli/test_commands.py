"""The command line on the embedded base: success, and one clear sentence for every kind of bad input."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.cli import backbones, learning
from continual_concepts.core.cli.parser import main
from continual_concepts.core.training import checkpoint
from continual_concepts.core.training.presets import PERSON, preset_for_embedded

from .conftest import QUICK


def rename_in_captions(folder, name: str) -> None:
    for caption in folder.glob("*.txt"):
        caption.write_text(caption.read_text().replace("<rex>", f"<{name}>"))


def refused(capsys, *arguments: str) -> str:
    """Runs a command that must fail; returns its one sentence."""
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    sentences = [line for line in error if line.startswith("continual-concepts: ")]
    assert len(sentences) == 1 and "Traceback" not in "\n".join(error)
    return sentences[0]


def test_subjects_are_found_and_shown(photos, tmp_path, capsys):
    bank, sheet = tmp_path / "bank.safetensors", tmp_path / "sheet.png"
    asked = ["learn", str(photos), "--bank", str(bank), "--name", "rex", "--noun", "dog", "--find-subject"]
    assert main([*asked, "--contact-sheet", str(sheet), *QUICK]) == 0
    assert "mask found in the photo" in capsys.readouterr().out and Image.open(sheet).width > 300
    assert main([*asked, "--contact-sheet", str(tmp_path), *QUICK]) == 1
    assert "contact sheet" in capsys.readouterr().err


def test_learn_list_sample_rename_remove(bank_file, photos, tmp_path, capsys):
    rename_in_captions(photos, "mimi")
    assert main(["learn", str(photos), "--bank", str(bank_file), "--name", "mimi", "--noun", "cat",
                 *QUICK]) == 0
    assert open_bank(bank_file).names == ["rex", "mimi"]
    assert open_bank(bank_file)["rex"].thumbnail[:2] == b"\xff\xd8"
    capsys.readouterr()
    assert main(["--json", "bank", "list", str(bank_file)]) == 0
    assert [c["name"] for c in json.loads(capsys.readouterr().out)["concepts"]] == ["rex", "mimi"]
    out = tmp_path / "out"
    assert main(["sample", "a photo of <rex>", "--bank", str(bank_file), "--output", str(out), "--count", "2",
                 "--steps", "2"]) == 0
    assert len(list(out.glob("*.png"))) == 2
    (key, text), = Image.open(out / "sample_00001.png").text.items()
    written = json.loads(text)
    assert key == "continual-concepts"      # ComfyUI's page reads "prompt" as a graph
    assert (written["prompt"], written["seed"], written["bank"]) == ("a photo of <rex>", 1, bank_file.name)
    progress = capsys.readouterr().err
    assert "drawing: 100%" in progress and "2/2" in progress
    assert main(["bank", "rename", str(bank_file), "mimi", "tom"]) == 0
    assert main(["bank", "remove", str(bank_file), "rex"]) == 0
    assert open_bank(bank_file).names == ["tom"]
    assert main(["bank", "verify", str(bank_file)]) == 0


def test_words_of_several_parts_are_placeholders_of_their_own(tmp_path, photos):
    file = tmp_path / "bank.safetensors"
    for caption in photos.glob("*.txt"):
        caption.unlink()
    assert main(["learn", str(photos), "--bank", str(file), "--name", "dog", "--noun", "dog", "--words",
                 "dog1,dog2", *QUICK]) == 0
    vocabulary = open_bank(file).vocabulary
    assert vocabulary.parse("<dog>").pieces == tuple(p for p in vocabulary.parse("<dog1> <dog2>").pieces
                                                     if p != " ")


def test_merge_writes_both(bank_file, photos, tmp_path):
    other, merged = tmp_path / "other.safetensors", tmp_path / "merged.safetensors"
    rename_in_captions(photos, "mimi")
    assert main(["learn", str(photos), "--bank", str(other), "--name", "mimi", "--noun", "cat", *QUICK]) == 0
    assert main(["bank", "merge", str(bank_file), str(other), "--output", str(merged)]) == 0
    assert open_bank(merged).names == ["rex", "mimi"]


def test_a_merge_tells_what_it_replaces_and_renames(tmp_path, make_concept, layout, capsys):
    def saved(name, *concepts):
        bank = ConceptBank(layout)
        for concept, seed in concepts:
            bank = bank.add(make_concept(layout, concept, seed))
        save_bank(bank, tmp_path / name)
        return str(tmp_path / name)

    one, other = saved("a.safetensors", ("rex", 1)), saved("b.safetensors", ("mimi", 2), ("rex", 1))
    merged = saved("c.safetensors", ("rex", 3), ("tom", 2))
    assert main(["bank", "merge", one, other, "--output", merged]) == 0
    told = capsys.readouterr().err
    assert "replaced: <rex>; the earlier file is kept" in told and "renamed: <tom> is <mimi> now" in told
    assert open_bank(merged).names == ["rex", "mimi"]
    assert main(["bank", "merge", one, other, "--output", merged]) == 0
    assert "replaced" not in capsys.readouterr().err
    assert main(["bank", "merge", one, saved("d.safetensors", ("rex", 4)), "--output", merged]) == 1
    assert "both banks hold 'rex'" in capsys.readouterr().err


def test_bad_pictures_and_banks_are_named_and_the_bank_is_untouched(bank_file, photos, tmp_path, capsys):
    before = bank_file.read_bytes()
    learn = ["--bank", str(bank_file), "--name", "tom", "--noun", "cat", *QUICK]
    empty = tmp_path / "empty"
    empty.mkdir()
    without = ["--bank", str(bank_file), "--name", "tom", *QUICK]
    assert "give with --noun an ordinary word for it" in refused(capsys, "learn", str(photos), *without)
    assert "holds no pictures" in refused(capsys, "learn", str(empty), *learn)
    assert "does not exist" in refused(capsys, "learn", str(tmp_path / "nowhere"), *learn)
    (photos / "broken.png").write_bytes(b"not a picture")
    assert "broken.png" in refused(capsys, "learn", str(photos), *learn)
    (photos / "broken.png").unlink()
    assert "already holds" in refused(capsys, "learn", str(photos), "--bank", str(bank_file), "--name", "rex",
                                      "--noun", "dog", "--seed", "4", *QUICK)
    assert "'bad name'" in refused(capsys, "learn", str(photos), "--bank", str(bank_file), "--name",
                                   "bad name", "--noun", "dog", *QUICK)
    assert "'rnk'" in refused(capsys, "learn", str(photos), *learn, "--set", "rnk=4")
    assert bank_file.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00{\"a\":1}"])
def test_foreign_files_are_no_banks(tmp_path, photos, capsys, content):
    file = tmp_path / "foreign.safetensors"
    file.write_bytes(content)
    for command in (["bank", "list", str(file)],
                    ["learn", str(photos), "--bank", str(file), "--name", "rex", "--noun", "dog", *QUICK]):
        assert "foreign.safetensors" in refused(capsys, *command)
    assert file.read_bytes() == content


def test_a_damaged_concept_is_named(bank_file, capsys):
    data = bytearray(bank_file.read_bytes())
    data[-4000:] = b"\xff" * 4000      # NaN in any floating type
    bank_file.write_bytes(bytes(data))
    assert "'rex'" in refused(capsys, "bank", "verify", str(bank_file))


def test_unknown_placeholders_get_a_hint(bank_file, capsys):
    assert "did you mean <rex>" in refused(capsys, "sample", "a photo of <rexx>", "--bank", str(bank_file),
                                           "--steps", "1")


def test_numbers_that_explode_end_the_run(bank_file, photos, capsys):
    before = bank_file.read_bytes()
    sentence = refused(capsys, "learn", str(photos), "--bank", str(bank_file), "--name", "tom", "--noun",
                       "cat", "--steps", "40",
                       "--batch-size", "1", "--max-grad-norm", "0", "--set", "lr=1e30", "--set",
                       "token_lr=1e30")
    assert "became" in sentence and "at step" in sentence and bank_file.read_bytes() == before


def test_a_bank_of_another_base_is_refused(bank_file, photos, capsys, tiny_backbone, monkeypatch):
    before = bank_file.read_bytes()
    monkeypatch.setattr(backbones, "load_backbone", lambda options: tiny_backbone)
    assert "another base" in refused(capsys, "sample", "a photo of <rex>", "--bank", str(bank_file),
                                     "--steps", "1")
    assert "another base" in refused(capsys, "learn", str(photos), "--bank", str(bank_file), "--name", "tom",
                                     "--noun", "cat", *QUICK)
    assert bank_file.read_bytes() == before


def test_an_interrupted_command_goes_on_where_it_was(photos, tmp_path, capsys, monkeypatch):
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    arguments = ["--name", "rex", "--noun", "dog", *QUICK, "--steps", "4"]
    assert main(["learn", str(photos), "--bank", str(whole), *arguments]) == 0
    original, count = learning.learn_concept, {"steps": 0}

    def interrupted(task, method, data, training, callback, checkpoint, **others):
        def stop(info):
            callback(info)
            if info.step == 2:
                raise KeyboardInterrupt

        return original(task, method, data, training, stop if not count["steps"] else callback, checkpoint,
                        **others)

    monkeypatch.setattr(learning, "learn_concept", interrupted)
    assert main(["learn", str(photos), "--bank", str(stopped), *arguments]) == 130
    assert not stopped.exists()
    count["steps"] = 1
    assert main(["learn", str(photos), "--bank", str(stopped), *arguments]) == 0
    one, two = open_bank(whole)["rex"], open_bank(stopped)["rex"]
    for key, delta in one.deltas.items():
        assert all(map(torch.equal, delta.tensors(), two.deltas[key].tensors()))
    assert all(torch.equal(vector, two.tokens.vectors[name]) for name, vector in one.tokens.vectors.items())
    assert not list(tmp_path.glob(".*checkpoint"))


def test_a_run_that_an_early_version_interrupted_goes_on(photos, tmp_path, capsys, monkeypatch):
    """Its checkpoint names the photos by the digests of their files."""
    def stop(bar, info):
        raise KeyboardInterrupt

    file, steps = tmp_path / "bank.safetensors", []
    command = ["learn", str(photos), "--bank", str(file), "--name", "rex", "--noun", "dog", "--steps", "3",
               "--batch-size", "1", "--base", "embedded-64"]
    monkeypatch.setattr(learning, "_show", stop)
    assert main(command) == 130
    capsys.readouterr()
    saved = tmp_path / ".bank.safetensors.rex.checkpoint"
    state = checkpoint.load(saved)
    assert len(state["identity"]["images"]) == 3
    digests = [hashlib.sha256(photo.read_bytes()).hexdigest()[:16] for photo in sorted(photos.glob("*.png"))]
    state["identity"]["images"] = digests
    checkpoint.save(saved, state)

    other = tmp_path / "other"
    shutil.copytree(photos, other)
    Image.new("RGB", (64, 64)).save(other / "0.png")
    assert "it has 3 images, now 3; none of them " in refused(capsys, command[0], str(other), *command[2:])

    monkeypatch.setattr(learning, "_show", lambda bar, info: steps.append(info.step))
    assert main(command) == 0 and steps == [2, 3]
    assert not set(digests) & set(open_bank(file).infos["rex"].provenance.images)


def test_devices_that_are_not_there(bank_file, capsys):
    assert "device" in refused(capsys, "sample", "a dog", "--device", "warp", "--steps", "1")


def test_photos_of_any_shape_with_captions_elsewhere(tmp_path, draw_photos):
    """As in the CIFC benchmark: photos in one folder, captions in another, several words per concept."""
    file = tmp_path / "bank.safetensors"
    for name, noun, words in (("dog", "dog", "dog1,dog2"), ("duck", "duck toy", "duck1,duck2,duck3")):
        photos, captions = draw_photos(tmp_path / name, noun, 5, 160), tmp_path / f"{name} captions"
        captions.mkdir()
        for text in photos.glob("*.txt"):
            text.rename(captions / text.name)
        arguments = [str(photos), "--captions", str(captions), "--bank", str(file), "--name", name, "--noun",
                     noun, "--words", words]
        assert main(["learn", *arguments, *QUICK]) == 0
    infos = open_bank(file).infos
    assert infos["duck"].words == ("duck1", "duck2",
                                   "duck3") and len(set(infos["dog"].provenance.images)) == 5


@pytest.mark.parametrize("flag", ([], ["--json"]))
def test_bench_says_what_to_run_instead(capsys, flag):
    """Earlier versions had the command; benchmarks are not installed any more."""
    assert main([*flag, "bench", "continual", "--json", "my photos.json", "--upper"]) == 2
    assert capsys.readouterr() == (
        "", "continual-concepts: benchmarks run from a clone of the project, with the same options: "
        "python -m continual_concepts.benchmarks continual --json 'my photos.json' --upper\n")
    assert main([*flag, "bench"]) == 2
    assert "python -m continual_concepts.benchmarks --help\n" in capsys.readouterr().err


def test_bench_may_be_a_name(bank_file, capsys):
    assert main(["bank", "rename", str(bank_file), "rex", "bench"]) == 0
    assert open_bank(bank_file).names == ["bench"]


def test_a_preset_chooses_what_no_flag_says(photos, tmp_path, capsys):
    bank = tmp_path / "bank.safetensors"
    asked = ["learn", str(photos), "--bank", str(bank), "--name", "rex", "--noun", "dog",
             "--preset", "person", "--effort", "quick", "--base", "embedded-64", "--batch-size", "2"]
    assert main([*asked, "--steps", "2"]) == 0
    rates = preset_for_embedded(PERSON, "quick", "embedded-64").rates
    said = (f"preset person or animal, quick, for embedded-64: method slots, lr {rates['lr']:g}, token_lr "
            f"{rates['token_lr']:g}, steps 2, resolution 64, batch_size 2, schedule cosine, warmup 20")
    assert said in capsys.readouterr().out
    info = open_bank(bank).infos["rex"]
    settings = info.provenance.settings
    assert info.kind == "object" and settings["method"]["lr"] == rates["lr"]
    assert {name: settings["training"][name] for name in ("steps", "batch_size", "resolution", "warmup")} == {
        "steps": 2, "batch_size": 2, "resolution": 64, "warmup": 20}


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--effort", "quick"], "--effort is 'quick', and no preset is given; give --preset person"),
    (["--preset", "object", "--kind", "style"], "the kind of concept 'rex' is 'style', and --preset is "
     "'object'; choose a preset for this kind, or none")])
def test_a_preset_that_makes_no_sense_is_refused(photos, tmp_path, capsys, flags, sentence):
    bank = tmp_path / "bank.safetensors"
    assert sentence in refused(capsys, "learn", str(photos), "--bank", str(bank), "--name", "rex", "--noun",
                               "dog", *QUICK, *flags)
    assert not bank.exists()
