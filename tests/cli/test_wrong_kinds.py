"""Bases, banks and devices that are something else: one sentence before any work."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.cli.parser import main
from continual_concepts.core.demo.bases import FILES, JOINT, NAMES, TRANSFORMERS
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation.collisions import warnings_before
from continual_concepts.core.interop.export import check_not_only_slots, export_bank, export_concept
from continual_concepts.core.interop.importing import Sources, concept_of
from continual_concepts.core.interop.prompt_export import export_prompt
from continual_concepts.core.training.folders import plan, read_as

from .conftest import QUICK

LEARN = ["--name", "rex", "--noun", "dog"]


@pytest.fixture
def told(capsys):
    """told(*arguments): the sentence of a command that fails."""
    def sentence(*arguments) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        text = capsys.readouterr().err.strip().splitlines()[-1]
        return text.removeprefix("continual-concepts: ")

    return sentence


@pytest.mark.parametrize("device", ["xyz", "", "cuda:99", "CPU", "meta", "cpu,cuda"])
def test_a_device_is_told_in_our_own_sentence(told, device):
    """PyTorch's sentence lists twenty devices that are not here."""
    sentence = told("sample", "a dog", *QUICK[-2:], "--device", device)
    assert sentence.startswith(f"--device is '{device}', which cannot be used here; allowed: cpu")
    assert len(sentence) < 160


@pytest.mark.parametrize(("typed", "meant"), [("dit", "embedded-dit"), ("64", "embedded-64"),
                                              ("Embedded_DIT", "embedded-dit"), ("nowhere", "")])
def test_a_base_that_does_not_exist_is_told_with_all_names(told, tmp_path, monkeypatch, typed, meant):
    monkeypatch.chdir(tmp_path)
    sentence = told("sample", "a dog", "--base", typed)
    assert sentence == (f"base '{typed}' does not exist; "
                        + (f"did you mean '{meant}'? Allowed: " if meant else "allowed: ")
                        + f"{', '.join(NAMES)}, or SD1.5, SD2 or SDXL as a folder in diffusers' layout")


def test_files_of_ours_that_are_no_base(told, photos, bank_file, tmp_path):
    own = shutil.copy(FILES["embedded-64"], tmp_path / "renamed.safetensors")
    assert told("sample", "a dog", "--base", own) == \
        f"base '{own}' is the file of an embedded base; give its name: {', '.join(NAMES[1:])}"
    sentence = told("learn", photos, *LEARN, "--bank", tmp_path / "new.safetensors", "--base", bank_file)
    assert sentence.startswith(f"base '{bank_file}' is a concept bank; give it with --bank")
    (tmp_path / "half.safetensors").write_bytes(b"half")
    assert "is a single file" in told("sample", "a dog", "--base", tmp_path / "half.safetensors")


@pytest.mark.parametrize("name", ["b.txt", "b", "b.safetensors.bak", "b.pt"])
def test_a_new_bank_ends_as_comfyui_lists_it(told, photos, bank_file, tmp_path, name):
    new = tmp_path / name
    end = f"the bank '{new}' does not end in .safetensors, so ComfyUI would not list it; give it this ending"
    assert told("learn", photos, *LEARN, "--bank", new, *QUICK) == end
    shutil.copytree(photos, tmp_path / "cast" / "rex dog")
    assert told("learn-all", tmp_path / "cast", "--bank", new, *QUICK) == end
    assert told("bank", "merge", bank_file, bank_file, "--output", new) == end
    assert told("bank", "import", new, "teddy", "--lora", "lora.safetensors") == end
    assert not new.exists()


def test_a_bank_of_another_ending_that_exists_still_works(bank_file, photos, tmp_path, capsys):
    """Earlier versions wrote such files."""
    old = bank_file.rename(tmp_path / "b.txt")
    assert main(["learn", str(photos), *LEARN, "--bank", str(old), "--if-known", "again", *QUICK]) == 0
    assert main(["bank", "rename", str(old), "rex", "max"]) == 0 and open_bank(old).names == ["max"]
    capsys.readouterr()


def test_a_bank_of_another_base_was_not_learned_on_other_weights(told, photos, bank_file, capsys):
    """The command once said so of all its concepts, and to learn them again, before it refused the bank."""
    capsys.readouterr()
    assert main(["learn", str(photos), "--name", "max", "--noun", "dog", "--bank", str(bank_file),
                 "--steps", "1", "--base", "embedded-dit"]) == 1
    text = capsys.readouterr().err
    assert "the bank was made for another base" in text and "other weights" not in text


