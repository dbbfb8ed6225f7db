"""What goes wrong at a person's hands ends in one sentence that names the input and says what is allowed."""

from __future__ import annotations

import math

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")
NAN = torch.full((1, 32, 32, 3), float("nan"))
ESCAPES = ["../x", "a/b", "a\\b", "", " ", "..", ".", "/etc/x", "C:x", "x\0y", "x" * 70, "con\ncept", "~x",
           ".hidden"]


@pytest.fixture
def foreign(layout, make_concept):
    """A bank of another family."""
    return ConceptBank(layout).add(make_concept(layout))


def sentence(call) -> str:
    """The one sentence of the error that `call` ends in."""
    with pytest.raises(ConceptError) as caught:
        call()
    text = str(caught.value)
    assert text and len(text) < 400 and not any(part in text for part in ("\n", "Traceback", "Error")), text
    assert caught.value.__cause__ is None
    return text


def test_a_bank_of_another_family(studio, foreign):
    for call in (lambda: studio.aggregate("<rex>", foreign), lambda: studio.regional("<rex>", [], foreign),
                 lambda: studio.regional("a dog", [studio.region("<rex>")], foreign),
                 lambda: studio.learn(bank=[foreign])):
        text = sentence(call)
        assert "another base" in text and "3 sites" in text and f"{len(studio.bank.layout)} sites" in text
    assert "different bases" in sentence(lambda: studio.pack.ConceptBankMerge.execute(studio.bank, foreign))


def test_unknown_placeholders(studio):
    region = studio.region("<rxe>")
    for call in (lambda: studio.aggregate("a photo of <rxe>", studio.bank),
                 lambda: studio.regional("<rxe>", [], studio.bank),
                 lambda: studio.regional("a dog", [region], studio.bank),
                 lambda: studio.regional("a dog", [studio.region("<rex>", negative="<rxe>")], studio.bank)):
        text = sentence(call)
        assert "<rxe>" in text and "<rex>" in text


@pytest.mark.parametrize("held", ["nothing", "empty"])
def test_placeholders_without_a_bank(studio, held):
    bank = None if held == "nothing" else ConceptBank(studio.bank.layout)
    for call in (lambda: studio.aggregate("a photo of <rex>", bank),
                 lambda: studio.regional("a photo of <rex>", [], bank),
                 lambda: studio.regional("a dog", [studio.region("<rex>")], bank)):
        text = sentence(call)
        assert "<rex>" in text and "bank" in text


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_region_prompt(studio, prompt):
    assert "prompt of a region is empty" in sentence(lambda: studio.region(prompt))


@pytest.mark.parametrize("box", [(0.5, 0.0, 0.5, 1.0), (0.8, 0.0, 0.2, 1.0), (0.0, 1.0, 1.0, 0.0),
                                 (0.0, 0.0, 1.5, 1.0)])
def test_a_box_without_area(studio, box):
    text = sentence(lambda: studio.region("<rex>", *box))
    assert "<rex>" in text and "allowed" in text


@pytest.mark.parametrize("setting", [{"start": 0.8, "end": 0.2}, {"strength": 1.5}, {"feather": 0.9}])
def test_region_settings(studio, setting):
    assert "allowed" in sentence(lambda: studio.region("<rex>", **setting))


def test_masks_of_regions(studio):
    wide = studio.region("<rex>", mask=torch.ones(1, 32, 64))
    text = sentence(lambda: studio.regional("a dog", [wide], studio.bank))
    assert "64x32" in text and "proportions" in text
    assert "2 masks" in sentence(lambda: studio.region("<rex>", mask=torch.ones(2, 32, 32)))
    assert "empty" in sentence(lambda: studio.region("<rex>", mask=torch.zeros(1, 32, 32)))
    assert "NaN" in sentence(lambda: studio.region("<rex>", mask=NAN[..., 0]))


@pytest.mark.parametrize("images, says", [
    (torch.zeros(0, 32, 32, 3), "images"), ([], "no pictures"), (NAN, "NaN"),
    (torch.zeros(1, 32, 32, 1), "allowed"),
    ([torch.rand(1, 32, 32, 3), NAN], "NaN"), (torch.zeros(1, 0, 32, 3), "images"),
    (torch.rand(32, 32, 3), "allowed")])
