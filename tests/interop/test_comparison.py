"""Pictures of an export: with the bank, and from the files as other programs read them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import save_bank
from continual_concepts.core.cli import export
from continual_concepts.core.cli.parser import main
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.demo.bases import file_of
from continual_concepts.core.images import to_pil
from continual_concepts.core.interop.comparison import read_back, side_by_side
from continual_concepts.core.interop.export import export_concept
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings

QUICK = SampleSettings(steps=2, cfg=3.0, size=(64, 64))
PROMPT = "a photo of <rex>"
ROUNDING = 2e-3      # of pictures in -1..1: the files hold 16 bits


@pytest.fixture(scope="module")
def base():
    return load_base(file_of("embedded-64"))


def largest_change(base, concept, folder, formats) -> float:
    """The largest change of a pixel, against the bank's picture, where other programs read the files."""
    bank = ConceptBank(base.layout).add(concept)
    files = dict(zip(formats, export_concept(bank, "rex", folder, formats).files, strict=True))
    drawn = [sample(base, one, [PROMPT], [0], QUICK) for one in (bank, read_back(concept.info, files, base))]
    return float((drawn[0] - drawn[1]).abs().max())


@pytest.mark.parametrize("formats", [("kohya", "embedding"), ("bundle",), ("diffusers", "embedding"),
                                     ("kohya", "bundle")])
def test_what_the_notes_call_the_same_is_the_same(base, make_concept, tmp_path, formats):
    exact = make_concept(base.layout, layerwise=False, size=0.3)
    assert largest_change(base, exact, tmp_path, formats) < ROUNDING


def test_what_differs_is_seen(base, make_concept, tmp_path):
    both = ("kohya", "embedding")
    layered, exact = (make_concept(base.layout, layerwise=layers, size=0.3) for layers in (True, False))
    assert largest_change(base, layered, tmp_path, both) > 10 * ROUNDING
    bound = replace(exact, info=replace(exact.info, method="bound"))
    assert largest_change(base, bound, tmp_path, both) > 10 * ROUNDING
    for formats in (("kohya",), ("embedding",)):
        assert largest_change(base, exact, tmp_path, formats) > 10 * ROUNDING


def test_without_the_words_the_class_noun_is_typed(base, make_concept, tmp_path):
    concept = make_concept(base.layout, layerwise=False)
    file = export_concept(ConceptBank(base.layout).add(concept), "rex", tmp_path, ("kohya",)).files[0]
    words = read_back(concept.info, {"kohya": file}, base)["rex"].tokens.vectors["clip_l"][0]
    encoder = base.text[0]
    assert torch.allclose(words.float(), encoder.vectors(encoder.ids("dog")).float(), atol=1e-3)


def test_the_pictures_are_side_by_side_below_their_headings():
    one, other = torch.full((3, 64, 64), -1.0), torch.full((3, 64, 64), 1.0)
    image = side_by_side([one, other], ["left", "right"], "a title", ["a note " * 60])
    scaled = [to_pil(picture).getpixel((0, 0)) for picture in (one, other)]
    y = image.height // 2
    assert [image.getpixel((image.width // 4, y)), image.getpixel((3 * image.width // 4, y))] == scaled
    assert image.width == 2 * 384 + 3 * 16 and image.height > 384 + 100
    assert side_by_side([one], ["left"], "a title", []).width == 384 + 2 * 16


def test_the_command_writes_a_picture_beside_the_files(base, make_concept, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "SampleSettings", lambda **given: SampleSettings(**given, steps=1))
    bank = ConceptBank(base.layout).add(make_concept(base.layout)).add(make_concept(base.layout, "mimi"))
    save_bank(bank, tmp_path / "bank.safetensors")
    command = ["--json", "bank", "export", str(tmp_path / "bank.safetensors"), "--output",
               str(tmp_path / "out")]
    assert main([*command, "rex", "--compare"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["comparison"] == str(tmp_path / "out" / "rex_lora_compared.png")
    with Image.open(facts["comparison"]) as picture:
        assert picture.format == "PNG" and picture.width == 816
    assert len(facts["files"]) == 2 and facts["comparison"] not in facts["files"]
    assert any(note.startswith("differs in other programs: the words have") for note in facts["notes"])
    for more in (["--all"], ["--prompt", "<rex>"]):
        assert main([*command, "--compare", *more]) == 1
        assert "--compare draws one concept, and --" in capsys.readouterr().out
