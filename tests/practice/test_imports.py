"""Files of other programs: rows E."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.interop.importing import Imported, import_concept
from continual_concepts.tests.lora_files import (
    FORMS,
    Writer,
    custom_diffusion,
    factors,
    module_names,
    peft,
    written,
)


@pytest.fixture(scope="session")
def base():
    return load_base()


@pytest.fixture(scope="session")
def weight(base):
    return lambda site, projection: base.weight(base.layout.sites[site], projection).detach()


@pytest.fixture
def make(base, tmp_path):
    """make(state or path, ...): a LoRA file as the concept <rex>."""
    def call(lora, config: dict | None = None, header: dict | None = None, **options) -> Imported:
        if isinstance(lora, dict):
            (tmp_path / "lora").mkdir(exist_ok=True)
            file = tmp_path / "lora" / ("some.safetensors" if config is None else "adapter_model.safetensors")
            save_file({key: tensor.contiguous() for key, tensor in lora.items()}, file, header)
            if config is not None:
                (file.parent / "adapter_config.json").write_text(json.dumps(config))
            lora = file
        options.setdefault("backbone", base)
        return import_concept("rex", "dog", "object", base.layout, base.text, lora, trigger="dog", **options)

    return call


@pytest.fixture
def embed(base, tmp_path):
    """embed(state): an embedding file as the concept <rex>."""
    def call(state: dict[str, Tensor], **options) -> Imported:
        save_file(state, tmp_path / "words.safetensors")
        return import_concept("rex", "dog", "object", base.layout, base.text,
                              embedding=tmp_path / "words.safetensors", **options)

    return call


@pytest.fixture
def width(base) -> int:
    return dict(base.layout.text_widths)["clip_l"]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def same(result: Imported, changes: dict[tuple[int, str], Tensor]) -> bool:
    deltas = result.concept.deltas
    return deltas.keys() == changes.keys() and all(
        distance(deltas[key].dense(), change) < 1e-3 for key, change in changes.items())


def scaled(changes, factor: float):
    return {key: factor * change for key, change in changes.items()}


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 32}


@pytest.mark.parametrize(("more", "factor"), [({}, 16.0), ({"use_rslora": True}, 32 / 2**0.5)])
def test_e1_alpha_of_a_peft_folder(make, base, weight, tmp_path, more, factor):
    state, changes = peft(base.layout, weight)
    result = make(state, CONFIG | more)
    assert same(result, scaled(changes, factor)) and any("alpha 32" in note for note in result.notes)
    assert same(make(tmp_path / "lora"), scaled(changes, factor))      # the folder itself


def test_e1_alpha_in_the_header(make, base, weight):
    state, changes = peft(base.layout, weight, "unet.")
    flat = {f"unet.{key}": value for key, value in (CONFIG | {"use_rslora": True}).items()}
    header = {"lora_adapter_metadata": json.dumps(flat | {"text_encoder.r": 2})}
    assert same(make(state, header=header), scaled(changes, 32 / 2**0.5))


def test_e1_sibling_patterns(make, base, weight):
    state, changes = peft(base.layout, weight)
    name = f"{base.layout.sites[0].name}.to_k"
    config = CONFIG | {"alpha_pattern": {"attn2.to_k": 4, "attn2.to_v": 8}, "r": 5,
                       "rank_pattern": dict.fromkeys(["to_q", "to_k", "to_v", "attn2.to_out.0"], 2)}
    alphas = {"to_k": 4, "to_v": 8}
    expected = {key: alphas.get(key[1], 32) / 2 * change for key, change in changes.items()}
    assert same(make(state, config), expected)
    config["alpha_pattern"] = {f"^{name}": 6}
    expected = {key: (6 if key == (0, "to_k") else 32) / 2 * change for key, change in changes.items()}
    assert same(make(state, config), expected)


def test_e1_sibling_no_configuration_is_told(make, base, weight):
    state, changes = peft(base.layout, weight)
    result = make(state)
    assert same(result, changes) and any("no adapter_config.json beside it" in note for note in result.notes)
    own, _ = peft(base.layout, weight, "unet.")
    assert not any("adapter_config" in note for note in make(own).notes)


def test_e1_sibling_a_header_for_other_names(make, base, weight):
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})}
    notes = make(peft(base.layout, weight, "unet.")[0], header=header).notes
    assert "the header's lora_adapter_metadata names none of its layers, so alpha counts as the rank" in notes


def test_e1_sibling_the_configuration_of_another_file(make, base, weight):
    with pytest.raises(ConceptError, match="rank 4, and its tensors have rank 2"):
        make(peft(base.layout, weight)[0], CONFIG | {"r": 4})


@pytest.mark.parametrize("form", ["dora_of_columns", "dora_of_rows", "dora_of_peft", "lokr_with_dora"])
def test_e2_dora(make, base, weight, form):
    state, changes = written(form, base.layout, weight)
    result = make(state)
    assert same(result, changes) and "DoRA" in result.notes[1]
    assert result.concept.info.provenance.base == base.fingerprint


def test_e2_sibling_dora_without_a_base(make, base, weight):
    with pytest.raises(ConceptError, match="form DoRA, which needs the weights of the base"):
        make(written("dora_of_rows", base.layout, weight)[0], backbone=None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_e3_forms_and_lycoris_names(make, base, weight, form, prefix):
    state, changes = written(form, base.layout, weight, prefix)
    result = make(state)
    assert same(result, changes) and "100 % of what the LoRA changes" in result.notes[1]


def test_e3_custom_diffusion(make, base, weight):
    state, changes = custom_diffusion(base.layout, weight)
    assert same(make(state), changes)
    with pytest.raises(ConceptError, match="form Custom Diffusion, which needs the weights of the base"):
        make(state, backbone=None)


@pytest.mark.parametrize(("side", "named"), [
    (".oft_blocks", "OFT"), (".boft_R", "BOFT"), (".b2.weight", "GLoRA"), ("_lora.q_layer.weight", "T-LoRA")])
def test_e3_sibling_refused_by_name(make, base, weight, side, named):
    state = {f"{name}{side}": torch.ones(2, 2) for name in module_names(base.layout).values()}
    with pytest.raises(ConceptError, match=f"changes text cross-attention by {named} .*; allowed: one of"):
        make(state)


def test_e3_sibling_what_is_left_out_by_kind(make, base, weight):
    state, _ = written("lora", base.layout, weight)
    block = "lora_unet_down_blocks_0_"
    for module in ("attentions_0_transformer_blocks_0_attn1_to_q", "resnets_0_conv1", "attentions_0_proj_in",
                   "attentions_0_transformer_blocks_0_ff_net_2"):
        state |= factors(block + module)
    state |= factors("lora_te_text_model_encoder_layers_0_mlp_fc1")
    state |= {f"{block}norm1.w_norm": torch.ones(4), "surprise.gate": torch.ones(1),
              f"{module_names(base.layout)[0, 'to_out']}.diff_b": torch.ones(4)}
    notes = make(state).notes
    for kind in ("text encoder (1 layer, ", "self-attention (1 layer, ", "feed-forward (1 layer, ",
                 "convolutions (1 layer, ", "proj_in and proj_out (1 layer, ", "normalisation (1 layer)",
                 "biases of text cross-attention (1 layer)", "such as 'surprise.gate' (1 layer)"):
        assert kind in notes[2], kind


def test_e3_sibling_nothing_for_a_concept(make):
    state = factors("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q")
    state |= {"lora_unet_double_blocks_0_img_attn_qkv.oft_blocks": torch.ones(2, 2, 2)}
    with pytest.raises(ConceptError, match=r"it holds other layers as OFT \(1\), self-attention \(1\); all"):
        make(state)


def test_e4_several_bundled_embeddings(make, base, weight, width):
    state, _ = written("lora", base.layout, weight)
    state |= {"bundle_emb.cat.string_to_param.*": torch.ones(1, width),
              "bundle_emb.dog.clip_l": torch.zeros(2, width)}
    with pytest.raises(ConceptError, match="holds 2 embeddings: cat, dog; say with 'which'"):
        make(state)
    assert len(make(state, which="cat").concept.info.words) == 1
    assert len(make(state, which="dog").concept.info.words) == 2


def test_e4_several_adapters_in_one_file(make, base, weight):
    (state, _), (other, changes) = (peft(base.layout, weight, adapter=f".{name}", seed=seed)
                                    for seed, name in enumerate(("rex", "mimi")))
    with pytest.raises(ConceptError, match="holds 2 adapters: mimi, rex; say with 'which'"):
        make(state | other)
    assert same(make(state | other, which="mimi"), changes)


def test_e4_sibling_several_adapters_in_one_folder(make, base, weight, tmp_path):
    for seed, name in enumerate((".", "mimi", "text_encoder")):
        folder = tmp_path / "all" / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(peft(base.layout, weight, seed=seed)[0], folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"lora_alpha": 2 + seed}))
    with pytest.raises(ConceptError, match="'all' holds 2 adapters: default, mimi; say with 'which'"):
        make(tmp_path / "all")
    result = make(tmp_path / "all", which="mimi")
    assert same(result, scaled(peft(base.layout, weight, seed=1)[1], 1.5))
    assert "left out: text_encoder/adapter_model.safetensors" in result.notes


def test_e4_sibling_several_embeddings_in_one_file(embed, width):
    state = {"<cat>": torch.ones(width), "<dog>": torch.zeros(2, width)}
    with pytest.raises(ConceptError, match="holds 2 embeddings: <cat>, <dog>; say with 'which'"):
        embed(state)
    result = embed(state, which="<dog>")
    assert len(result.concept.info.words) == 2
    assert result.notes[1] == "taken: the embedding <dog>; left out: <cat>"


def test_e4_sibling_words_and_triggers_that_are_not_used(make, base, weight, width, tmp_path):
    state, _ = written("lora", base.layout, weight)
    save_file({"emb_params": torch.ones(1, width)}, tmp_path / "words.safetensors")
    state["bundle_emb.cat.emb_params"] = torch.ones(2, width)
    result = make(state, embedding=tmp_path / "words.safetensors")
    assert len(result.concept.info.words) == 1
    assert "left out: the words in the LoRA; those of the embedding file were taken" in result.notes
    assert "the trigger was not used, because the file brings its own words" in result.notes


def test_e4_sibling_a_choice_that_is_not_there(embed, width):
    with pytest.raises(ConceptError, match="holds no 'cow'; allowed: <cat>"):
        embed({"<cat>": torch.ones(width)}, which="cow")


def test_e5_alpha_zero_is_the_rank(make, base, weight):
    state, changes = written("lora", base.layout, weight)
    state = {key: torch.tensor(0.0) if key.endswith("alpha") else tensor for key, tensor in state.items()}
    result = make(state)
    assert same(result, scaled(changes, 1.5))      # was written with 2 / 3
    assert any("alpha is 0 in" in note and "counts as the rank" in note for note in result.notes)


@pytest.mark.parametrize("form", ["lora", "loha", "lokr"])
def test_e5_an_import_that_changes_nothing_says_so(make, base, weight, form):
    state, _ = written(form, base.layout, weight)
    state = {key: torch.zeros_like(tensor) if key.endswith(("lora_up.weight", "w1_a", "w2")) else tensor
             for key, tensor in state.items()}
    assert any("all imported changes are zero" in note for note in make(state).notes)


def test_e5_sibling_peft_alpha_zero(make, base, weight):
    notes = make(peft(base.layout, weight)[0], CONFIG | {"lora_alpha": 0}).notes
    assert any("all imported changes are zero" in note for note in notes)


def test_e5_sibling_small_numbers_are_kept(make, base, weight):
    """Below fp16's range they would become zero."""
    state, changes = written("lora", base.layout, weight)
    state = {key: tensor * 1e-8 if key.endswith("up.weight") else tensor for key, tensor in state.items()}
    assert same(make(state), scaled(changes, 1e-8))


TYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_e6_embeddings_of_every_float_type(embed, width, dtype):
    vectors = Writer().random(2, width).to(dtype)
    tokens = embed({"emb_params": vectors}).concept.tokens.vectors["clip_l"]
    assert distance(tokens[0], vectors.float()) < 1e-3


@pytest.mark.parametrize("dtype", TYPES[:3], ids=str)
def test_e6_sibling_loras_of_every_float_type(make, base, weight, dtype):
    state, _ = written("loha", base.layout, weight)
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    expected = make({key: tensor.float() for key, tensor in state.items()}).concept.deltas
    assert same(make(state), {key: delta.dense() for key, delta in expected.items()})


@pytest.mark.parametrize("tensor", [torch.ones(2, 96).to(torch.int8), torch.full((2, 96), torch.nan)],
                         ids=["int8", "nan"])
def test_e6_sibling_what_is_no_vector(embed, width, tensor):
    with pytest.raises(ConceptError, match="allowed: finite numbers"):
        embed({"emb_params": tensor[:, :1].expand(2, width).contiguous()})


def test_e7_an_sdxl_embedding_on_a_smaller_base(embed, width):
    result = embed({"clip_l": torch.ones(2, width), "clip_g": torch.ones(2, 1280)})
    assert "left out of the embedding: the vectors for clip_g, which this base" in result.notes[1]


