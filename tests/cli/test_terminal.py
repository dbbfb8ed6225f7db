"""What banks of others hold cannot change a terminal, and a terminal that is gone ends no command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
from tqdm import tqdm

from continual_concepts.core import cli
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


def _works(options):
    result.complain("it begins")
    with tqdm(total=1) as bar:
        bar.update()
        bar.write("in between", file=sys.stderr)
    return {"notes": ["a note"]}, ["done"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("way", ["full disk", "broken pipe", "closed"])
def test_a_command_whose_messages_cannot_be_printed_does_its_work(monkeypatch, capfd, way):
    """A log on a full disk, or `2>&1 | head -1`, ended the learning of a concept."""
    ends = os.pipe()
    os.close(ends[0])
    place = "/dev/full" if way == "full disk" else ends[1]
    stream = None if way == "closed" else open(place, "w", buffering=1)      # noqa: SIM115
    for name in ("stderr", "__stderr__"):
        monkeypatch.setattr(sys, name, stream)
    assert result.run("program", _works, Namespace(json=False), "stopped") == 0
    assert sys.stderr is stream and capfd.readouterr().out == "done\n"
    if stream is not None:
        stream.close()      # writes nothing that fails


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_line_on_the_missing_base_cannot_end_a_command(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        for name in ("stderr", "__stderr__"):
            monkeypatch.setattr(sys, name, full)
        assert main(["sample", "a dog", "--bank", "missing.safetensors"]) == 1      # it came to the bank
        assert sys.stderr is full


@pytest.mark.parametrize("stream", ["no number", "closed"])
def test_streams_of_other_kinds_may_fail_as_well(tmp_path, stream):
    """Programs give what they like, and pytest gives its own."""
    class Refusing:
        def write(self, text):
            raise OSError

        flush = write

    given = Refusing()
    if stream == "closed":
        given = (tmp_path / "log").open("w")
        given.close()
    messages = result._Messages(given)
    assert messages.write("text") == 4
    messages.flush()
    copy(messages)


def test_a_stop_while_the_result_is_printed_is_told(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(result, "say", stop)
    assert result.run("program", lambda _: ({}, ["done"]), Namespace(json=False), "stopped") == 130
    assert capsys.readouterr().err == "program: stopped\n"


SLOW_END = """
import sys, time
from continual_concepts.core.cli import program

class Slow:
    def __del__(self):
        time.sleep(1)

sys.argv, sys.modules["slow"] = ["continual-concepts", *sys.argv[1:]], Slow()
code = program()
print("ends", flush=True)
sys.exit(code)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has other signals")
def test_signals_while_python_ends_change_nothing(tmp_path, installed):
    """It takes seconds, and a second signal changed the exit code of what had been done."""
    command = [sys.executable, "-I", "-c", SLOW_END, "bank", "list", str(tmp_path / "no.safetensors")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ends\n"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) * 8:
            process.send_signal(number)
            time.sleep(0.05)
        errors = process.stderr.read()
    assert process.returncode == 1 and "Traceback" not in errors and "no.safetensors" in errors


def test_ctrl_c_between_a_commands_end_and_the_programs_is_told(monkeypatch, capsys):
    def run():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", run)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert cli.program() == 130 and "stopped" in capsys.readouterr().err
