"""Exported files in stock ComfyUI: every key is used, words are found by name, pictures are ours."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.interop.export import export_concept
from continual_concepts.core.interop.prompt_export import export_prompt

PROMPT, CONCEPT = "a photo of {} in a meadow", "blueprint"      # the concept with a single copy


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="module")
def exported(bank, folder):
    files = export_concept(bank, CONCEPT, folder, ["kohya", "embedding"]).files
    return dict(zip(("kohya", "embedding"), files, strict=True))


@pytest.fixture(scope="module")
def clip(comfyui, folder):
    """The embedded base's CLIP with our folder as its embeddings folder."""
    from continual_concepts.core.comfy.demo import load_demo

    with torch.inference_mode():
        return load_demo(str(folder), "embedded-64")[1]


def load_lora(model, clip, file, strength: float = 1.0):
    """ComfyUI's Load LoRA node, but for its look-up of the file."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.load_lora_for_models(model, clip, comfy.utils.load_torch_file(str(file), safe_load=True),
                                         strength, strength)


def encode(clip, prompt: str):
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def predict(model, conditioning) -> torch.Tensor:
    """The UNet's view of a noisy latent through the host's whole sampling path, patches and wrappers
    included."""
    import comfy.model_management
    import comfy.samplers

    channels = model.get_model_object("latent_format").latent_channels
    latent = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(5))

    def look(model, x, sigmas, extra_args, callback, disable, **_):
        return model(x, sigmas[0] * x.new_ones([1]), **extra_args)

    sampler = comfy.samplers.KSAMPLER(look)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    with torch.inference_mode():
        noise = torch.zeros_like(latent)
        return guider.sample(latent, noise, sampler, torch.tensor([3.0, 0.0]), seed=0).clone()


def sites_of(model, clip):
    from continual_concepts.core.comfy.families import find_sites
    from continual_concepts.core.comfy.text import text_widths

    return find_sites(model, text_widths(clip))


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "not loaded" in record.getMessage().lower()]


def test_every_key_of_the_lora_is_loaded(demo, bank, exported, caplog):
    with caplog.at_level(logging.WARNING):
        model, _ = load_lora(*demo[:2], exported["kohya"])
    assert not warnings(caplog)
    assert len(model.patches) == len(bank[CONCEPT].deltas)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_the_lora_changes_weights_as_our_own_patches_do(demo, bank, exported, strength):
    from continual_concepts.core.comfy.apply import fold

    model, sites = demo[0], sites_of(*demo[:2])
    theirs = load_lora(model, None, exported["kohya"], strength)[0]
    ours = fold(model, sites, {key: delta.scaled(strength) for key, delta in bank[CONCEPT].deltas.items()},
                False)
    for (index, projection), delta in bank[CONCEPT].deltas.items():
        key = sites.key(sites.layout.sites[index], projection)
        changes = [change_of(patched, key) for patched in (theirs, ours)]
        assert distance(changes[0],
                        changes[1]) < 1.5e-3 and distance(changes[0], strength * delta.dense()) < 1.5e-3


def change_of(model, key: str) -> torch.Tensor:
    import comfy.lora
    import comfy.utils

    weight = comfy.utils.get_attr(model.model, key)
    zero = torch.zeros(weight.shape)
    return comfy.lora.calculate_weight(model.patches[key], zero.clone(), key)


def test_the_stock_tokenizer_finds_the_words(clip, bank, exported):
    tokens = clip.tokenize(PROMPT.format(f"embedding:{exported['embedding'].stem}"))["l"]
    vectors = [token for chunk in tokens for token, *_ in chunk if torch.is_tensor(token)]
    assert torch.allclose(torch.stack(vectors), bank[CONCEPT].tokens.vectors["clip_l"][0])


def test_a_layerwise_concept_gives_its_mean_copy(clip, bank, folder):
    exported = export_concept(bank, "rex", folder, ["embedding", "kohya"])
    tokens = clip.tokenize("embedding:rex, a dog")["l"]
    vectors = torch.stack([token for chunk in tokens for token, *_ in chunk if torch.is_tensor(token)])
    assert torch.allclose(vectors, bank["rex"].tokens.mean_copy().vectors["clip_l"][0], atol=1e-6)
    assert any("layer copies" in note for note in exported.notes)


def test_lora_and_embedding_predict_what_our_own_patches_predict(demo, clip, bank, exported):
    from continual_concepts.core.comfy.apply import fold
    from continual_concepts.core.comfy.concept_clip import concept_clip

    lora, loaded = load_lora(demo[0], clip, exported["kohya"])
    theirs = predict(lora, encode(loaded, PROMPT.format(f"embedding:{CONCEPT}")))
    alone = bank.remove("rex").remove("mimi")
    own = fold(demo[0], sites_of(*demo[:2]), bank[CONCEPT].deltas, False)
    ours = predict(own, encode(concept_clip(demo[1], alone, True), PROMPT.format(f"<{CONCEPT}>")))
    plain = predict(demo[0], encode(demo[1], PROMPT.format("a dog")))
    assert distance(theirs, ours) < 1e-3 < 1e-2 < distance(plain, ours)


def test_a_bundle_works_as_embedding_and_warns_only_of_the_words(demo, clip, bank, folder, caplog):
    file = export_concept(bank, CONCEPT, folder, ["bundle"]).files[0]
    tokens = clip.tokenize(f"embedding:{file.stem}")["l"]
    vectors = torch.stack([token for chunk in tokens for token, *_ in chunk if torch.is_tensor(token)])
    assert torch.allclose(vectors, bank[CONCEPT].tokens.vectors["clip_l"][0])
    with caplog.at_level(logging.WARNING):
        model, _ = load_lora(demo[0], clip, file)
    assert len(model.patches) == len(bank[CONCEPT].deltas)
    assert warnings(caplog) == [f"lora key not loaded: bundle_emb.{CONCEPT}.string_to_param.*"]


@pytest.fixture(scope="module")
def small_sdxl(comfyui):
    """SDXL's UNet in ComfyUI, all 70 sites, with narrow layers."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SDXL({
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
        "channel_mult": [1, 2, 4], "num_res_blocks": [2] * 3,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10, "num_heads": -1, "num_head_channels": 32, "context_dim": 16,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True, "legacy": False, "adm_in_channels": 32,
        "num_classes": "sequential",
        "use_temporal_attention": False, "dtype": torch.float32})
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, device=device), device, device)