def test_e7_sibling_a_lora_as_embedding(embed):
    with pytest.raises(ConceptError, match="is a LoRA file; allowed: an embedding"):
        embed(factors("lora_unet_mid_block_attentions_0_proj_in"))


def test_e7_many_vectors(embed, width):
    with pytest.raises(ConceptError, match="has 75 vectors; allowed: 1 to 16, the most words of a concept"):
        embed({"emb_params": torch.ones(75, width)})


def test_e7_words_of_pivotal_tuning(embed, width):
    state = {"<s1>": torch.full((width,), 2.0), "<s0>": torch.ones(1, width)}
    result = embed(state)
    assert result.concept.tokens.vectors["clip_l"][0, :, 0].tolist() == [1.0, 2.0]
    assert result.notes[1] == "the words <s0>, <s1> of the file are one concept, in this order"
    assert embed(state, which="<s1>").concept.tokens.vectors["clip_l"][0, :, 0].tolist() == [2.0]
    both = embed({"text_encoders_0": torch.ones(2, width), "text_encoders_1": torch.ones(2, 1280)})
    assert len(both.concept.info.words) == 2 and "clip_g" in both.notes[1]


def test_e7_sibling_numbered_words_and_other_tensors(embed, width):
    state = {f"<cat>{end}": torch.full((width,), float(i)) for i, end in enumerate(["", "_1", "_2"])}
    assert embed(state).concept.tokens.vectors["clip_l"][0, :, 0].tolist() == [0.0, 1.0, 2.0]
    result = embed({"clip_l": torch.ones(1, width), "notes": torch.ones(3)})
    assert result.notes[1] == "left out of the embedding: the vectors for notes"


def test_the_command(run, base, weight, tmp_path):
    """The command line brings the base's weights, takes folders and asks which."""
    state, changes = peft(base.layout, weight, adapter=".one")
    other, _ = peft(base.layout, weight, adapter=".two")
    save_file({key: t.contiguous() for key, t in (state | other).items()}, tmp_path / "two.safetensors")
    bank = tmp_path / "bank.safetensors"
    command = ["bank", "import", bank, "rex", "--noun", "dog", "--trigger", "dog", "--lora"]
    assert "say with 'which'" in run(*command, tmp_path / "two.safetensors").sentence
    outcome = run(*command, tmp_path / "two.safetensors", "--which", "one")
    assert outcome.code == 0 and "100 % of what the LoRA changes" in outcome.out
    state = custom_diffusion(base.layout, weight)[0]
    save_file(state, tmp_path / "pytorch_custom_diffusion_weights.safetensors")
    command[3] = "mimi"
    assert "Custom Diffusion)" in run(*command, tmp_path).out
    stored = open_bank(bank)
    assert stored.names == ["rex", "mimi"]
    assert distance(stored["rex"].deltas[0, "to_k"].dense(), changes[0, "to_k"]) < 1e-3
