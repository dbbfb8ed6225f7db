"""Anima in ComfyUI, with random weights through the stock loaders: every node works, and nothing of the
user's objects changes."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.context import Context

from .make_transformer import anima_clip, anima_model, wan_vae

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")
SCENE = "a photo of a meadow"
DOGS = "dog dog dog dog"      # what stands for an object of four words


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def anima(pack, demo, bank):
    """The studio with a tiny Anima."""
    pytest.importorskip("comfy.ldm.anima.model", reason="this ComfyUI has no Anima")
    from .conftest import Studio

    with torch.inference_mode():
        studio = Studio(pack, (anima_model(), anima_clip(), wan_vae()), None)
    studio.side = 64
    studio.latent = lambda count=1: {"samples": torch.zeros(count, 16, 1, 8, 8)}
    return studio


@pytest.fixture(scope="module")
def learned(anima):
    """A bank with two objects and a style, and the MODEL's weights before they were learned."""
    before = {name: weight.clone() for name, weight in anima.model.model.state_dict().items()}
    with torch.inference_mode():
        bank = anima.learn(method="slots", steps=2, preview_every=2)
        bank = anima.learn(method="slots", steps=2, name="tom", noun="teddy bear", bank=[bank])
        bank = anima.learn(method="lora", steps=2, name="ink", noun="painting", kind="style", bank=[bank],
                           training_settings=[{"gradient_checkpointing": True}])
    return bank, before


@pytest.fixture
def backbone(anima):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    return ComfyBackbone(anima.model, anima.clip, anima.vae)


def test_learning_changes_nothing_of_the_users_objects(anima, learned):
    bank, before = learned
    assert bank["spot"].slots and set(bank.layout.text_widths) == {("t5xxl", 1024)}
    assert bank["spot"].thumbnail
    after = anima.model.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any("forward" in module.__dict__ for module in anima.model.model.modules())
    assert not anima.model.patches and not anima.clip.patcher.patches


def test_a_prompt_is_what_the_stock_text_node_makes_of_the_class_noun(anima, learned):
    clip = anima.aggregate("", learned[0])[1]
    ours = anima.encode(clip, "a (red:1.3) photo of <spot>, (<tom>:0.5) and <ink>")
    bears = " ".join(["teddy bear"] * 4)
    theirs = anima.encode(anima.clip, f"a (red:1.3) photo of {DOGS}, ({bears}:1.0) and painting painting")
    assert torch.equal(ours[0][0], theirs[0][0])
    assert torch.equal(ours[0][1]["t5xxl_ids"], theirs[0][1]["t5xxl_ids"])
    assert torch.equal(ours[0][1]["t5xxl_weights"], theirs[0][1]["t5xxl_weights"])


def test_words_are_found_by_the_tokenizer(anima, learned):
    """Among T5 tokens, whatever stands before them and however many tokens a noun has."""
    from continual_concepts.core.comfy.sites import STRENGTHS, WORDS
    from continual_concepts.core.comfy.token_lora import code

    clip = anima.aggregate("", learned[0])[1]
    [[_, extra]] = anima.encode(clip, "unbelievable, (<tom>:0.5)'s <spot> in a hat")
    codes, strengths = (extra["model_conds"][key].cond[0, 0, :, 0] for key in (WORDS, STRENGTHS))
    assert len(codes) == 512
    names = {number: clip.tokenizer.t5xxl.inv_vocab[number] for number in extra["t5xxl_ids"].tolist()}
    for name, text, strength in (("tom", "teddy bear" * 4, 0.5), ("spot", "dog" * 4, 1.0)):
        places = (codes == code(name)).nonzero().flatten()
        tokens = [names[number] for number in extra["t5xxl_ids"][places].tolist()]
        assert "".join(tokens).replace("▁", "") == text.replace(" ", "")
        assert (strengths[places] == strength).all()
    assert int((strengths != 0).sum()) == int((codes != 0).sum())