def test_sdxl_loads_every_key_and_both_word_vectors(small_sdxl, make_concept, tmp_path, caplog):
    import comfy.sdxl_clip

    from continual_concepts.core.bank.bank import ConceptBank
    from continual_concepts.core.comfy.families import find_sites

    layout = find_sites(small_sdxl, (("clip_l", 768), ("clip_g", 1280))).layout
    bank = ConceptBank(layout).add(make_concept(layout, words=3))
    kohya, embedding = export_concept(bank, "rex", tmp_path).files
    with caplog.at_level(logging.WARNING):
        model, _ = load_lora(small_sdxl, None, kohya)
    assert len(layout) == 70 and len(model.patches) == 4 * 70 and not warnings(caplog)
    tokenizer = comfy.sdxl_clip.SDXLTokenizer(embedding_directory=str(tmp_path))
    tokens = tokenizer.tokenize_with_weights(f"embedding:{embedding.stem}")
    for key, encoder in (("l", "clip_l"), ("g", "clip_g")):
        vectors = torch.stack([token for chunk in tokens[key] for token, *_ in chunk
                               if torch.is_tensor(token)])
        assert torch.allclose(vectors, bank["rex"].tokens.vectors[encoder].mean(0), atol=1e-6)


TWO = "a photo of {} and {} in a meadow"


@pytest.fixture(scope="module")
def single(bank):
    """The same concepts with one copy of their words, as embedding files hold them."""
    for name in bank.names:
        bank = bank.replace(replace(bank[name], tokens=bank[name].tokens.mean_copy()))
    return bank


def test_what_a_prompt_gets_predicts_the_same_through_comfyuis_own_loader(demo, clip, single, folder, caplog):
    from continual_concepts.core.comfy.apply import fold
    from continual_concepts.core.comfy.concept_clip import concept_clip
    from continual_concepts.core.conditioning.routing import aggregate

    prompt, sites = TWO.format("<rex>", "<mimi>"), sites_of(*demo[:2])
    files = export_prompt(single, prompt, folder, strength=0.8).files
    with caplog.at_level(logging.WARNING):
        lora, loaded = load_lora(demo[0], clip, files[0])
    deltas = aggregate(SimpleNamespace(layout=sites.layout), single, single.parse(prompt),
                       strength=0.8).deltas
    assert not warnings(caplog) and len(lora.patches) == len(deltas)
    theirs = predict(lora, encode(loaded, TWO.format(*(f"embedding:{file.stem}" for file in files[1:]))))
    ours = predict(fold(demo[0], sites, deltas, False), encode(concept_clip(demo[1], single, True), prompt))
    plain = predict(demo[0], encode(demo[1], TWO.format("a dog", "a cat")))
    assert distance(theirs, ours) < 1e-3 < 1e-2 < distance(plain, ours)


def written(output, kind: str) -> list[str]:
    place = output / kind
    return sorted(file.name for file in place.iterdir()) if place.is_dir() else []


def test_the_node_exports_a_prompt_a_concept_and_a_whole_bank(pack, bank, own_folder, as_in_comfyui):
    node = pack.ConceptExport
    optional = [one.id for one in node.define_schema().inputs]
    # saved graphs know inputs by their order
    assert optional == ["bank", "concept", "format", "strength", "prompt"]
    text = node.execute(bank, "rex", "LoRA and embedding", 1.0).args[0]
    assert written(own_folder, "loras") == ["rex_lora.safetensors"]
    assert written(own_folder, "embeddings") == ["rex.safetensors"]
    assert "wrote rex_lora.safetensors" in text and "not in these files" not in text
    text = node.execute(bank, "tom", "LoRA", 1.0, prompt="<rex> and <mimi>").args[0]
    assert "wrote prompt_rex_mimi_lora.safetensors" in text
    assert "export the format 'embedding' as well" in text
    for everything in ("", " * "):
        text = node.execute(bank, everything, "embedding", 1.0).args[0]
        assert text.count("wrote ") == len(bank)
    assert len(written(own_folder,
                       "embeddings")) == 1 + 2 * len(bank) and len(written(own_folder, "loras")) == 2
    with pytest.raises(ConceptError, match="names no concept"):
        node.execute(bank, "rex", "LoRA", 1.0, prompt="a dog")


def test_comfyuis_model_browser_finds_the_thumbnail_in_the_files(comfyui, bank, tmp_path):
    from app.model_manager import ModelFileManager

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    covered = bank.replace(replace(bank["rex"], thumbnail=buffer.getvalue()))
    files = export_concept(covered, "rex", tmp_path).files + export_prompt(covered, "a <rex>", tmp_path).files
    for file in files:
        previews = ModelFileManager().get_model_previews(str(file))
        assert len(previews) == 1 and previews[0].getvalue() == buffer.getvalue()
