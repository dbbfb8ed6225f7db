"""The flags of the command line: help and defaults of all of them, rates, regions, the base that is used when
none is named, and the version."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch

from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.cli import backbones, sampling
from continual_concepts.core.cli.parser import NO_BASE, build_parser, main
from continual_concepts.core.demo.bases import EMBEDDED, NAMES
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.versions import own_version

from .conftest import QUICK
from .test_commands import refused


def parsers(parser: argparse.ArgumentParser, name: str = "continual-concepts"):
    """The parser of every command, with its name."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from parsers(below, f"{name} {command}")


def test_every_flag_has_a_help_with_its_default():
    seen = 0
    for name, parser in parsers(build_parser()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) or action.dest in ("help", "version"):
                continue
            seen += 1
            assert action.help, f"{name}: {action.dest} has no help"
            if action.option_strings and not action.required:
                assert "default" in action.help, f"{name}: {action.option_strings[0]} names no default"
        parser.format_help()      # raises for a wrong %
    assert seen > 120


def test_help_offers_the_bases_that_ship():
    for name, parser in parsers(build_parser()):
        for action in parser._actions:
            if action.dest == "base" and action.choices is None:
                offered = set(re.findall(r"embedded-\w+", action.help))
                assert offered == set(NAMES) - {EMBEDDED}, name


@pytest.mark.parametrize(("typed", "missing"), [([], "command (one of demo, learn,"),
                                                (["bank"], "action (one of list, verify,")])
def test_a_missing_command_is_told_with_all_that_there_are(typed, missing, capsys):
    with pytest.raises(SystemExit):
        main(typed)
    told = capsys.readouterr().err
    assert f"are required: {missing}" in told and told.count("\n") == 1


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"continual-concepts {own_version()}\n"


@pytest.mark.parametrize("place", [0, 1, 4])
def test_json_may_stand_at_any_place(bank_file, capsys, place):
    arguments = ["bank", "show", str(bank_file), "rex"]
    assert main([*arguments[:place], "--json", *arguments[place:]]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "rex"


def test_a_bank_is_shown_without_a_name(bank_file, capsys):
    assert main(["bank", "show", str(bank_file), "--json"]) == 0
    every = json.loads(capsys.readouterr().out)["concepts"]
    assert main(["bank", "show", str(bank_file), "rex", "--json"]) == 0
    assert every == [json.loads(capsys.readouterr().out)]
    assert main(["bank", "show", str(bank_file)]) == 0
    assert "placeholder: <rex>" in capsys.readouterr().out


def test_rates_have_flags(photos, tmp_path, capsys):
    bank = tmp_path / "bank.safetensors"
    asked = ["learn", str(photos), "--bank", str(bank), "--name", "rex", "--noun", "dog", "--method", "lora"]
    assert main([*asked, *QUICK, "--lr", "3e-4", "--token-lr", "0.002"]) == 0
    settings = open_bank(bank).infos["rex"].provenance.settings["method"]
    assert (settings["lr"], settings["token_lr"]) == (3e-4, 2e-3)
    capsys.readouterr()
    assert "setting 'lr' is given twice" in refused(capsys, *asked, "--lr", "1e-4", "--set", "lr=1e-4")
    assert "setting 'lr' is 'fast'; allowed: a number" in refused(capsys, *asked, "--lr", "fast")


def test_a_command_without_a_base_says_that_it_uses_the_toy_base(bank_file, tmp_path, capsys):
    sample = ["sample", "a dog", "--bank", str(bank_file), "--steps", "1", "--count", "1", "--output",
              str(tmp_path / "pictures")]
    assert main(sample) == 0
    assert capsys.readouterr().err.splitlines().count(NO_BASE) == 1
    assert main([*sample, "--base", "embedded"]) == 0
    assert NO_BASE not in capsys.readouterr().err


def regions_of(*flags: str):
    options = build_parser().parse_args(["sample", "a dog", *flags])
    return sampling._regions(options)


def test_boxes_have_one_order_and_the_old_one_is_told(bank_file, tmp_path, capsys):
    (new,), (old,) = (regions_of(flag, edges) for flag, edges in (
        ("--box", "0,0.1,0.5,1:a (red:1.2) dog"), ("--region", "0.1,0,1,0.5:a (red:1.2) dog")))
    assert new == old and new.box == (0.1, 0.0, 1.0, 0.5) and new.prompt == "a (red:1.2) dog"
    sample = ["sample", "a dog", "--base", "embedded-64", "--steps", "1", "--count", "1", "--output",
              str(tmp_path / "pictures")]
    assert main([*sample, "--region", "0.1,0,1,0.5:a dog"]) == 0
    assert sampling.OLD_ORDER in capsys.readouterr().err
    assert main([*sample, "--box", "0,0.1,0.5,1:a dog"]) == 0
    assert sampling.OLD_ORDER not in capsys.readouterr().err
    first, second = sorted((tmp_path / "pictures").iterdir())
    assert first.read_bytes() == second.read_bytes()


def test_regions_are_read_as_the_editor_stores_them(tmp_path):
    file = tmp_path / "regions.json"
    file.write_text('[{"prompt": "a cat", "box": [0, 0, 0.5, 1], "strength": 0.8, "negative": "fog", '
                    '"feather": 0.1, "start": 0.1, "end": 0.9}, '
                    '{"prompt": "a dog", "box": [0.5, 0, 1, 1], "on": false}]')
    regions = file.read_text()
    for mark, encoding in (("\ufeff", "utf-8"), ("\ufeff", "utf-16-le")):      # of Windows' editor and shell
        file.write_bytes((mark + regions).encode(encoding))
        assert len(regions_of("--regions", str(file))) == 1
    first, second = regions_of("--regions", str(file), "--box", "0,0,1,0.5:a tree", "--feather", "0.2")
    assert (first.prompt, first.negative, first.strength, first.feather) == ("a cat", "fog", 0.8, 0.1)
    assert (first.box, first.start, first.end) == ((0.0, 0.0, 1.0, 0.5), 0.1, 0.9)
    assert (second.prompt, second.box, second.feather) == ("a tree", (0.0, 0.0, 0.5, 1.0), 0.2)


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--box", "0,0,1:a dog"], "--box is '0,0,1:a dog'; allowed: LEFT,TOP,RIGHT,BOTTOM:PROMPT"),
    (["--box", "0,0,1,1"], "--box is '0,0,1,1'; allowed: LEFT,TOP,RIGHT,BOTTOM:PROMPT"),
    (["--region", "a,0,1,1:a dog"], "--region is 'a,0,1,1:a dog'; allowed: TOP,LEFT,BOTTOM,RIGHT:PROMPT"),
    (["--regions", "nowhere.json"], "--regions 'nowhere.json' cannot be read"),
    (["--find-regions", "--box", "0,0,1,1:a dog"], "--find-regions finds regions by itself"),
])
def test_wrong_regions_are_one_sentence(flags, sentence):
    with pytest.raises(ConceptError, match=re.escape(sentence)):
        regions_of(*flags)


