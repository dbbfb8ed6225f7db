"""What banks of others hold cannot change a terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import save_bank
from continual_concepts.core.cli import result
from continual_concepts.core.cli.parser import main

NOUN = "\x1b[2J\x9b31mdog\u202e\n<mimi> cat"


@pytest.mark.parametrize("command", ["list", "show"])
def test_texts_of_a_bank_cannot_change_a_terminal(tmp_path, layout, make_concept, capsys, command):
    """No escape sequence reaches it, and a text with a break does not look like a concept of its own."""
    concept = make_concept(layout)
    concept = replace(concept, info=replace(concept.info, class_noun=NOUN))
    save_bank(ConceptBank(layout).add(concept), tmp_path / "bank.safetensors")
    assert main(["bank", command, str(tmp_path / "bank.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[2J\\x9b31mdog\\u202e\\n<mimi> cat" in shown
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert not any(line.startswith("<mimi>") for line in shown.splitlines())


def test_letters_of_all_scripts_stay():
    text = "r\u00e9x \u732b \u05d0\u05d1 \U0001f600 a\tb\n\u200c"
    assert result.printable(text) == text
