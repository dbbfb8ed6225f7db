"""LoRA and embedding files of other programs become concepts with the same effect; losses are reported."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.cli.parser import main
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import aggregate
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.interop.embedding_file import LARGEST_EMBEDDING, read_embedding
from continual_concepts.core.interop.export import export_concept
from continual_concepts.core.interop.importing import import_concept, imported
from continual_concepts.core.interop.lora_deltas import lora_deltas
from continual_concepts.core.interop.lora_file import LoraFile, read_lora
from continual_concepts.core.interop.lora_names import part_of, site_names
from continual_concepts.core.model.sites import PROJECTIONS, Site, SiteLayout
from continual_concepts.tests.comparing import distance

HALF = 2e-3     # factors rounded to fp16, twice


@pytest.fixture(scope="module")
def bank(tiny_backbone, make_concept):
    layout = tiny_backbone.layout
    return ConceptBank(layout).add(make_concept(layout, "rex", 1, size=0.1, layerwise=False))


def same_deltas(one, two) -> bool:
    return one.keys() == two.keys() and all(distance(one[key].dense(), two[key].dense()) < HALF
                                            for key in one)


@pytest.mark.parametrize("formats", [("kohya", "embedding"), ("diffusers", "embedding"), ("bundle",)])
def test_what_was_exported_comes_back(bank, tmp_path, formats):
    files = export_concept(bank, "rex", tmp_path, formats).files
    found = import_concept("dog1", "dog", "object", bank.layout, lora=files[0],
                           embedding=files[1] if len(files) > 1 else None)
    assert same_deltas(found.concept.deltas, bank["rex"].deltas)
    vectors = found.concept.tokens.vectors["clip_l"]
    own = bank["rex"].tokens.vectors["clip_l"]
    assert vectors.shape == own.shape and distance(vectors, own) < HALF
    # nothing left out
    assert "taken: 28 text cross-attention layers, 100 %" in found.notes[1] and len(found.notes) == 2


def test_the_words_alone(bank, tmp_path):
    file = export_concept(bank, "rex", tmp_path, ("embedding",)).files[0]
    found = import_concept("dog1", "dog", "object", bank.layout, embedding=file)
    assert not found.concept.deltas and found.concept.info.words == ("dog1-1", "dog1-2")
    assert found.concept.info.provenance.settings == {"files": [file.name]}


def named(layout, deltas, style: str, extra=()) -> dict[str, torch.Tensor]:
    """Deltas under the names of several programs."""
    names = {name: key for name, key in site_names(layout).items()
             if name.startswith(("input", "output", "middle"))}
    original = {key: name for name, key in names.items() if "out_0" not in name}
    state = {}
    for (index, projection), delta in deltas.items():
        inner = "to_out.0" if projection == "to_out" else projection
        path = f"{layout.sites[index].name}.{inner}"
        up, down, alpha = {
            "kohya": ("lora_unet_{_}.lora_up.weight", "lora_unet_{_}.lora_down.weight",
                      "lora_unet_{_}.alpha"),
            "original": ("lora_unet_{o}.lora_up.weight", "lora_unet_{o}.lora_down.weight",
                         "lora_unet_{o}.alpha"),
            "comfyui": ("diffusion_model.{o}.lora_up.weight", "diffusion_model.{o}.lora_down.weight",
                        "diffusion_model.{o}.alpha"),
            "peft": ("unet.{p}.lora_B.weight", "unet.{p}.lora_A.weight", None),
            "peft, raw": ("base_model.model.{p}.lora_B.default.weight",
                          "base_model.model.{p}.lora_A.default.weight", None),
            "diffusers": ("unet.{p}.lora.up.weight", "unet.{p}.lora.down.weight", None),
            "diffusers of 2023": ("unet.{a}.processor.{b}_lora.up.weight",
                                  "unet.{a}.processor.{b}_lora.down.weight", None),
        }[style]
        where = {"_": path.replace(".", "_"), "p": path, "o": original[index, projection],
                 "a": layout.sites[index].name, "b": projection}
        scale = delta.scale if alpha is None else 1.0
        state[up.format(**where)], state[down.format(**where)] = delta.up * scale, delta.down
        if alpha is not None:
            state[alpha.format(**where)] = torch.tensor(delta.scale * delta.down.shape[0])
    return state | dict(extra)


STYLES = ["kohya", "original", "comfyui", "peft", "peft, raw", "diffusers", "diffusers of 2023"]


@pytest.mark.parametrize("style", STYLES)
def test_every_programs_names(bank, style):
    taken = lora_deltas(LoraFile(named(bank.layout, bank["rex"].deltas, style)), bank.layout, "it")
    assert same_deltas(taken.deltas, bank["rex"].deltas) and taken.share == 1 and not any(taken.left.values())


def test_names_of_the_true_families():
    """Of SD1.5's and SDXL's first and last layers, as their LoRA files have them."""
    def site(name, index):
        return Site(index, name, 0, 8, 320, 768)

    paths = ("down_blocks.0.attentions.0", "down_blocks.2.attentions.1", "mid_block.attentions.0",
             "up_blocks.1.attentions.0", "up_blocks.3.attentions.2")
    sites = tuple(site(f"{path}.transformer_blocks.0.attn2", i) for i, path in enumerate(paths))
    found = site_names(SiteLayout(sites, (("clip_l", 768),)))
    for number, name in enumerate(("input_blocks_1_1", "input_blocks_8_1", "middle_block_1",
                                   "output_blocks_3_1", "output_blocks_11_1")):
        assert found[f"{name}_transformer_blocks_0_attn2_to_k"] == (number, "to_k")
    assert found["up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0"] == (4, "to_out")
    wide = site_names(SiteLayout((site("down_blocks.1.attentions.0.transformer_blocks.1.attn2", 0),
                                  site("down_blocks.1.attentions.1.transformer_blocks.0.attn2", 1),
                                  site("up_blocks.0.attentions.0.transformer_blocks.9.attn2", 2)),
                                 (("clip_l", 768),)))
    assert {"input_blocks_4_1_transformer_blocks_1_attn2_to_q",
            "output_blocks_0_1_transformer_blocks_9_attn2_to_q"} <= set(wide)


@pytest.mark.parametrize(("key", "module", "side", "is_text"), [
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
     "te_text_model_encoder_layers_0_self_attn_q_proj", "up", True),
    ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", "te2_text_model_encoder_layers_0_mlp_fc1", "alpha",
     True),
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
     "text_encoder_text_model_encoder_layers_0_self_attn_q_proj",
     "down", True),
    ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "mid_block_resnets_0_conv1", "mid", False),
    ("lycoris_mid_block_x_attn2_to_k.lokr_w2_a", "mid_block_x_attn2_to_k", "w2_a", False),
    ("text_encoder.text_model.x.q_proj.lora_linear_layer.down.weight", "text_encoder_text_model_x_q_proj",
     "down", True),
    ("base_model.model.mid_block.attn2.to_k.lora_magnitude_vector.rex.weight", "mid_block_attn2_to_k",
     "lora_magnitude_vector", False),
    ("mid_block.attn2.processor.to_out_custom_diffusion.0.weight", "mid_block_attn2_to_out", "weight", False),
    ("diffusion_model.middle_block.1.attn2.to_v.diff", "middle_block_1_attn2_to_v", "diff", False),
    ("unet.mid_block.attn2.to_out.0.lora_B.default.bias", "mid_block_attn2_to_out_0", "", False),
])
def test_parts(key, module, side, is_text):
    part = part_of(key)
    assert (part.module, part.side, part.is_text) == (module, side, is_text)


@pytest.mark.parametrize("key",
                         ["emb_params", "x.weight", "x.lora_up.0.weight",
                          "model.diffusion_model.x.attn2.to_k.weight", "<s0>", "", "x" * 1000 + ".alpha"])
def test_what_is_no_lora_is_no_part(key):
    assert part_of(key) is None


def test_what_is_left_out_is_told(bank, tmp_path):
    def factors(module, size=8):
        return {f"{module}.lora_up.weight": torch.randn(size, 2),
                f"{module}.lora_down.weight": torch.randn(2, size)}

    inner = "attentions_0_transformer_blocks_0_attn1_to_q"
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    extra = factors(text) | factors(f"lora_unet_down_blocks_0_{inner}")
    odd = {"lora_unet_mid_block_x.hada_w1_a": torch.ones(2, 2),
           "lora_unet_mid_block_x.hada_w1_b": torch.ones(2, 2)}
    save_file(named(bank.layout, bank["rex"].deltas, "kohya", extra | odd), tmp_path / "some.safetensors")
    taken = lora_deltas(read_lora(tmp_path / "some.safetensors"), bank.layout, "it")
    inside = sum(float(delta.dense().square().sum()) for delta in bank["rex"].deltas.values())
    ups = [key for key in extra if key.endswith("lora_up.weight")]
    outside = sum(float((extra[key] @ extra[key.replace("lora_up", "lora_down")]).square().sum())
                  for key in ups)
    assert len(ups) == 2 and taken.share == pytest.approx(inside / (inside + outside), rel=1e-4)
    assert {kind: left.layers for kind, left in taken.left.items()} == {
        "text encoder": 1, "self-attention": 1, "other layers, incomplete": 1}
    shares = [left.share for left in taken.left.values() if left.share is not None]
    assert sum(shares) + taken.share == pytest.approx(1, rel=1e-5)


def test_a_trigger_is_what_is_typed(tiny_backbone, bank, tmp_path):
    """`<rex2>` encodes as its trigger words do, and its deltas are the LoRA's."""
    save_file(named(bank.layout, bank["rex"].deltas, "kohya"), tmp_path / "some.safetensors")
    found = import_concept("rex2", "dog", "object", bank.layout, tiny_backbone.text,
                           tmp_path / "some.safetensors", trigger=" red dog ")
    grown = bank.add(found.concept)
    ours = encode_prompts(tiny_backbone, grown.vocabulary.parse_all(["a <rex2> runs"]),
                          {"rex2": found.concept.tokens}).hidden
    typed = encode_prompts(tiny_backbone, grown.vocabulary.parse_all(["a red dog runs"]), {}).hidden
    assert torch.allclose(ours, typed, atol=2e-3)      # vectors in fp16
    deltas = aggregate(tiny_backbone, grown, grown.parse("a <rex2> runs")).deltas
    assert same_deltas(deltas, bank["rex"].deltas)


