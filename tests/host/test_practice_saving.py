"""Row G7: nodes of ComfyUI that save or merge a MODEL or a CLIP with concepts."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.composition import Composition, Kind

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")
PROMPT = "a photo of <rex>"


@pytest.fixture
def stock(comfyui):
    """ComfyUI's nodes of merging and saving."""
    from comfy_extras import nodes_model_merging

    return nodes_model_merging


@pytest.fixture
def word_bound(studio, make_concept):
    """A bank with the word-bound concept <spot>."""
    from dataclasses import replace

    concept = make_concept(studio.bank.layout, "spot", seed=5, size=0.3)
    info = replace(concept.info, method="bound", composition=Composition(Kind.WORDS))
    return ConceptBank(studio.bank.layout).add(replace(concept, info=info))


@pytest.fixture
def told(caplog):
    """told(call): the sentences that `call` writes to the log."""
    def run(call) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            call()
        return [record.getMessage() for record in caplog.records
                if record.getMessage().startswith("Continual Concepts: ")]

    return run


def saves_models(stock) -> bool:
    from comfy.model_patcher import ModelPatcher

    return hasattr(ModelPatcher, "state_dict_for_saving")


def first_key(studio) -> str:
    """The name of a projection that concepts change."""
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    sites = ComfyBackbone(studio.model, studio.clip).sites
    return sites.key(sites.layout.sites[0], "to_v")


def saved(folder, studio) -> torch.Tensor:
    """That projection's weight in the file that was saved."""
    (file,) = folder.rglob("*.safetensors")
    ending = first_key(studio).removeprefix("diffusion_model.")
    (weight,) = (tensor for name, tensor in load_file(file).items() if name.endswith(ending))
    return weight.float()


