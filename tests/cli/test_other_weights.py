"""Concepts that were learned on other weights of an embedded base, as an earlier version had them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.bank.hints import notes_on_base
from continual_concepts.core.cli.parser import main
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.demo.bases import FILES

from .conftest import QUICK

NOTE = "<rex> was learned on other weights of embedded-64 than this version has, so its pictures differ; " \
       "learn it again"


@pytest.fixture
def earlier_bank(bank_file):
    """A bank whose <rex> was learned on other weights, and whose <tom> was not."""
    bank = open_bank(bank_file)
    info = bank["rex"].info
    origin = replace(info.provenance, base="0" * 16)
    grown = ConceptBank(bank.layout).add(replace(bank["rex"], info=replace(info, provenance=origin)))
    save_bank(grown.add(bank.rename("rex", "tom")["tom"]), bank_file)
    return bank_file


def test_sampling_tells_of_the_named_concepts(earlier_bank, tmp_path, capsys):
    sample = ["sample", "--bank", str(earlier_bank), "--base", "embedded-64", "--steps", "1", "--count", "1",
              "--output", str(tmp_path / "out")]
    assert main([*sample, "a photo of <tom>"]) == 0
    assert "other weights" not in capsys.readouterr().err
    assert main([*sample, "a photo of <tom>", "--negative", "<rex>"]) == 0
    assert f"note: {NOTE}\n" in capsys.readouterr().err


def test_learning_tells_of_the_bank(earlier_bank, photos, capsys):
    learn = ["learn", str(photos), "--bank", str(earlier_bank), "--name", "rex", "--noun", "dog",
             "--if-known", "again", *QUICK]
    assert main(learn) == 0
    assert f"warning: {NOTE}\n" in capsys.readouterr().err
    assert main([*learn, "--seed", "1"]) == 0
    assert "other weights" not in capsys.readouterr().err


def test_models_that_do_not_ship_are_not_compared(earlier_bank):
    backbone = load_base(FILES["embedded-64"])
    infos, layout = list(open_bank(earlier_bank).infos.values()), backbone.layout
    assert notes_on_base(infos, layout, backbone.fingerprint) == [NOTE]
    finetuned = replace(layout, text_widths=(("clip_l", 768),))
    assert notes_on_base(infos, finetuned, backbone.fingerprint) == []
    unknown = replace(infos[0], provenance=replace(infos[0].provenance, base=""))
    assert notes_on_base([unknown], layout, backbone.fingerprint) == []
    many = [replace(infos[0], name=f"rex{i}") for i in range(14)]
    note, = notes_on_base(many, layout, backbone.fingerprint)
    assert "<rex11> and 2 more were learned" in note and note.endswith("learn them again")