def test_images(studio, images, says):
    assert says in sentence(lambda: studio.learn(images=images))


def test_prior_images(studio):
    assert "prior_images" in sentence(lambda: studio.learn(prior_images=[NAN]))


def test_captions_and_masks(studio):
    assert "3 captions for 2 pictures" in sentence(lambda: studio.learn(captions=["a\nb\nc"]))
    side = studio.side
    assert "1 masks for 2 pictures" in sentence(lambda: studio.learn(masks=[torch.ones(1, side, side)]))
    text = sentence(lambda: studio.learn(masks=[torch.ones(2, side // 2, side)]))
    assert f"{side}x{side // 2}" in text and f"{side}x{side}" in text
    assert "mask" in sentence(lambda: studio.learn(masks=[torch.zeros(2, side, side)]))
    assert "mask" in sentence(lambda: studio.learn(masks=[NAN[..., 0].expand(2, -1, -1)]))
    assert "<tom>" in sentence(lambda: studio.learn(captions=["a photo of <spot> with <tom>"]))


@pytest.mark.parametrize("name", ESCAPES)
def test_names_of_concepts(studio, name):
    assert "letters, digits" in sentence(lambda: studio.learn(name=name))


@pytest.mark.parametrize("name", ESCAPES)
def test_names_of_banks(studio, name, tmp_path):
    before = {path for path in tmp_path.parent.rglob("*")}
    save = studio.pack.ConceptBankSave.execute
    assert "letters, digits" in sentence(lambda: save(studio.bank, name, False))
    told = sentence(lambda: studio.pack.ConceptBankLoad.execute(name))
    assert ("there is no bank" if name.strip() else f"bank_name is {name!r}; allowed: (new bank)") in told
    assert {path for path in tmp_path.parent.rglob("*")} - before <= {tmp_path / "concept_banks"}


def test_a_bank_outside_its_folder_is_not_read(studio, tmp_path):
    """Also through names that the folder's listing would resolve."""
    from continual_concepts.core.bank.format import save_bank

    save_bank(studio.bank, tmp_path / "secret.safetensors")
    (tmp_path / "concept_banks").mkdir()
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"),
                 "concept_banks/../../secret.safetensors"):
        assert "there is no bank" in sentence(lambda name=name: studio.pack.ConceptBankLoad.execute(name))
        assert math.isnan(studio.pack.ConceptBankLoad.fingerprint_inputs(name))      # nothing was read


def test_resolutions(studio):
    cell = studio.vae.downscale_ratio
    for resolution, allowed in ((8 * cell + 2, f"multiple of {cell}"), (4, "at least")):
        assert allowed in sentence(lambda size=resolution: studio.learn(resolution=size))


def test_a_known_name_with_other_photos(studio):
    bank = studio.learn(steps=1)
    text = sentence(lambda: studio.learn(steps=1, bank=[bank], images=1 - studio.photos()))
    assert "'spot'" in text and "learn it again" in text
    assert "'rex'" in sentence(lambda: studio.learn(steps=1, bank=[studio.bank], name="rex"))


def test_words_that_collide(studio):
    """`<rex-1>` is the first word of <rex>."""
    assert "rex-1" in sentence(lambda: studio.learn(name="rex-1", bank=[studio.bank]))


@pytest.mark.parametrize("wrong, names", [
    ({"bank": None}, "holds no concept 'rex'"), ({"name": "tim"}, "holds no concept 'tim'"),
    ({"noun": "cat"}, "class noun of concept 'rex'"), ({"kind": "style"}, "kind of concept 'rex'"),
    ({"method": "lora"}, "method of concept 'rex'")])
def test_what_cannot_be_refined(studio, wrong, names):
    given = {"name": "rex", "noun": studio.bank.infos["rex"].class_noun, "method": "cidm",
             "bank": [studio.bank], **wrong}
    assert names in sentence(lambda: studio.learn(steps=1, if_known="refine it", **given))


@pytest.mark.parametrize("noun", ["", "  "])
def test_no_class_noun(studio, noun):
    assert "class noun" in sentence(lambda: studio.learn(noun=noun))


@pytest.mark.parametrize("wrong, names", [
    ({"method": "cidn"}, "cidm"), ({"kind": "thing"}, "object"), ({"method_settings": [{"rnk": 2}]}, "rank"),
    ({"training_settings": [{"precision": "int8"}]}, "bfloat16"),
    ({"training_settings": [{"rank": 4}]}, "Concept Training Settings"),
    ({"if_known": "maybe"}, "keep it")])
def test_settings(studio, wrong, names):
    assert names in sentence(lambda: studio.learn(**wrong))


def test_modes(studio):
    assert "sharp" in sentence(lambda: studio.aggregate("<rex>", studio.bank, mode="blunt"))
    text = sentence(lambda: studio.aggregate("<rex>", studio.bank, mode="one concept", concept="tom"))
    assert "'tom'" in text and "rex" in text
    assert "concept" in sentence(lambda: studio.aggregate("<rex>", studio.bank, mode="one concept"))
    assert "literal" in sentence(lambda: studio.regional("a dog", [studio.region("<rex>")], studio.bank,
                                                         region_noise=True, outside="x"))


def test_models_without_cross_attention(studio):
    """A transformer model, or a CLIP of another family."""
    from types import SimpleNamespace

    other = SimpleNamespace(diffusion_model=torch.nn.Identity(), model_config=SimpleNamespace(unet_config={}))
    model = SimpleNamespace(model=other)
    text = sentence(lambda: studio.aggregate("<rex>", studio.bank, model=model))
    assert "allowed" in text and "SDXL" in text
    clip = SimpleNamespace(cond_stage_model=torch.nn.Identity(), tokenizer=None)
    assert "allowed" in sentence(lambda: studio.aggregate("<rex>", studio.bank, clip=clip))


def test_banks_and_nothing(studio):
    pack = studio.pack
    assert "no bank" in sentence(lambda: pack.ConceptBankSave.execute(None, "x", False))
    assert "no concept" in sentence(lambda: pack.ConceptBankEdit.execute(None, "remove", "rex"))
    edit = pack.ConceptBankEdit.execute
    other = studio.bank.remove("rex").rename("mimi", "rex")
    assert "letters, digits" in sentence(lambda: edit(studio.bank, "rename", "rex", "../x"))
    assert "both banks hold" in sentence(lambda: pack.ConceptBankMerge.execute(studio.bank, other))
    pack.ConceptBankSave.execute(studio.bank, "pets", False)
    assert "lacks" in sentence(lambda: pack.ConceptBankSave.execute(studio.bank.remove("rex"), "pets", False))


def test_a_damaged_bank_file(studio, tmp_path):
    studio.pack.ConceptBankSave.execute(studio.bank, "pets", False)
    file = tmp_path / "concept_banks" / "pets.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "pets" in sentence_of_a_file(lambda: studio.pack.ConceptBankLoad.execute("pets.safetensors"))


def sentence_of_a_file(call) -> str:
    """As `sentence`; what a library said about the file may stand behind it."""
    with pytest.raises(ConceptError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_corrupt_photo_among_others(studio):
    from PIL import Image

    folder = studio.pack.folder / "input" / "photos"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    assert len(studio.pack.ConceptPhotosLoad.execute("photos")[0]) == 1
    (folder / "b.png").write_bytes(b"no picture")
    assert "b.png" in sentence_of_a_file(lambda: studio.pack.ConceptPhotosLoad.execute("photos"))
    for name, reason in (("../output", "is not the name of a folder inside"), ("", "folder is ''; allowed"),
                         ("/etc", "is not the name of a folder inside"), ("other", "there is no folder")):
        assert reason in sentence(lambda name=name: studio.pack.ConceptPhotosLoad.execute(name))


def test_a_vae_of_another_model(studio, monkeypatch):
    """It once failed with the shapes of two matrices, within the model."""
    encode = studio.vae.encode
    monkeypatch.setattr(studio.vae, "encode", lambda pixels: encode(pixels)[:, :3])
    text = sentence(lambda: studio.learn(steps=1, name="vae"))
    assert f"the VAE gives latents of 3 channels, and the model reads {studio.channels}" in text
