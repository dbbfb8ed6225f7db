"""Which embedded base a command uses."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import save_bank
from continual_concepts.core.cli import backbones, main
from continual_concepts.core.demo import bases
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.demo.bases import FILES
from continual_concepts.core.errors import ConceptError


@pytest.fixture(autouse=True)
def newer(monkeypatch):
    """A newer base than the one of 64 pixels."""
    monkeypatch.setattr(backbones, "NEWEST", "newer")
    monkeypatch.setattr(backbones, "NAMES", ("embedded", "embedded-64", "newer"))


@pytest.fixture(scope="module")
def banks(tmp_path_factory, other_base):
    """Paths of banks by the base that they were made on."""
    folder = tmp_path_factory.mktemp("banks")
    files = {"embedded-64": FILES["embedded-64"], "another": other_base}
    for name, file in files.items():
        save_bank(ConceptBank(load_base(file).layout), folder / f"{name}.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"no bank")
    return folder


@pytest.mark.parametrize(("bank", "expected"), [
    ("embedded-64", "embedded-64"), ("another", "newer"), ("damaged", "newer"), ("missing", "newer")])
def test_a_bank_finds_the_base_that_it_was_made_on(banks, bank, expected):
    options = Namespace(base="embedded", bank=banks / f"{bank}.safetensors")
    assert backbones.embedded_name(options) == expected


def test_a_named_base_is_taken(banks):
    options = Namespace(base="newer", bank=banks / "embedded-64.safetensors")
    assert backbones.embedded_name(options) == "newer" and backbones.is_embedded(options)


def test_the_transformer_is_refused_until_its_file_is_there(monkeypatch, tmp_path, other_base):
    options = Namespace(base="embedded-dit", device="cpu")
    monkeypatch.setitem(bases.TRANSFORMERS, "embedded-dit", tmp_path / "none.safetensors")
    for use in (backbones.size_of, backbones.training_of, backbones.load_backbone):
        with pytest.raises(ConceptError,
                           match="'embedded-dit' is not trained yet.*allowed: embedded, embedded-64"):
            use(options)
    monkeypatch.setitem(bases.TRANSFORMERS, "embedded-dit", other_base)
    assert backbones.size_of(options) == 32 and backbones.load_backbone(options).picture_size == 32


def test_learning_and_sampling_on_the_transformer(monkeypatch, tmp_path, transformer_base, draw_photos,
                                                  capsys):
    monkeypatch.setitem(bases.TRANSFORMERS, "embedded-dit", transformer_base)
    photos, bank = draw_photos(tmp_path / "photos", "dog", 2, 40), str(tmp_path / "bank.safetensors")
    learn = ["learn", str(photos), "--bank", bank, "--name", "rex", "--noun", "dog", "--method", "slots",
             "--base", "embedded-dit", "--steps", "2"]
    assert main([*learn, "--min-snr-gamma", "5"]) == 1
    assert "'min_snr_gamma' is 5; allowed: 0" in capsys.readouterr().err
    assert main(learn) == 0, capsys.readouterr().err
    sample = ["sample", "a photo of <rex>", "--bank", bank, "--base", "embedded-dit", "--steps", "2",
              "--count", "1", "--output", str(tmp_path / "pictures")]
    assert main(sample) == 0, capsys.readouterr().err
    picture, = (tmp_path / "pictures").glob("*.png")
    assert Image.open(picture).size == (32, 32)


def test_without_a_bank_the_newest_is_taken():
    assert backbones.embedded_name(Namespace(base="embedded", bank=None)) == "newer"
    assert backbones.embedded_name(Namespace(base="embedded")) == "newer"


def test_size_and_training_are_those_of_the_base(banks):
    options = Namespace(base="embedded", bank=banks / "embedded-64.safetensors")
    assert backbones.size_of(options) == backbones.training_of(options).resolution == 64


@pytest.fixture
def two_threads():
    """Computes with two threads in a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_an_embedded_base_computes_with_one_thread(two_threads):
    """On busy cores, two threads of such a small model wait for one another."""
    backbones.load_backbone(Namespace(base="embedded-64", bank=None, device="cpu"))
    assert torch.get_num_threads() == 1


def test_a_program_that_calls_a_command_keeps_its_threads(two_threads, tmp_path):
    sample = ["sample", "a dog", "--base", "embedded-64", "--steps", "1", "--count", "1", "--output"]
    assert main([*sample, str(tmp_path)]) == 0
    assert torch.get_num_threads() == 2
    assert main([*sample, str(tmp_path), "--bank", str(tmp_path / "none.safetensors")]) == 1
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("typed", ["embedded_64", "Embedded-64", " embedded-64", "embeded-64"])
def test_a_misspelt_base_is_told_with_the_names_of_all(typed):
    for use in (backbones.load_backbone, backbones.check_base):
        with pytest.raises(ConceptError, match="does not exist; did you mean 'embedded-64'\\? Allowed: "
                                               "embedded, embedded-64, newer, or SD1.5"):
            use(Namespace(base=typed, bank=None, device="cpu"))


def test_a_folder_of_such_a_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded_64").mkdir()
    with pytest.raises(ConceptError, match="'embedded_64' has no subfolder 'unet'"):
        backbones.check_base(Namespace(base="embedded_64", bank=None, device="cpu"))
