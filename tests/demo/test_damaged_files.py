"""Files that ship, as a download that broke off or Git's pointer in their place leaves them."""

from __future__ import annotations

import pytest

from continual_concepts.core import cli
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.demo.bases import ASSETS, FILES, TRANSFORMERS, read_sizes
from continual_concepts.core.demo.encoder import MetricEncoder
from continual_concepts.core.errors import ConceptError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9415800\n"
SHIPPED = [*FILES.values(), *(file for file in TRANSFORMERS.values() if file.exists())]


def damaged(path, kind: str, whole):
    """A damaged copy of the whole file at this path; none for the kind 'missing'."""
    data = whole.read_bytes()
    if kind != "missing":
        path.write_bytes({"cut": data[:len(data) // 2], "empty": b"", "pointer": POINTER}[kind])
    return path


@pytest.mark.parametrize("kind", ["cut", "empty", "pointer", "missing"])
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_damaged_base_is_one_sentence(tmp_path, file, kind):
    copy = damaged(tmp_path / file.name, kind, file)
    for read in (read_sizes, load_base):
        with pytest.raises(ConceptError) as caught:
            read(copy)
        assert str(caught.value) == (f"the file '{copy}', which comes with Continual Concepts, is missing or "
                                     "damaged; install Continual Concepts again")


def test_a_damaged_judge_is_one_sentence(tmp_path):
    copy = damaged(tmp_path / "metrics.safetensors", "cut", ASSETS / "metrics.safetensors")
    with pytest.raises(ConceptError, match="is missing or damaged; install Continual Concepts again"):
        MetricEncoder.load(copy)


def test_the_command_line_says_so_when_it_starts(monkeypatch, capsys):
    """The newest base is read when the commands are imported."""
    import builtins

    found = builtins.__import__

    def fails(name, *others):
        if name == "parser":
            raise ConceptError("the file 'base' is missing or damaged")
        return found(name, *others)

    monkeypatch.setattr(builtins, "__import__", fails)
    assert cli.main(["bank", "list", "none"]) == 1
    assert capsys.readouterr().err == "continual-concepts: the file 'base' is missing or damaged\n"