@pytest.fixture
def base_weight(studio):
    """That projection's weight without patches of an earlier test."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    return studio.model.model.state_dict()[first_key(studio)].clone().float()


def test_g7_a_saved_model_lacks_word_bound_concepts_and_says_so(studio, stock, word_bound, told, own_folder,
                                                                 base_weight):
    if not saves_models(stock):
        pytest.skip("this ComfyUI saves weights without asking the MODEL")
    model, _, _ = studio.aggregate("a photo of <spot>", word_bound)
    lines = told(lambda: stock.ModelSave().save(model, "x"))
    assert len(lines) == 1 and "does not hold <spot>" in lines[0] and "keep the bank" in lines[0]
    assert torch.allclose(saved(own_folder, studio), base_weight, atol=1e-3)


def test_g7_a_saved_model_holds_folded_concepts_and_says_which(studio, stock, told, own_folder,
                                                                 base_weight):
    if not saves_models(stock):
        pytest.skip("this ComfyUI saves weights without asking the MODEL")
    model, _, _ = studio.aggregate(PROMPT, studio.bank)
    lines = told(lambda: stock.ModelSave().save(model, "x"))
    assert len(lines) == 1 and "holds the weights of <rex>" in lines[0] and "<mimi>" not in lines[0]
    delta = studio.bank["rex"].deltas[(0, "to_v")].dense().float()
    assert delta.abs().max() > 0.05
    assert torch.allclose(saved(own_folder, studio), base_weight + delta, atol=5e-3)


def test_g7_saving_a_checkpoint_tells_of_both(studio, stock, word_bound, told, own_folder):
    model, clip, _ = studio.aggregate("a photo of <spot>", word_bound)
    lines = told(lambda: stock.CheckpointSave().save(model, clip, studio.vae, "x"))
    assert any("the saved CLIP does not hold the words of <spot>" in line for line in lines)
    assert len(lines) == 1 + saves_models(stock)


def test_g7_saving_a_clip_tells_that_words_stay_behind(studio, stock, told, own_folder):
    _, clip, _ = studio.aggregate(PROMPT, studio.bank)
    lines = told(lambda: stock.CLIPSave().save(clip, "x"))
    assert len(lines) == 1 and "words of <rex>, <mimi>, <blueprint>" in lines[0]
    lines = told(lambda: stock.CLIPSave().save(clip.clone(), "x"))      # also behind CLIP Set Last Layer
    assert len(lines) == 1


@pytest.mark.parametrize("is_first", [True, False])
def test_g7_merging_at_a_half_halves_folded_concepts(studio, stock, told, is_first):
    text = "<blueprint> of a dog"      # its words have one copy, which needs nothing of the MODEL
    model, _, prompt = studio.aggregate(text, studio.bank)
    half, _, _ = studio.aggregate(text, studio.bank, strength=0.5)
    pair = (model, studio.model) if is_first else (studio.model, model)
    merged = []
    assert not told(lambda: merged.append(stock.ModelMergeSimple().merge(*pair, 0.5)[0]))
    pictures = [studio.ksampler(one, prompt, prompt, steps=1) for one in (merged[0], half, model)]
    assert torch.allclose(pictures[0], pictures[1], atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-2)


def test_g7_merging_word_bound_concepts_is_told(studio, stock, word_bound, told):
    model, _, _ = studio.aggregate("a photo of <spot>", word_bound)
    lines = told(lambda: stock.ModelMergeSimple().merge(studio.model, model, 0.5))
    assert len(lines) == 1 and "does not hold <spot>" in lines[0]
    lines = told(lambda: stock.ModelMergeSimple().merge(model, studio.model, 0.5))
    assert len(lines) == 1 and "does not scale <spot>" in lines[0]
    lines = told(lambda: stock.ModelMergeBlocks().merge(model, studio.model, input=0.5, middle=0.2, out=1.0))
    assert len(lines) == 1


def test_g7_sibling_merging_clips_is_told(studio, stock, told):
    _, clip, _ = studio.aggregate(PROMPT, studio.bank)
    lines = told(lambda: stock.CLIPMergeSimple().merge(studio.clip, clip, 0.5))
    assert len(lines) == 1 and "does not hold the words of <rex>" in lines[0]
    assert not told(lambda: stock.CLIPMergeSimple().merge(clip, studio.clip, 0.5))      # keeps its words


def test_g7_sibling_two_banks_are_told_together(studio, stock, word_bound, told):
    if not saves_models(stock):
        pytest.skip("this ComfyUI saves weights without asking the MODEL")
    model, clip, _ = studio.aggregate("a photo of <spot>", word_bound)
    model, clip, _ = studio.aggregate(PROMPT, studio.bank, model=model, clip=clip)
    (line,) = told(lambda: stock.ModelSave().save(model, "x"))
    assert "holds the weights of <rex>" in line and "not <spot>" in line
    (line,) = told(lambda: stock.CLIPSave().save(clip, "x"))
    assert "<spot>" in line and "<mimi>" in line


def test_g7_sibling_loras_and_plain_models_tell_nothing(studio, stock, word_bound, told, own_folder):
    model, clip, prompt = studio.aggregate("a photo of <spot>", word_bound)
    key = first_key(studio)
    patch = {key: ("diff", (torch.zeros_like(studio.model.model.state_dict()[key]),))}

    def work() -> None:
        clone = model.clone()
        clone.add_patches(patch, 0.7)
        studio.ksampler(clone, prompt, prompt)
        stock.ModelSave().save(studio.model, "x")
        stock.CLIPSave().save(studio.clip, "x")

    assert not told(work)
    assert not hasattr(studio.model, "held") and not hasattr(studio.clip, "held")
    empty = studio.aggregate("a dog", ConceptBank(studio.bank.layout))
    assert empty[0] is studio.model and empty[1] is studio.clip


def test_g7_the_sentence_is_shown_on_the_node_that_runs(pack, monkeypatch):
    from comfy_execution.utils import CurrentNodeContext

    from continual_concepts.nodes import progress

    shown = []
    monkeypatch.setattr(progress, "_send", lambda node, text, by: shown.append((node, text)))
    with CurrentNodeContext("a run of its own", "7"):
        progress.tell("one sentence")
    progress.tell("another, without a run")
    assert shown == [("7", "one sentence")]
