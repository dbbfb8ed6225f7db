"""Import Concept: the imported concept does what a LoRA and its words do in stock nodes."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.interop.export import export_concept

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
PROMPT, CONCEPT = "a photo of {} in a meadow", "blueprint"      # the concept with a single copy


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def files(studio, tmp_path_factory):
    """A LoRA and an embedding in ComfyUI's folders."""
    import folder_paths

    folder = tmp_path_factory.mktemp("models")
    for kind in ("loras", "embeddings"):
        folder_paths.add_model_folder_path(kind, str(folder))
    return [file.name for file in export_concept(studio.bank, CONCEPT, folder, ["kohya", "embedding"]).files]


@pytest.fixture(scope="module")
def clip(comfyui, files):
    import folder_paths

    from continual_concepts.core.comfy.demo import load_demo

    with torch.inference_mode():
        return load_demo(folder_paths.get_folder_paths("embeddings"), "embedded-64")[1]


def import_of(studio, **other):
    inputs = {"model": studio.model, "clip": studio.clip, "lora": "(none)", "embedding": "(none)",
              "name": "mine", "class_noun": "drawing",
              "kind": "style", "trigger": ""} | other
    return studio.pack.ConceptImport.execute(**inputs)


def test_it_draws_what_the_stock_nodes_draw(studio, files, clip):
    import folder_paths

    lora, words = files
    bank, notes = import_of(studio, lora=lora, embedding=words).args[:2]
    model, _, positive = studio.aggregate(PROMPT.format("<mine>"), bank)
    ours = studio.ksampler(model, positive, "")
    loader = studio.stock.LoraLoader()
    assert lora in folder_paths.get_filename_list("loras")
    their_model, their_clip = loader.load_lora(studio.model, clip, lora, 1.0, 1.0)
    theirs = studio.ksampler(their_model, studio.encode(their_clip, PROMPT.format("embedding:blueprint")), "")
    plain = studio.ksampler(studio.model, PROMPT.format("a drawing"), "")
    assert distance(ours, theirs) < 1e-3 < 1e-1 < distance(ours, plain)
    assert "100 % of what the LoRA changes" in notes


def test_a_trigger_and_a_bank_that_grows(studio, files):
    lora = files[0]
    bank = import_of(studio, lora=lora, trigger="blue drawing", name="<again>", bank=studio.bank).args[0]
    assert bank.names == [*studio.bank.names, "again"] and "again" not in studio.bank
    twice = import_of(studio, lora=lora, trigger="blue drawing", name="<again>", bank=bank).args
    assert twice[0].names == bank.names and "nothing to import: the bank holds this <again>" in twice[1]
    with pytest.raises(ConceptError, match="already holds a concept 'again'"):
        import_of(studio, lora=lora, trigger="red drawing", name="<again>", bank=bank)
    model, _, positive = studio.aggregate("a <again> of a car", bank)
    loader = studio.stock.LoraLoader()
    their_model = loader.load_lora(studio.model, studio.clip, lora, 1.0, 0.0)[0]
    theirs = studio.ksampler(their_model, "a blue drawing of a car", "")
    assert distance(studio.ksampler(model, positive, ""), theirs) < 5e-3      # words in fp16


@pytest.mark.parametrize(("change", "sentence"), [
    ({"lora": "../../etc/passwd"}, "there is no file"), ({"lora": "gone.safetensors"}, "there is no file"),
    ({}, "nothing to import"),
    ({"embedding": "blueprint.safetensors", "name": "a/b"}, "is not allowed"),
])
def test_bad_requests(studio, files, change, sentence):
    with pytest.raises(ConceptError, match=sentence):
        import_of(studio, **change)