def test_layers_of_several_ranks(bank):
    state = named(bank.layout, bank["rex"].deltas, "kohya")
    key = next(k for k in state if k.endswith("attn2_to_q.lora_up.weight"))
    module = key.removesuffix(".lora_up.weight")
    a, b = state[key].shape[0], state[f"{module}.lora_down.weight"].shape[1]
    state |= {key: torch.randn(a, 7), f"{module}.lora_down.weight": torch.randn(7, b),
              f"{module}.alpha": torch.tensor(7.0)}
    taken = lora_deltas(LoraFile(state), bank.layout, "it")
    place = site_names(bank.layout)[module.removeprefix("lora_unet_")]
    assert distance(taken.deltas[place].dense(), state[key] @ state[f"{module}.lora_down.weight"]) < 1e-5
    found = imported("many", "dog", "object", bank.layout, {"clip_l": torch.zeros(1, 32)}, taken).concept
    assert {d.up.shape[1] for key, d in found.deltas.items() if key[1] == "to_q"} == {7}
    assert distance(found.deltas[place].dense(), taken.deltas[place].dense()) < HALF


def broken(bank, change):
    state = named(bank.layout, bank["rex"].deltas, "kohya")
    key = next(k for k in state if k.endswith("attn2_to_k.lora_up.weight"))
    return LoraFile(state | change(state, key))


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda s, k: {k: torch.full_like(s[k], torch.nan)}, "holds NaN"),
    (lambda s, k: {k: s[k].half().fill_(float("inf"))}, "infinity"),
    (lambda s, k: {k.replace("lora_up.weight", "alpha"): torch.tensor(float("nan"))}, "holds NaN"),
    (lambda s, k: {k: s[k][:, :1]}, "has ranks 1 and"),
    (lambda s, k: {k: s[k][:3]}, "made for another family of models"),
    (lambda s, k: {k: s[k][0]}, "allowed: two matrices"),
    (lambda s, k: {k: s[k].int()}, "allowed: two matrices"),
    (lambda s, k: {k.replace("lora_up.weight", "alpha"): torch.ones(3)}, "allowed: one floating"),
])
def test_damaged_files_get_one_sentence(bank, change, sentence):
    with pytest.raises(ConceptError, match=sentence):
        lora_deltas(broken(bank, change), bank.layout, "it")


