"""Programs change a bank one at a time, its file is always whole, and its last versions can be restored."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch
from filelock import FileLock

from continual_concepts.core.bank import format as bankfile
from continual_concepts.core.bank import store as bankkeep
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank, verify_bank
from continual_concepts.core.bank.store import (
    VERSIONS,
    add_concept,
    change_bank,
    replace_concept,
    restore,
    versions,
)
from continual_concepts.core.cli.parser import main
from continual_concepts.core.errors import ConceptError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.safetensors"


@pytest.fixture
def grow(layout, make_concept, path):
    """grow(name): adds a concept to the file."""
    def run(name):
        concept = make_concept(layout, name, len(name))
        return change_bank(path, lambda now: (now or ConceptBank(layout)).add(concept))

    return run


def names_of(path):
    verify_bank(path)
    return open_bank(path).names


def test_versions_are_kept_newest_first(grow, path):
    for i in range(VERSIONS + 3):
        grow(f"c{i}")
    found = versions(path)
    assert [v.number for v in found] == list(range(1, VERSIONS + 1)) and len(names_of(path)) == VERSIONS + 3
    assert [len(names_of(v.path)) for v in found] == [VERSIONS + 2 - n for n in range(VERSIONS)]


def test_a_version_comes_back_and_that_can_be_undone(grow, path):
    for name in ("one", "two", "three"):
        grow(name)
    assert restore(path, 2).names == names_of(path) == ["one"]
    assert names_of(versions(path)[0].path) == ["one", "two", "three"]
    restore(path, 1)
    assert names_of(path) == ["one", "two", "three"]
    with pytest.raises(ConceptError, match="has no version 9; there are 1, 2, 3, 4"):
        restore(path, 9)


def test_a_damaged_bank_is_restored(grow, path):
    grow("one"), grow("two")
    path.write_bytes(b"noise")
    with pytest.raises(ConceptError):
        grow("three")
    assert path.read_bytes() == b"noise"      # for whoever can save something of it
    restore(path, 1)
    assert names_of(path) == ["one"] and versions(path)[0].path.read_bytes() == b"noise"


def test_a_damaged_version_replaces_nothing(grow, path):
    grow("one"), grow("two")
    versions(path)[0].path.write_bytes(b"noise")
    with pytest.raises(ConceptError, match="not a readable"):
        restore(path, 1)
    assert names_of(path) == ["one", "two"] and len(versions(path)) == 1


def test_a_change_that_fails_changes_nothing(grow, path):
    grow("one")
    before = path.read_bytes()

    def failing(now):
        raise ConceptError("no")

    with pytest.raises(ConceptError, match="no"):
        change_bank(path, failing)
    assert path.read_bytes() == before and not versions(path)
    grow("two")      # and the lock is free


def test_killed_between_keeping_and_replacing(grow, path, monkeypatch):
    """A version that exists twice for a moment is listed once, and the next change does not count it
    again."""
    grow("one"), grow("two")
    original = os.replace

    def killed(source, target):
        if str(target) == str(path):
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        grow("three")
    monkeypatch.setattr(os, "replace", original)
    assert names_of(path) == ["one", "two"] and [v.number for v in versions(path)] == [2]
    grow("four")
    assert [names_of(v.path) for v in versions(path)] == [["one", "two"], ["one"]]


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_a_full_disk_loses_nothing(grow, path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    grow("one"), grow("two")
    before, original = path.read_bytes(), bankfile.save_file

    def full(tensors, file, metadata):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bankfile, "save_file", full)
    for _ in range(3):
        with pytest.raises(ConceptError, match="No space left"):
            grow("three")
    assert path.read_bytes() == before and names_of(versions(path)[-1].path) == ["one"]
    monkeypatch.setattr(bankfile, "save_file", original)
    grow("three")
    assert names_of(path) == ["one", "two", "three"] and not list(path.parent.rglob("*.partial"))


def test_what_a_killed_writer_left_half_written_goes_in_time(grow, path):
    old, young, other = (path.with_name(f".{name}.partial")
                         for name in (f"{path.name}.0123abcd", f"{path.name}.0123abce", "else.0123abcd"))
    for file in (old, young, other):
        file.write_bytes(b"half")
    for file in (old, other):
        os.utime(file, (1.0, 1.0))
    grow("one")
    assert not old.exists() and young.exists() and other.exists()


def test_a_folder_that_cannot_be_written_is_told(grow, path, monkeypatch):
    grow("one")
    monkeypatch.setattr(type(path), "mkdir", lambda *_,
                        **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ConceptError, match="cannot write .*: Permission denied"):
        grow("two")
    assert open_bank(path).names == ["one"]


def test_who_waits_too_long_is_told(grow, path, monkeypatch):
    grow("one")
    monkeypatch.setattr(bankkeep, "PATIENCE", 0.05)
    lock = FileLock(str(path.with_name(f".{path.name}.lock")))
    with lock, pytest.raises(ConceptError, match="another program has been writing"):
        grow("two")
    assert names_of(path) == ["one"]


def test_what_others_add_meanwhile_stays(layout, make_concept, path):
    start = ConceptBank(layout)
    first, second = (make_concept(layout, name, i) for i, name in enumerate(("first", "second")))
    add_concept(path, first, {"cidm": {"x": torch.ones(1)}}, start)
    # began from the empty bank too, ended later
    add_concept(path, second, {"cidm": {"x": torch.zeros(1)}}, start)
    assert names_of(path) == ["first", "second"] and open_bank(path).shared["cidm"]["x"] == 1
    with pytest.raises(ConceptError, match="already holds a concept 'second'"):
        add_concept(path, second, {}, start)
    assert len(versions(path)) == 1


def test_a_thumbnail_makes_no_version(layout, make_concept, path):
    add_concept(path, make_concept(layout, "rex", 1), {}, ConceptBank(layout))
    replace_concept(path, make_concept(layout, "rex", 1, thumbnail=b"\xff\xd8\xff picture"))
    assert open_bank(path)["rex"].thumbnail.startswith(b"\xff\xd8") and not versions(path)
    with pytest.raises(ConceptError, match="holds no concept 'mimi' any more"):
        replace_concept(path, make_concept(layout, "mimi", 1))


def test_many_at_once_lose_nothing(grow, path):
    threads = [threading.Thread(target=lambda i=i: [grow(f"c{i}{j}") for j in range(5)]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names_of(path)) == sorted(f"c{i}{j}" for i in range(4) for j in range(5))


def kill_a_writer(path, concept, after: float) -> None:
    """Starts a process that keeps changing the bank, and kills it after some seconds."""
    def change(now):
        return now.add(concept.renamed(f"c{len(now)}")) if len(now) < 12 else now.first(1)

    writer = os.fork()      # a new process would have to import everything first, which takes seconds
    if not writer:
        try:
            while True:
                change_bank(path, change)
        finally:
            os._exit(1)
    time.sleep(after)
    os.kill(writer, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(writer, 0)[1]), "the writer ended by itself"


def test_kill_9_never_tears_a_bank(layout, make_concept, tmp_path, trials, capsys):
    """Killed at random moments, the file and its versions are always states that were written."""
    path, concept = tmp_path / "mine.safetensors", make_concept(layout, "c0", 1)
    save_bank(ConceptBank(layout).add(concept), path)
    moments, count, torn, halves = random.Random(5), trials(5, 300), 0, 0
    for _ in range(count):
        kill_a_writer(path, concept, moments.uniform(0.0, 0.25))
        found = names_of(path)
        torn += found != [f"c{i}" for i in range(len(found))] or not 1 <= len(found) <= 12
        for version in versions(path):
            verify_bank(version.path)
        for half in tmp_path.rglob("*.partial"):      # of a writer that was killed while it wrote
            halves += 1
            half.unlink()
    with capsys.disabled():
        print(f"\n{count} kills, {halves} of them within a write, {torn} torn banks" if count > 5 else "",
              end="")
    assert torn == 0 and (halves > 0 or count <= 5)
    change_bank(path, lambda now: now.first(1))      # a killed writer's lock is free


def test_the_command(grow, path, capsys):
    assert main(["bank", "restore", str(path)]) == 1 and "there is no bank file" in capsys.readouterr().err
    grow("one")
    assert main(["bank", "restore", str(path)]) == 0 and "no earlier versions" in capsys.readouterr().out
    grow("two")
    assert main(["bank", "remove", str(path), "one"]) == 0 and names_of(path) == ["two"]
    capsys.readouterr()
    assert main(["bank", "restore", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1: ") and lines[0].endswith(", one, two") and lines[1].endswith(", one")
    assert main(["bank", "restore", str(path), "--version", "1"]) == 0 and names_of(path) == ["one", "two"]
    assert main(["bank", "restore", str(path), "--version",
                 "7"]) == 1 and "has no version 7" in capsys.readouterr().err