def test_folders_of_several_words_are_told_as_they_are_read(tmp_path, photos):
    cast = tmp_path / "cast"
    for name in ("my toy robot", "rex dog"):
        shutil.copytree(photos, cast / name)
    note, = read_as(plan(cast))
    assert note == ("the first word of a folder's name is the concept's name: 'my toy robot' is <my>, a toy "
                    "robot; rename the folder, or make a table concepts.csv, where that is not meant")
    for number in range(4):
        shutil.copytree(photos, cast / f"toy{number} teddy bear")
    note, = read_as(plan(cast))
    assert "; and 2 more; rename the folder" in note
    shutil.rmtree(cast)
    shutil.copytree(photos, cast / "rex dog")
    assert read_as(plan(cast)) == []


def test_the_note_on_folders_comes_before_learning(tmp_path, photos, capsys, monkeypatch):
    from continual_concepts.core.cli import learning_all

    cast, order = tmp_path / "cast", []
    shutil.copytree(photos, cast / "my toy robot")
    monkeypatch.setattr(learning_all, "learn", lambda options: order.append(capsys.readouterr().err))
    main(["learn-all", str(cast), "--bank", str(tmp_path / "b.safetensors"), *QUICK])
    assert "note: the first word of a folder's name is the concept's name: 'my toy robot' is <my>" in order[0]
    assert "'my toy robot' is <my>" not in capsys.readouterr().err


@pytest.fixture
def joint_layout(layout):
    """Of a base with joint attention."""
    return replace(layout, sites=tuple(replace(site, name=f"double_blocks.{site.index}")
                                       for site in layout.sites))


def test_joint_attention_is_refused_by_what_was_asked(joint_layout, make_concept, tmp_path):
    """An import was once refused because its deltas could not be exported, and slots for lack of 'lora'."""
    bank = ConceptBank(joint_layout)
    refused = "joint attention of text and picture, where {} is not supported; allowed: learning with"
    with pytest.raises(ConceptError, match=refused.format("importing files")):
        concept_of("teddy", "bear", "object", joint_layout, (), Sources(("lora.safetensors",)))
    for export in (lambda: export_concept(bank, "rex", tmp_path), lambda: export_bank(bank, tmp_path),
                   lambda: export_prompt(bank, "<rex>", tmp_path)):
        with pytest.raises(ConceptError, match=refused.format("writing files for other programs")):
            export()


@pytest.mark.skipif(not TRANSFORMERS[JOINT].exists(), reason="no file of the base with joint attention")
def test_what_no_program_could_read_is_not_learned_for_other_programs(told, photos, tmp_path):
    sentence = told("learn", photos, *LEARN, "--bank", tmp_path / "joint.safetensors", *QUICK[:-1], JOINT,
                    "--for-other-programs")
    assert "where writing files for other programs is not supported" in sentence


def test_a_concept_of_slots_is_not_sent_to_a_format_that_its_base_lacks(bank_file):
    """Where words are class nouns, there is no embedding to write."""
    concept, layout = open_bank(bank_file)["rex"], open_bank(bank_file).layout
    with pytest.raises(ConceptError, match="learn it with the method lora .*; allowed: the format 'embedd"):
        check_not_only_slots([concept], layout)
    with pytest.raises(ConceptError, match=r"in Concept Learner\)$"):
        check_not_only_slots([concept], replace(layout, text_widths=(("t5xxl", 64),)))


def test_warnings_on_shared_weights_name_a_method_that_every_base_has(layout, make_concept):
    bank = ConceptBank(layout).add(make_concept(layout, "rex", method="lora"))
    for method in ("lora", "finetune"):
        text = " ".join(warnings_before(bank, "max", "dog", method))
        assert "the method 'slots'" in text and "bound" not in text


def test_merging_and_comparing_tell_of_other_weights(bank_file, tmp_path, capsys):
    bank = open_bank(bank_file)
    info = bank["rex"].info
    old = replace(bank["rex"], info=replace(info, provenance=replace(info.provenance, base="0" * 16)))
    save_bank(ConceptBank(bank.layout).add(old), bank_file)
    other, out = tmp_path / "other.safetensors", str(tmp_path / "merged.safetensors")
    save_bank(bank.rename("rex", "tom"), other)
    note = "<rex> was learned on other weights of embedded-64 than this version has"
    assert main(["bank", "merge", str(bank_file), str(other), "--output", out]) == 0
    assert f"note: {note}" in capsys.readouterr().err
    export = ["bank", "export", out, "--output", str(tmp_path / "files"), "--format", "embedding",
              "--compare"]
    assert main([*export, "rex"]) == 0
    assert note in capsys.readouterr().out
    assert main([*export, "tom"]) == 0
    assert "other weights" not in capsys.readouterr().out
    assert main(["bank", "merge", str(other), str(other), "--output", out]) == 1