def test_requests_that_cannot_be_met(bank, tmp_path, tiny_backbone):
    layout, lora = bank.layout, tmp_path / "some.safetensors"
    save_file(named(layout, bank["rex"].deltas, "kohya"), lora)
    save_file({"other": torch.ones(4)}, tmp_path / "other.safetensors")
    save_file({"emb_params": torch.ones(40, 32)}, tmp_path / "long.safetensors")
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "wide.safetensors")
    save_file({"a": torch.ones(LARGEST_EMBEDDING // 4 + 1)}, tmp_path / "large.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 9)
    (tmp_path / "old.pt").write_bytes(b"noise")

    def make(**files):
        return import_concept(files.pop("name", "dog1"), "dog", "object", layout, tiny_backbone.text, **files)

    for sentence, request in (
        ("there is nothing to import", lambda: make()),
        ("no learned words; give the trigger", lambda: make(lora=lora)),
        ("the trigger '.*' has .* vectors; allowed: 1 to 16", lambda: make(lora=lora, trigger="red " * 17)),
        (rf"changes no text cross-attention .*; allowed: .* such as {re.escape(layout.sites[0].name)}$",
         lambda: make(lora=tmp_path / "other.safetensors")),
        ("has 40 vectors", lambda: make(embedding=tmp_path / "long.safetensors")),
        (r"shape \(2, 768\) for 'clip_l'", lambda: make(embedding=tmp_path / "wide.safetensors")),
        ("larger than 16 MB", lambda: make(embedding=tmp_path / "large.safetensors")),
        ("not a readable .safetensors", lambda: make(lora=tmp_path / "noise.safetensors")),
        (r"is a .pt file; allowed: .safetensors", lambda: make(lora=tmp_path / "old.pt")),
        ("there is no file", lambda: make(embedding=tmp_path / "gone.safetensors")),
        ("concept name '../x' is not allowed", lambda: make(lora=lora, trigger="dog", name="../x")),
    ):
        with pytest.raises(ConceptError, match=sentence):
            request()
    assert read_embedding(tmp_path / "other.safetensors")["other"].shape == (4,)


def test_two_encoders(tiny_sdxl, make_concept, tmp_path):
    concept = make_concept(tiny_sdxl.layout, "rex", 1, size=0.1, layerwise=False)
    bank = ConceptBank(tiny_sdxl.layout).add(concept)
    for formats in (("embedding",), ("kohya", "embedding"), ("bundle",)):
        files = export_concept(bank, "rex", tmp_path, formats).files
        own = {"embedding": files[-1]} if "embedding" in formats else {}
        own |= {"lora": files[0]} if formats != ("embedding",) else {}
        found = import_concept("dog1", "dog", "object", bank.layout, **own).concept
        for encoder, vectors in bank["rex"].tokens.vectors.items():
            assert distance(found.tokens.vectors[encoder], vectors) < HALF
    state = {"text_encoders_0": torch.ones(1, 32), "text_encoders_1": torch.ones(1, 24)}
    save_file(state, tmp_path / "scripts.safetensors")
    assert len(import_concept("d", "", "object", bank.layout,
                              embedding=tmp_path / "scripts.safetensors").concept.info.words) == 1


def test_the_command(tmp_path, capsys, monkeypatch):
    from continual_concepts.benchmarks.cost.training import random_bank
    from continual_concepts.core.demo import base
    from continual_concepts.core.demo.bases import file_of

    monkeypatch.setattr(base, "load_base", cache(base.load_base))      # every command uses it
    layout = base.load_base(file_of("embedded-64"), torch.device("cpu")).layout
    few = random_bank(layout, "cidm", 1)
    files = export_concept(few, "old0", tmp_path, ("kohya", "embedding")).files
    target = tmp_path / "mine.safetensors"
    command = ["bank", "import", str(target), "rex", "--noun", "dog", "--base", "embedded-64", "--lora",
               str(files[0])]
    assert main([*command, "--embedding", str(files[1])]) == 0 and "holds <rex>" in capsys.readouterr().out
    assert main([*command[:3], "fido", *command[4:], "--trigger", "red dog"]) == 0
    assert open_bank(target).names == ["rex", "fido"]
    assert main([*command[:3], "tom", *command[4:]]) == 1
    assert "no learned words" in capsys.readouterr().err
    assert main([*command, "--trigger",
                 "dog"]) == 1 and "already holds a concept 'rex'" in capsys.readouterr().err
    assert {p for _, p in open_bank(target)["rex"].deltas} == set(PROJECTIONS)