def test_settings_of_regions_reach_the_sampler(tmp_path, monkeypatch, tiny_backbone):
    taken = []
    monkeypatch.setattr(backbones, "load_backbone", lambda options: tiny_backbone)
    for name in ("sample_regions", "sample_found"):
        def note(*given, name=name):
            taken.append((name, given[-1]))
            raise ConceptError("seen")

        monkeypatch.setattr(sampling, name, note)
    sample = ["sample", "a dog", "--base", "embedded", "--size", "96x64", "--output", str(tmp_path)]
    flags = ["--overlap", "priority", "--isolation", "0.7", "--solo", "0.2", "--region-noise", "--alpha",
             "0.3", "--outside", "literal", "--noise-area", "crop", "--attention-guidance", "0.5"]
    assert main([*sample, "--box", "0,0,1,1:a dog", *flags]) == 1 and main([*sample, "--find-regions"]) == 1
    (which, settings), (other, _) = taken
    assert (which, other) == ("sample_regions", "sample_found")
    assert (settings.overlap, settings.isolation, settings.artists) == ("priority", 0.7, 0.5)
    assert settings.size == (64, 96)      # height, width
    noise = settings.noise
    assert (noise.is_on, noise.alpha, noise.outside, noise.area, noise.crop_denoising) == (
        True, 0.3, "literal", "crop", 0.2)


def test_what_has_no_effect_and_pictures_of_nan_are_told(tmp_path, monkeypatch, tiny_backbone, capsys):
    monkeypatch.setattr(backbones, "load_backbone", lambda options: tiny_backbone)
    monkeypatch.setattr(sampling, "sample_regions", lambda *_: torch.full((2, 3, 8, 8), torch.nan))
    assert main(["sample", "a dog", "--base", "embedded", "--size", "64", "--output", str(tmp_path),
                 "--count", "2", "--attention-guidance", "1", "--box", "0,0,1,1:a dog"]) == 0
    shown = capsys.readouterr().err
    assert "note: --attention-guidance has no effect on pictures with regions" in shown
    assert "note: the picture of seed 1 holds NaN or infinite numbers; lower --cfg or --strength" in shown


def test_a_long_prompt_is_no_fault(tmp_path, capfd):
    """It is encoded in parts. The tokenizer warns that it would not fit."""
    sample = ["sample", "dog " * 80, "--base", "embedded-64", "--steps", "1", "--count", "1"]
    assert main([*sample, "--output", str(tmp_path)]) == 0
    assert "sequence length" not in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["--words", "--variant-of"])
@pytest.mark.parametrize("text", ["", "  "])
def test_a_name_that_is_empty_is_refused(photos, tmp_path, capsys, flag, text):
    """It would be learned as if the flag were not there."""
    asked = ["learn", str(photos), "--bank", str(tmp_path / "b.safetensors"), "--name", "rex", *QUICK]
    with pytest.raises(SystemExit):
        main([*asked, flag, text])
    assert f"argument {flag}: {text!r} is not allowed; allowed: " in capsys.readouterr().err