def test_neutral_settings_are_plain_comfyui_bit_for_bit(anima, learned):
    bank = learned[0]
    plain = anima.ksampler(anima.model, f"a photo of {DOGS}", "bad")
    off, clip, positive = anima.aggregate("a photo of <spot>", bank, strength=0.0)
    assert torch.equal(anima.ksampler(off, positive, anima.encode(clip, "bad")), plain)
    on, clip, positive = anima.aggregate("a photo of <spot>", bank)
    changed = anima.ksampler(on, positive, anima.encode(clip, "bad"))
    assert distance(changed, plain) > 1e-3
    assert torch.equal(anima.ksampler(anima.model, f"a photo of {DOGS}", "bad"), plain)
    assert torch.equal(anima.ksampler(on, positive, anima.encode(clip, "bad")), changed)
    meadow = anima.ksampler(anima.model, SCENE, "")
    unnamed = anima.ksampler(on, anima.encode(clip, SCENE), anima.encode(clip, ""))
    assert torch.equal(unnamed, meadow)
    assert torch.equal(anima.regional(SCENE, bank=bank), meadow)
    assert torch.equal(anima.regional(SCENE), meadow)


def test_the_backbone_predicts_what_the_sampler_predicts(anima, backbone):
    """The velocity, from the model's own `apply_model`, and also where gradients flow."""
    with torch.inference_mode(False), backbone.training():
        noise = torch.randn(2, 16, 8, 6, generator=torch.Generator().manual_seed(1))
        times = torch.tensor([120, 870])
        prompt = backbone.text[0].encode_pieces(())[0].repeat(2, 1, 1)
        sigma = backbone.schedule.sigma(times)
        with torch.no_grad():
            base, context = anima.model.model, Context(prompt.unsqueeze(1))
            denoised = base.apply_model(noise.unsqueeze(2), sigma, c_crossattn=prompt)[:, :, 0]
            plain = backbone.predict(noise, times, context)
        assert distance(plain, (noise - denoised) / sigma.view(-1, 1, 1, 1)) < 1e-4
        leaf = noise.clone().requires_grad_()
        live = backbone.predict(leaf, times, context)
        live.sum().backward()
        assert distance(live.detach(), plain) < 1e-5 and torch.isfinite(leaf.grad).all()


def test_a_caption_is_encoded_once_and_the_encoder_may_be_unloaded(anima, monkeypatch):
    import comfy.model_management as management

    texts, encode = [], type(anima.clip).encode_from_tokens

    def counted(self, tokens, *args, **kwargs):
        texts.append(len(tokens["t5xxl"][0]))
        return encode(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(anima.clip), "encode_from_tokens", counted)
    management.unload_all_models()
    anima.learn(method="slots", steps=6, captions=["<spot> sleeps", "a photo of <spot>"])
    assert len(texts) == 2
    loaded = [entry.model for entry in management.current_loaded_models]
    assert any(model is anima.model or model.is_clone(anima.model) for model in loaded)


def test_a_cancelled_run_resumes_bit_for_bit(anima, monkeypatch):
    import comfy.model_management as management

    from continual_concepts.nodes import folders, progress

    whole = anima.learn(method="slots", steps=4, name="rex")["rex"]
    for file in folders.checkpoint_folder().glob("rex-*.checkpoint"):
        file.unlink()      # the finished run's, which the same run would take
    report = progress.Reporter.__call__

    def cancelling(self, info):
        report(self, info)
        if info.step == 2:
            management.interrupt_current_processing()

    settings = [{"checkpoint_every": 1}]
    with monkeypatch.context() as patch:
        patch.setattr(progress.Reporter, "__call__", cancelling)
        with pytest.raises(management.InterruptProcessingException):
            anima.learn(method="slots", steps=4, name="rex", training_settings=settings)
    management.interrupt_current_processing(False)
    resumed = anima.learn(method="slots", steps=4, name="rex", training_settings=settings)["rex"]
    assert all(torch.equal(one, other) for place, delta in whole.deltas.items()
               for one, other in zip(delta.tensors(), resumed.deltas[place].tensors(), strict=True))


