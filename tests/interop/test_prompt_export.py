"""Exports for a prompt and of a whole bank, and words with one copy re-fitted to layer copies."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import save_bank
from continual_concepts.core.bank.prompts import Vocabulary
from continual_concepts.core.cli.parser import main
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import MODES, aggregate
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.demo.bases import FILES
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.interop.embedding import embedding_state
from continual_concepts.core.interop.export import export_bank, export_concept
from continual_concepts.core.interop.factors import low_rank_sum
from continual_concepts.core.interop.kohya import module_name
from continual_concepts.core.interop.prompt_export import export_prompt
from continual_concepts.core.interop.refit import refit
from continual_concepts.core.model.deltas import LowRankDelta, SparseDelta
from continual_concepts.tests.comparing import distance

HALF = 1.5e-3       # factors rounded to fp16
BOTH = "a photo of <rex> and <mimi>"


def dense(state, layout, key) -> torch.Tensor:
    name = module_name(layout, key)
    up, down = state[f"{name}.lora_up.weight"].float(), state[f"{name}.lora_down.weight"].float()
    return state[f"{name}.alpha"].item() / down.shape[0] * up @ down


def sparse(a: int, b: int, count: int) -> SparseDelta:
    g = torch.Generator().manual_seed(0)
    return SparseDelta((a, b), torch.randperm(a * b, generator=g)[:count].int(),
                       torch.randn(count, generator=g))


def bank_on(layout, make_concept, *methods: str) -> ConceptBank:
    bank = ConceptBank(layout)
    for i, (name, method) in enumerate(zip(("rex", "mimi", "tom"), methods, strict=False)):
        bank = bank.add(make_concept(layout, name, seed=i, method=method, size=0.3))
    return bank


@pytest.fixture
def bank(tiny_backbone, make_concept):
    return bank_on(tiny_backbone.layout, make_concept, "cidm", "cidm", "cidm")


@pytest.mark.parametrize("mode", MODES)
def test_the_lora_holds_what_the_bank_gives_for_the_prompt(tiny_backbone, bank, tmp_path, mode):
    done = export_prompt(bank, BOTH, tmp_path, mode=mode, strength=0.7, backbone=tiny_backbone)
    assert [file.stem for file in done.files] == ["prompt_rex_mimi_lora", "rex", "mimi"]
    state = load_file(done.files[0])
    deltas = aggregate(tiny_backbone, bank, bank.parse(BOTH), mode, 0.7).deltas
    assert len(state) == 3 * len(deltas)
    assert all(distance(dense(state, bank.layout, key), delta.dense()) < HALF
               for key, delta in deltas.items())
    for file, name in zip(done.files[1:], ("rex", "mimi"), strict=True):
        assert torch.equal(load_file(file)["emb_params"], embedding_state(bank[name].tokens)["emb_params"])
    assert any("computes new weights" in note for note in done.notes) == (mode != "sharp")
    assert "in ComfyUI the prompt is then: a photo of embedding:rex and embedding:mimi" in done.notes
    assert any(note.startswith("<mimi>: the words have 7 layer copies") for note in done.notes)


def test_sharp_and_equal_need_no_base_and_the_others_say_so(bank, tmp_path):
    for mode in ("sharp", "equal"):
        export_prompt(bank, BOTH, tmp_path, ["diffusers"], mode)
    for mode, sentence in (("paper", "allowed without a base: sharp, equal"),
                           ("blunt", "allowed: sharp, paper")):
        with pytest.raises(ConceptError, match=sentence):
            export_prompt(bank, BOTH, tmp_path / "none", mode=mode)
    with pytest.raises(ConceptError, match="give a base"):
        export_prompt(bank, BOTH, tmp_path / "none", refit=True)
    assert not (tmp_path / "none").exists()


def test_bound_concepts_are_in_it_and_the_notes_say_what_is_lost(layout, make_concept, tmp_path):
    bank = bank_on(layout, make_concept, "bound", "finetune", "lora_m")
    done = export_prompt(bank, "a <rex> in a meadow", tmp_path)
    text = "\n".join(done.notes)
    assert "<rex>: in the bank each acts through its own words alone" in text
    assert "<mimi>" in text and "always on, whatever the prompt says" in text
    state = load_file(done.files[0])
    wanted = sum(bank[name].deltas[0, "to_k"].dense() for name in bank.names)
    assert distance(dense(state, layout, (0, "to_k")), wanted) < HALF


def test_prompts_that_name_nothing_are_refused(bank, tmp_path):
    for formats in (("kohya",), ("embedding",)):
        with pytest.raises(ConceptError, match="names no concept of the bank.*<rex>"):
            export_prompt(bank, "a photo of a dog", tmp_path / "none", formats)
    with pytest.raises(ConceptError, match="did you mean <mimi>"):
        export_prompt(bank, "a <mimy>", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_all_files_of_a_prompt_share_a_counter_and_words_go_to_their_folder(bank, tmp_path):
    words = tmp_path / "embeddings"
    words.mkdir()
    (words / "mimi.safetensors").write_bytes(b"somebody's")
    done = export_prompt(bank, BOTH, tmp_path / "loras", words_folder=words)
    names = [f"{file.parent.name}/{file.stem}" for file in done.files]
    assert names == ["loras/prompt_rex_mimi_lora_00002", "embeddings/rex_00002", "embeddings/mimi_00002"]
    assert (words / "mimi.safetensors").read_bytes() == b"somebody's"
    assert any("embedding:mimi_00002" in note for note in done.notes)
    assert len(list(words.iterdir())) == 3 and len(list((tmp_path / "loras").iterdir())) == 1


def test_a_bundle_holds_the_words_of_all_and_metadata_tell_the_prompt(layout, make_concept, tmp_path):
    thumbnail = b"\xff\xd8\xff" + b"0" * 9
    bank = bank_on(layout, make_concept, "cidm", "cidm")
    bank = bank.replace(replace(bank["rex"], thumbnail=thumbnail))
    bank = bank.replace(replace(bank["mimi"], thumbnail=thumbnail + b"1"))
    done = export_prompt(bank, BOTH, tmp_path, ["bundle"])
    names = {key.split(".")[1] for key in load_file(done.files[0]) if key.startswith("bundle_emb.")}
    facts = safe_open(str(done.files[0]), framework="pt").metadata()
    assert names == {"rex", "mimi"}
    assert facts["modelspec.trigger_phrase"] == BOTH and "mode sharp" in facts["modelspec.description"]
    assert len(json.loads(facts["ssmd_cover_images"])) == 2 and json.loads(facts["ss_tag_frequency"]) == {
        "prompt_rex_mimi": {"rex": 1, "mimi": 1}}


def test_many_names_make_no_endless_file_name(layout, make_concept, tmp_path):
    bank = ConceptBank(layout)
    for i in range(12):
        bank = bank.add(make_concept(layout, f"concept{i:02d}", seed=i))
    done = export_prompt(bank, " ".join(f"<{name}>" for name in bank.names), tmp_path, ["kohya"])
    assert done.files[0].stem == "prompt_concept00_concept01_concept02_concept03_and_8_more_lora"


def test_names_that_would_be_one_file_stay_two(layout, make_concept, tmp_path):
    bank = ConceptBank(layout)
    for name in ("Rex", "rex", "con", "con_concept"):
        bank = bank.add(make_concept(layout, name))
    done = export_prompt(bank, "<Rex> <rex> <con> <con_concept>", tmp_path, ["embedding"])
    assert [file.stem for file in done.files] == ["Rex", "rex-2", "con_concept", "con_concept-2"]


def test_sums_are_exact_and_no_wider_than_the_weight_unless_a_rank_is_asked_for():
    g = torch.Generator().manual_seed(1)
    parts = {(0,
              "to_k"): [(w,
                         LowRankDelta(torch.randn(12, 3, generator=g), torch.randn(3, 10, generator=g), 0.5))
                           for w in (1.0, 0.5, -2.0, 0.1)]}
    wanted = sum(weight * delta.dense() for weight, delta in parts[0, "to_k"])
    three = low_rank_sum({(0, "to_k"): parts[0, "to_k"][:3]}, "the prompt").deltas[0, "to_k"]
    whole = low_rank_sum(parts, "the prompt")
    assert three.down.shape[0] == 9 and whole.deltas[0, "to_k"].down.shape[0] == 10 and whole.error is None
    assert distance(whole.deltas[0, "to_k"].dense(), wanted) < 1e-5
    cut = low_rank_sum(parts, "the prompt", rank=5, max_error=0.9)
    assert cut.deltas[0, "to_k"].down.shape[0] == 5
    assert 0 < cut.error == pytest.approx(distance(cut.deltas[0, "to_k"].dense(), wanted), rel=1e-3)
    with pytest.raises(ConceptError,
                       match=r"the prompt has deltas of which rank 1 loses .* which rank \d+ keeps"):
        low_rank_sum(parts, "the prompt", rank=1)
    narrow = {(0,
               "to_k"): [(1.0,
                          LowRankDelta(torch.randn(60, 4, generator=g), torch.randn(4, 50, generator=g)))]}
    # by QR: four columns are fewer than fifty
    held = low_rank_sum(narrow, "the prompt", rank=2, max_error=0.99)
    whole = narrow[0, "to_k"][0][1].dense()
    assert held.error == pytest.approx(distance(held.deltas[0, "to_k"].dense(), whole), rel=1e-3)


def test_sparse_parts_are_cut_and_low_rank_ones_beside_them_are_not():
    g = torch.Generator().manual_seed(1)
    exact, rest = LowRankDelta(torch.randn(12, 3, generator=g),
                               torch.randn(3, 10, generator=g)), sparse(12, 10, 30)
    found = low_rank_sum({(0, "to_k"): [(1.0, exact), (0.5, rest)], (1, "to_k"): [(1.0, exact)]},
                         "the prompt")
    whole = exact.dense() + 0.5 * rest.dense()
    assert found.error < 1e-5 and distance(found.deltas[0, "to_k"].dense(), whole) < 1e-5
    assert torch.equal(found.deltas[1, "to_k"].down, exact.down)
    with pytest.raises(ConceptError, match="changes no weights"):
        low_rank_sum({(0, "to_k"): [(0.0, exact), (0.0, exact), (0.0, exact), (0.0, exact)]}, "the prompt")


def test_a_whole_bank_is_exported_but_for_what_cannot_be(layout, make_concept, tmp_path):
    bank = bank_on(layout, make_concept, "cidm", "cidm")
    wide = replace(make_concept(layout, "tom"), deltas={(2, "to_q"): sparse(8, 8, 60)})
    done = export_bank(bank.add(wide), tmp_path, rank=1)
    assert [file.stem for file in done.files] == ["rex_lora", "rex", "mimi_lora", "mimi"]
    assert len(list(tmp_path.iterdir())) == 4
    left = [note for note in done.notes if "was left out" in note]
    reason = "concept 'tom' has sparse deltas of which rank 1 loses"
    assert len(left) == 1 and left[0].startswith(f"<tom> was left out: {reason}")
    with pytest.raises(ConceptError, match="none of the 1 concepts.*rank 1"):
        export_bank(ConceptBank(layout).add(wide), tmp_path, rank=1)
    with pytest.raises(ConceptError, match="holds no concept"):
        export_bank(ConceptBank(layout), tmp_path)
    with pytest.raises(ConceptError, match="strength is 0"):
        export_bank(bank, tmp_path, strength=0)


@pytest.fixture(scope="module")
def base():
    return load_base(FILES["embedded-64"])


STEPS = 10      # of fitting, for tests of all but the quality


@pytest.fixture
def short_fit(monkeypatch):
    monkeypatch.setattr("continual_concepts.core.interop.refit.refit", partial(refit, steps=STEPS))


def states(base, concept, tokens, prompts):
    context = encode_prompts(base, Vocabulary([concept.info]).parse_all(prompts), {concept.name: tokens})
    return torch.stack([row[:, list(words["rex"])]
                        for row, words in zip(context.hidden, context.words, strict=True)])


def test_a_refitted_copy_is_read_more_like_the_layer_copies_than_their_mean(base, make_concept):
    concept = make_concept(base.layout, size=0.1)
    found = refit(base, concept)
    assert found.floor < found.fitted < found.mean and found.tokens.copies == 1
    with torch.no_grad():
        prompts = ["a photo of a <rex> in the snow", "a drawing of <rex>"]      # none that it was fitted to
        copies = states(base, concept, concept.tokens, prompts)
        mean, fitted = (((states(base, concept, tokens, prompts) - copies).norm() / copies.norm()).item()
                        for tokens in (concept.tokens.mean_copy(), found.tokens))
    assert fitted < mean


def test_refitting_is_told_in_the_notes_and_leaves_single_copies_alone(base, make_concept, tmp_path,
                                                                       short_fit):
    layered = make_concept(base.layout, size=0.1)
    bank = ConceptBank(base.layout).add(layered).add(make_concept(base.layout, "mimi", layerwise=False))
    done = export_concept(bank, "rex", tmp_path, ["embedding"], refit=base)
    found = refit(base, layered, STEPS)
    # fitting again gives the same
    assert torch.equal(load_file(done.files[0])["emb_params"], found.tokens.vectors["clip_l"][0])
    assert any("re-fitted" in note and f"{found.mean:.3f}" in note for note in done.notes)
    single = export_concept(bank, "mimi", tmp_path, ["embedding"], refit=base)
    assert torch.equal(load_file(single.files[0])["emb_params"],
                       bank["mimi"].tokens.vectors["clip_l"][0].float())


def test_two_text_encoders_are_refitted_together(tiny_sdxl, make_concept):
    with torch.inference_mode():        # as ComfyUI runs nodes
        found = refit(tiny_sdxl, make_concept(tiny_sdxl.layout, size=0.3))
    assert found.fitted < found.mean and set(found.tokens.vectors) == {"clip_l", "clip_g"}


def test_the_command_exports_prompts_whole_banks_and_refitted_words(base, make_concept, tmp_path, capsys,
                                                                    short_fit, quick_commands):
    file, out = tmp_path / "bank.safetensors", tmp_path / "out"
    save_bank(bank_on(base.layout, make_concept, "cidm", "cidm"), file)
    command = ["bank", "export", str(file), "--output", str(out)]
    assert main([*command, "--all", "--format", "kohya"]) == 0
    assert sorted(path.stem for path in out.iterdir()) == ["mimi_lora", "rex_lora"]
    assert main(["--json", *command, "--prompt", BOTH, "--mode", "paper", "--refit"]) == 0
    printed = capsys.readouterr().out
    facts = json.loads(printed[printed.index("{"):])
    assert facts["mode"] == "paper" and len(facts["files"]) == 3
    assert any("re-fitted" in note for note in facts["notes"])
    for wrong, sentence in (([], "nothing to export"), (["rex", "--all"], "a name and --all"),
                            (["rex", "--mode", "equal"], "with --prompt")):
        assert main([*command, *wrong]) == 1 and sentence in capsys.readouterr().err
    assert main([*command, "--format", "embedding", "rex"]) == 0      # the name behind the options
    for wrong in (["rex", "mimi"], ["--nonsense"]):
        with pytest.raises(SystemExit):
            main([*command, *wrong])
