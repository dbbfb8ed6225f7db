"""`bank list` and `bank show`: what is said of likeness and collisions, as text and as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.concepts import Provenance
from continual_concepts.core.bank.format import save_bank
from continual_concepts.core.cli.parser import main
from continual_concepts.core.cli.shown import day


@pytest.fixture
def file(tmp_path, layout, make_concept):
    """Two dogs that are summed, from the same photos, and a bound one."""
    bank = ConceptBank(layout)
    for i, (name, method, photos) in enumerate([("rex", "lora_m", ("a", "b")), ("fido", "lora_m", ("a", "b")),
                                                ("spot", "bound", ("c",))]):
        made = make_concept(layout, name, i, method=method)
        info = replace(made.info, provenance=replace(made.info.provenance, images=photos))
        bank = bank.add(replace(made, info=info))
    save_bank(bank, tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


def said(capsys, *arguments) -> str:
    assert main([str(one) for one in arguments]) == 0
    return capsys.readouterr().out


def test_list_warns_from_the_headers_alone(file, capsys):
    lines = said(capsys, "bank", "list", file).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["<rex>", "<fido>", "<spot>"]
    assert lines[3].startswith("warning: <rex> and <fido> collide: they were learned from the same photos")
    assert "share the class noun 'dog'" in lines[4] and len(lines) == 5
    told = json.loads(said(capsys, "--json", "bank", "list", file))
    assert [one["name"] for one in told["concepts"]] == ["rex", "fido", "spot"] and len(told["warnings"]) == 2
    assert told["collisions"][0]["kind"] == "photos"


def test_show_says_what_a_concept_is_most_like(file, capsys):
    told = json.loads(said(capsys, "--json", "bank", "show", file, "rex"))
    assert told["composes"] == "summed" and told["collides_with"] == ["fido"]
    assert "same photos" in told["warnings"][0]
    assert set(told["most_like"]) == {"deltas", "words"}
    assert told["most_like"]["deltas"]["name"] in ("fido", "spot")
    shown = said(capsys, "bank", "show", file, "spot")
    assert re.search(r"^most like: <(rex|fido)> by deltas, cosine -?\d\.\d\d; <", shown, re.M)
    assert json.loads(said(capsys, "--json", "bank", "show", file, "spot"))["warnings"] == []


def test_show_survives_another_damaged_concept(file, capsys):
    data = bytearray(file.read_bytes())
    data[-40:] = b"\xff" * 40      # NaN in any floating type
    file.write_bytes(bytes(data))
    shown = [main(["bank", "show", str(file), name]) for name in ("rex", "fido", "spot")]
    assert shown.count(1) == 1 and shown.count(0) == 2
    assert "cannot be read" in capsys.readouterr().err


ORIGIN = Provenance(
    base="5d93334b4db8cb2a", images=("a", "b"), date="2026-11-29T18:19:26+02:00", steps=110, seconds=53.8,
    settings={"method": {"rank": 4, "layerwise": True}, "training": {"schedule": "cosine", "flip": False}},
    versions={"torch": "2.14.1"}, captions=("a photo of <> in the snow",), variant_of="rover",
    refined=({"date": "2026-11-28T08:00:00+00:00", "steps": 1, "seconds": 2.0, "photos": 1},))


def test_show_tells_in_plain_words_where_a_concept_comes_from(tmp_path, layout, make_concept, capsys):
    made = make_concept(layout, "rex", 1, method="bound")
    made = replace(made, info=replace(made.info, provenance=ORIGIN))
    file = tmp_path / "bank.safetensors"
    save_bank(ConceptBank(layout).add(made), file)
    shown = said(capsys, "bank", "show", file, "rex")
    assert not set("{}[]\"") & set(shown)      # nothing of JSON
    lines = shown.splitlines()
    assert lines[0] == "name: rex"
    for line in ("learned: from 2 photos, 110 steps, 54 s, finished 2026-11-29 16:19 UTC",
                 "earlier run: from 1 photo, 1 step, 2 s, finished 2026-11-28 08:00 UTC",
                 "variant of: <rover>", "method: bound", "settings of the method: layerwise on, rank 4",
                 "settings of learning: flip off, schedule cosine", "made with: torch 2.14.1",
                 "caption: a photo of <rex> in the snow"):
        assert line in lines
    assert any(line.startswith("base: ") and line.endswith("its weights 5d93334b4db8cb2a") for line in lines)
    told = json.loads(said(capsys, "--json", "bank", "show", file, "rex"))
    assert told["provenance"] == made.info.to_json()["provenance"] | {
        "images": ["a", "b"], "captions": list(ORIGIN.captions), "refined": [dict(ORIGIN.refined[0])]}
    assert "2 photos  2026-11-29 16:19 UTC, variant of <rover>" in said(capsys, "bank", "list", file)


@pytest.mark.parametrize("date", ["", "yesterday", "0001-01-01T00:00:00+14:00"])
def test_a_text_that_is_no_date_stays_as_it_is(date):
    assert day(date) == date


def test_show_takes_any_settings_of_a_strange_file(tmp_path, layout, make_concept, capsys):
    """An importer stores other settings than a trainer; a file of others may hold anything."""
    made = make_concept(layout, "rex", 1, method="bound")
    file = tmp_path / "bank.safetensors"
    for settings in ({"files": ["a.safetensors", "b.pt"]}, {"files": {"x": 1}}, {"method": [1, None]}):
        origin = Provenance(settings=settings, refined=({"photos": "many", "steps": "x", "date": 3},))
        save_bank(ConceptBank(layout).add(replace(made, info=replace(made.info, provenance=origin))), file)
        shown = said(capsys, "bank", "show", file)
        assert ("imported from: a.safetensors b.pt" in shown) == isinstance(settings.get("files"), list)
        assert "learned:" not in shown and "earlier run:" not in shown