def test_regions(anima, learned):
    bank = learned[0]
    regions = [anima.region("<spot>", right=0.5), anima.region("<tom> in <ink>", left=0.5)]
    plain, pictures = anima.ksampler(anima.model, SCENE, ""), []
    for more in ({}, {"solo": 0.5}, {"region_noise": True}, {"isolation": 0.5}):
        pictures.append(anima.regional(SCENE, regions, bank, **more))
        assert torch.isfinite(pictures[-1]).all() and distance(pictures[-1], plain) > 1e-3
    assert len({round(distance(picture, plain), 6) for picture in pictures}) == len(pictures)
    assert torch.equal(anima.regional(SCENE, regions, bank), pictures[0])
    model, clip, positive = anima.aggregate("<ink> of <spot>", bank)
    whole = anima.ksampler(model, positive, anima.encode(clip, ""))
    assert distance(anima.regional(SCENE, [anima.region("<ink> of <spot>")], bank), whole) < 1e-5
    carrying, positive, negative = anima.apply_regions(regions, anima.encode(clip, SCENE), model=model,
                                                       clip=clip)
    assert distance(anima.ksampler(carrying, positive, negative), plain) > 1e-3
    assert distance(anima.regional("<spot> and <tom>", (), bank, find_regions=True), plain) > 1e-3
    assert torch.equal(anima.ksampler(anima.model, SCENE, ""), plain)


def test_other_nodes_patches_act_too(anima, learned):
    """An attn2 patch, which ComfyUI hands to the cross-attention, beside a concept's own."""
    model, clip, positive = anima.aggregate("a photo of <spot>", learned[0])
    halved, seen = model.clone(), []

    def halve(q, k, v, pe, attn_mask, extra_options):
        seen.append(extra_options["n_heads"])
        return {"v": v * 0.5}

    halved.set_model_patch(halve, "attn2_patch")
    one, two = (anima.ksampler(each, positive, anima.encode(clip, "")) for each in (model, halved))
    assert set(seen) == {16} and distance(one, two) > 1e-3


def test_a_style_exports_as_a_lora_that_comfyui_loads(anima, learned, tmp_path, caplog):
    import comfy.sd
    import comfy.utils

    from continual_concepts.core.bank.bank import ConceptBank
    from continual_concepts.core.comfy.backbone import ComfyBackbone
    from continual_concepts.core.interop.export import export_concept
    from continual_concepts.core.interop.importing import import_concept

    bank = learned[0]
    done = export_concept(bank, "ink", tmp_path, ["kohya", "embedding"])
    assert [file.name for file in done.files] == ["ink_lora.safetensors"]
    state = comfy.utils.load_torch_file(str(done.files[0]), safe_load=True)
    caplog.clear()
    loaded, _ = comfy.sd.load_lora_for_models(anima.model, None, state, 1.0, 0.0)
    assert "not loaded" not in caplog.text and len(loaded.patches) == len(bank["ink"].deltas)
    model, clip, positive = anima.aggregate("<ink>", bank)
    ours = anima.ksampler(model, positive, anima.encode(clip, ""))
    theirs = anima.ksampler(loaded, "painting painting", "")
    plain = anima.ksampler(anima.model, "painting painting", "")
    assert distance(theirs, ours) < 1e-3 < distance(plain, ours)
    sites = ComfyBackbone(anima.model, anima.clip)
    back = import_concept("brush", "thing", "style", bank.layout, sites.text, done.files[0],
                          trigger="painting painting")
    assert back.concept.info.class_noun == "painting painting" and "'painting painting'" in back.notes[0]
    model, clip, positive = anima.aggregate("<brush>", ConceptBank(bank.layout).add(back.concept))
    assert distance(anima.ksampler(model, positive, anima.encode(clip, "")), theirs) < 1e-5


def test_neurons_are_selected(anima):
    settings = {"prompt": "a dog", "score": "gradient", "unit": "weight", "share": 0.1, "quorum": 0.5,
                "draws": 1, "resolution": 64, "seed": 0}
    inputs = {"model": anima.model, "clip": anima.clip, **settings}
    selection, _, share = anima.pack.ConceptNeuronSelect.execute(
        images=anima.photos(1), vae=[anima.vae], calibration_prompts=["a cat"],
        **{key: [value] for key, value in inputs.items()}).args[:3]
    assert 0 < share < 1 and len(selection) > 0


