"""`learn --variant-of`: the command and a table's column; bad input is one sentence before any work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.bank.terms import Terms
from continual_concepts.core.cli.parser import main
from continual_concepts.core.demo import scenes

QUICK = ["--steps", "1", "--batch-size", "1", "--base", "embedded-64"]


@pytest.fixture
def cast(tmp_path):
    """Two folders of photos."""
    for name, seed in (("usual", 1), ("winter", 2)):
        folder = tmp_path / "cast" / name
        folder.mkdir(parents=True)
        Image.fromarray(scenes.CONCEPTS["rex"].pictures(1, seed=seed)[0][0]).save(folder / "0.png")
    return tmp_path / "cast"


def learn(cast, folder, name, *more):
    return main(["learn", str(cast / folder), "--bank", str(cast.parent / "bank.safetensors"), "--name", name,
                 *QUICK, *more])


def test_a_variant_is_learned_listed_kept_and_named(cast, capsys):
    bank = cast.parent / "bank.safetensors"
    assert learn(cast, "usual", "rex", "--noun", "dog", "--set", "slots=4") == 0
    licensed = open_bank(bank)["rex"]
    licensed = replace(licensed, info=replace(licensed.info, terms=Terms("CC BY 4.0", "Ann")))
    save_bank(open_bank(bank).replace(licensed), bank)
    before = open_bank(bank)["rex"].digest()
    assert learn(cast, "winter", "rex-winter", "--variant-of", "rex") == 0
    stored = open_bank(bank)
    assert stored["rex"].digest() == before != stored["rex-winter"].digest()
    assert (stored.infos["rex-winter"].class_noun, stored["rex-winter"].slots) == ("dog", 4)
    capsys.readouterr()
    assert main(["bank", "list", str(bank)]) == 0
    assert ", variant of <rex>" in capsys.readouterr().out
    assert learn(cast, "winter", "rex-winter", "--variant-of", "<rex>") == 0
    assert "already, learned from these photos" in capsys.readouterr().out
    assert learn(cast, "winter", "rex-winter", "--noun", "dog", "--set", "slots=4") == 1
    assert "its parent is 'rex', now ''" in capsys.readouterr().err
    assert stored.infos["rex-winter"].terms == Terms("CC BY 4.0", "Ann")
    assert learn(cast, "usual", "rex-winter", "--if-known", "refine", "--steps", "1") == 0
    assert open_bank(bank).infos["rex-winter"].terms == Terms("CC BY 4.0", "Ann")      # refined
    assert open_bank(bank).infos["rex-winter"].provenance.variant_of == "rex"
    assert learn(cast, "winter", "rex", "--variant-of", "rex", "--if-known", "refine") == 1
    assert "--variant-of is 'rex', which begins a new concept" in capsys.readouterr().err


def test_a_table_names_variants_of_earlier_rows(cast, capsys):
    bank, table = cast.parent / "bank.safetensors", cast / "concepts.csv"
    command = ["learn-all", str(cast), "--bank", str(bank), *QUICK]
    table.write_text("folder,name,noun,variant_of\nwinter,rex-winter,,rex\nusual,rex,dog,\n")
    assert main(command) == 1
    assert "is a variant of 'rex', which is neither in the bank nor in a row above" in capsys.readouterr().err
    table.write_text("folder,name,noun,variant_of\nusual,rex,dog,\nwinter,rex-winter,,<rex>\n")
    assert main(command) == 0
    infos = open_bank(bank).infos
    assert (infos["rex-winter"].class_noun, infos["rex-winter"].provenance.variant_of) == ("dog", "rex")
