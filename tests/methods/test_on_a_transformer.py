"""Every method on a diffusion transformer with flow matching: learning, resuming, drawing, regions.

The properties that methods promise are tested on a UNet, see test_contract.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation.previews import Previews
from continual_concepts.core.methods import METHODS, Task, make
from continual_concepts.core.model.slots import SLOTS
from continual_concepts.core.regional.noise import NoiseSettings
from continual_concepts.core.regional.regions import Region
from continual_concepts.core.sampling.found import sample_found
from continual_concepts.core.sampling.regions import sample_regions
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.loop import learn
from continual_concepts.core.training.refinement import with_replay
from continual_concepts.tests.comparing import equal, tensors_of

SIZE = (32, 32)
QUICK = SampleSettings(steps=2, cfg=2.0, size=SIZE)
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
TWO = "a photo of <rex> and <mimi>"
FAST = {"cns": {"selection_steps": 1, "calibration": 1}, "scns": {"selection_steps": 1},
        "l2dm": {"eta": 1, "generation_steps": 1}, "mix_of_show": {"passes": 1, "rows": 4}}
# Every way of acting: slots, words, prompts, always on, sparse deltas.
WAYS = ["slots", "bound", "lora", "finetune", "cns"]
REPLAYING = ["lwf", "l2dm"]
REFINABLE = sorted(name for name, entry in METHODS.items() if entry.method.refinable)


@pytest.fixture(scope="module")
def two_of(tiny_transformer, teach):
    """two_of(method): what was learned of two concepts in sequence, `<rex>` and `<mimi>`."""
    made = {}

    def of(method):
        if method not in made:
            settings, empty = FAST.get(method), ConceptBank(tiny_transformer.layout)
            first = teach(tiny_transformer, empty, "rex", method, settings, steps=2)
            second = teach(tiny_transformer, first.bank, "mimi", method, settings, noun="cat", steps=2)
            made[method] = first, second
        return made[method]

    return of


@pytest.mark.parametrize("method", sorted(METHODS))
def test_two_concepts_are_learned_and_drawn(tiny_transformer, two_of, method, tmp_path):
    before = {name: p.clone() for name, p in tiny_transformer.denoiser.named_parameters()}
    first, second = two_of(method)
    save_bank(second.bank, tmp_path / "bank.safetensors")
    bank = open_bank(tmp_path / "bank.safetensors")
    for concept in bank:
        concept.check_fits(tiny_transformer.layout)
        assert all(torch.isfinite(t).all() for t in tensors_of(concept).values())
    rex, mimi, both = sample(tiny_transformer, bank, ["a <rex>", "a <mimi>", TWO], [1, 1, 2], QUICK)
    assert not torch.allclose(rex, mimi, atol=1e-3) and torch.isfinite(both).all()
    expected = sample(tiny_transformer, first.bank, ["a <rex>"], [1], QUICK)
    assert torch.equal(sample(tiny_transformer, bank.remove("mimi"), ["a <rex>"], [1], QUICK), expected)
    assert all(torch.equal(p, before[name]) and p.grad is None
               for name, p in tiny_transformer.denoiser.named_parameters())


@pytest.mark.parametrize("method", [*WAYS, *REPLAYING])
def test_a_stopped_task_resumes_bit_for_bit(tiny_transformer, teach, two_of, method, tmp_path):
    def stop(info):
        raise KeyboardInterrupt

    first, second = two_of(method)
    with pytest.raises(KeyboardInterrupt):
        teach(tiny_transformer, first.bank, "mimi", method, FAST.get(method), stop, tmp_path / "c",
              noun="cat", steps=2)
    again = teach(tiny_transformer, first.bank, "mimi", method, FAST.get(method), None, tmp_path / "c",
                  noun="cat", steps=2)
    assert again.losses == second.losses and equal(tensors_of(again.concept), tensors_of(second.concept))


@pytest.mark.parametrize("noise", [NoiseSettings(), NoiseSettings(crop_denoising=0.5)])
@pytest.mark.parametrize("method", WAYS)
def test_each_box_draws_its_own_concept(tiny_transformer, two_of, monkeypatch, method, noise):
    bank = two_of(method)[1].bank
    regions = [Region("a photo of <rex>", box=LEFT), Region("a photo of <mimi>", box=RIGHT)]
    settings = SampleSettings(steps=1, cfg=2.0, size=SIZE, noise=noise, isolation=1.0)
    monkeypatch.setattr(tiny_transformer, "decode_latents", lambda latents: latents)
    ours = sample_regions(tiny_transformer, bank, "a photo", regions, [3], settings)
    other = [regions[0], Region("a photo of a cat", box=RIGHT)]
    changed = sample_regions(tiny_transformer, bank, "a photo", other, [3], settings)
    assert torch.allclose(ours[..., :4], changed[..., :4], atol=1e-5)
    assert not torch.allclose(ours[..., 4:], changed[..., 4:], atol=1e-2)


def test_slots_act_only_in_prompts_that_name_them(tiny_transformer, two_of):
    bank = two_of("slots")[1].bank
    assert {key for key in bank["rex"].deltas} == {(index, SLOTS) for index in range(3)}
    plain = sample(tiny_transformer, ConceptBank(bank.layout), ["a photo of a dog"], [1], QUICK)
    assert torch.equal(sample(tiny_transformer, bank, ["a photo of a dog"], [1], QUICK), plain)


@pytest.mark.parametrize("method", ["slots", "lora"])
def test_found_regions_and_attention_guidance_run(tiny_transformer, two_of, method):
    bank = two_of(method)[1].bank
    settings = SampleSettings(steps=4, cfg=2.0, size=SIZE)
    plain = sample(tiny_transformer, bank, [TWO], [1], settings)
    found = sample_found(tiny_transformer, bank, TWO, [1], settings)
    guided = sample(tiny_transformer, bank, [TWO], [1], replace(settings, artists=1.0))
    for picture in (found, guided):
        assert torch.isfinite(picture).all() and not torch.equal(picture, plain)


@pytest.mark.parametrize("method", REFINABLE)
def test_photos_are_added_later(tiny_transformer, two_of, method):
    bank = two_of(method)[1].bank
    config = TrainingConfig(steps=2, batch_size=2, resolution=32, flip=False, replay=2)
    info = bank.infos["rex"]
    task = Task("rex", info.class_noun, tiny_transformer, bank.remove("rex"), words=info.words, refined=bank)
    photos = [Picture(torch.full((3, 32, 32), shade), "", digest=f"new {shade}") for shade in (-0.5, 0.5)]
    pictures = with_replay(task, photos, config, 2.0)
    data = prepare(tiny_transformer, pictures, "rex", "dog", Framing(32, flip=False))
    refined = learn(task, make(method, {"lr": 1e-2, "stored": "float32"}), data, config).bank
    assert refined.names == ["rex", "mimi"]
    assert not equal(tensors_of(refined["rex"]), tensors_of(bank["rex"]))
    assert equal(tensors_of(refined["mimi"]), tensors_of(bank["mimi"]))


def test_previews_are_drawn_and_scored(tiny_transformer, teach):
    seen = []

    def similarity(pictures):
        seen.append(pictures)
        return 0.5

    previews = Previews(tiny_transformer, "a photo of <rex>", QUICK, 0, similarity)
    bank = ConceptBank(tiny_transformer.layout)
    learned = teach(tiny_transformer, bank, method="slots", steps=1)
    assert previews.evaluate(learned.bank, 1) == 0.5 and len(seen) == 1


@pytest.mark.parametrize("settings", [{"timestep_sampling": "logit-normal"}, {"precision": "bfloat16"},
                                      {"gradient_checkpointing": True},
                                      {"noise_offset": 0.1, "caption_dropout": 0.5}])
@pytest.mark.parametrize("method", ["slots", "lora"])
def test_options_of_training(tiny_transformer, teach, two_of, method, settings):
    bank = ConceptBank(tiny_transformer.layout)
    learned = teach(tiny_transformer, bank, "rex", method, steps=2, **settings)
    plain = two_of(method)[0]
    same = torch.tensor(learned.losses).allclose(torch.tensor(plain.losses), atol=1e-6)
    assert all(loss > 0 for loss in learned.losses) and same == ("gradient_checkpointing" in settings)


def test_min_snr_weights_are_refused_before_any_step(tiny_transformer, teach):
    with pytest.raises(ConceptError, match="'min_snr_gamma' is 5; allowed: 0 for a base"):
        teach(tiny_transformer, ConceptBank(tiny_transformer.layout), min_snr_gamma=5.0,
              callback=pytest.fail)