@pytest.mark.parametrize("inputs, message", [
    ({"method": "cidm"}, "method 'cidm' learns words.*methods that work with this model: lora, slots"),
    ({"method": "slots", "noun": ""}, "class noun is empty"),
    ({"method": "slots", "method_settings": [{"learn_words": True}]}, "'learn_words' is True.*: False"),
])
def test_methods_that_learn_words_are_refused_before_any_work(anima, monkeypatch, inputs, message):
    monkeypatch.setattr(type(anima.vae), "encode", lambda *_: pytest.fail("a photo was encoded"))
    with pytest.raises(ConceptError, match=message):
        anima.learn(steps=1, **inputs)


def test_what_does_not_fit_is_refused(anima, studio, learned):
    for one, message in (({"clip": studio.clip}, "class is Anima, but the CLIP has the text encoders clip_l"),
                         ({"model": studio.model}, "the CLIP has the text encoder t5xxl"),
                         ({"model": studio.model, "clip": studio.clip}, "another base")):
        with pytest.raises(ConceptError, match=message):
            anima.aggregate("<spot>", learned[0], **one)
    for mode in ("paper", "released code"):
        with pytest.raises(ConceptError, match="words are class nouns; allowed: sharp, equal"):
            anima.aggregate("<ink>", learned[0], mode)
    assert anima.aggregate("", learned[0], "equal merge")[0].patches
    with pytest.raises(ConceptError, match=r"\(artists\) is 0.5.*has none; allowed: 0"):
        anima.regional("<spot> and <tom>", (), learned[0], artists=0.5)
    with pytest.raises(ConceptError, match="prompt has 601 tokens; with regions.*at most 512"):
        anima.regional("red " * 600, [anima.region("<spot>")], learned[0])
    with pytest.raises(ConceptError, match="5 frames of video; regions need one"):
        anima.regional(SCENE, [anima.region("<spot>")], learned[0],
                       latent={"samples": torch.zeros(1, 16, 5, 8, 8)})


def test_nodes_that_change_conditionings_keep_the_first_prompts_words(anima, learned):
    from continual_concepts.core.comfy.sites import WORDS

    clip, stock = anima.aggregate("", learned[0])[1], anima.stock
    one, other = (anima.encode(clip, prompt) for prompt in ("a (<spot>:0.5)", "<tom> at night"))
    for changed in (stock.ConditioningConcat().concat(one, other)[0],
                    stock.ConditioningZeroOut().zero_out(one)[0],
                    stock.ConditioningAverage().addWeighted(one, other, 0.3)[0],
                    stock.ConditioningSetTimestepRange().set_range(one, 0.0, 0.5)[0]):
        ours, theirs = changed[0][1], one[0][1]
        assert torch.equal(ours["t5xxl_ids"], theirs["t5xxl_ids"])
        assert torch.equal(ours["model_conds"][WORDS].cond, theirs["model_conds"][WORDS].cond)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_model_that_is_loaded_in_part(anima, learned, share):
    anima.check_loaded_in_part(learned[0], "<ink> of <spot>", share)


def test_weights_of_sixteen_bits(anima, pack, learned):
    """A model in bfloat16, as it is shipped: everything runs, and neutral settings stay plain."""
    with torch.inference_mode():
        half = type(anima)(pack, (anima_model(dtype=torch.bfloat16), anima.clip, anima.vae), None)
    half.side, half.latent = anima.side, anima.latent
    bank = half.learn(method="slots", steps=2)
    model, clip, positive = half.aggregate("a <spot>", bank)
    changed = half.ksampler(model, positive, half.encode(clip, ""))
    plain = half.ksampler(half.model, f"a {DOGS}", "")
    assert torch.isfinite(changed).all() and distance(changed, plain) > 1e-3
    full, clip, positive = anima.aggregate("a <spot>", learned[0])
    assert distance(changed, anima.ksampler(full, positive, anima.encode(clip, ""))) < 0.1
    assert torch.equal(half.regional(f"a {DOGS}", bank=bank), plain)
