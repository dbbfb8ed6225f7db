"""L2DM: a memory of features, pictures chosen by Eq. 5, replay and distillation of the model before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from continual_concepts.core.attention.adapters import adapter_key
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import always_on_deltas, learning_deltas
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, Task, l2dm, make
from continual_concepts.core.methods.base import Forward
from continual_concepts.core.methods.l2dm import L2DM, LongTerm, rainbow_scores
from continual_concepts.core.neurons.recording import unet_features
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.objective import denoising_loss, draw, predict
from continual_concepts.core.training.trainer import Trainer

QUICK = {"generation_steps": 2, "cfg": 2.0, "old_prior": 0, "elasticity": 0.0}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def bank(slim_backbone, teach):
    bank = ConceptBank(slim_backbone.layout)
    for name, noun in (("rex", "dog"), ("mimi", "cat")):
        bank = teach(slim_backbone, bank, name, "l2dm", QUICK, steps=2, noun=noun).bank
    return bank


@pytest.fixture(scope="module")
def data(slim_backbone):
    pictures = [Picture(random(3, 32, 32, seed=i).clamp(-1, 1), "", digest=f"{i}") for i in range(3)]
    pictures += [Picture(random(3, 32, 32, seed=9).clamp(-1, 1), "a photo of a bear", is_prior=True)]
    return prepare(slim_backbone, pictures, "bear", "bear", Framing(32, flip=True))


def begun(backbone, bank, data, encode=None, **settings):
    method = make("l2dm", {"stored": "float32"} | QUICK | settings)
    method.begin(Task("bear", "bear", backbone, bank, encode=encode))
    method.on_data(data)
    return method


def test_scores_are_those_of_the_formula():
    """Eq. 5, term by term."""
    generated, real = random(3, 2, 5), random(3, 5, seed=1)
    scores = rainbow_scores(generated, real, 0.7)
    for i in range(3):
        for j in range(2):
            me, others = generated[i, j], generated.flatten(0, 1)
            different = sum(1 - float(F.cosine_similarity(me, other, dim=0)) for other in others) / 6
            close = float(F.cosine_similarity(me, real[i], dim=0))
            assert float(scores[i, j]) == pytest.approx(different + 0.7 * close, abs=1e-5)


def test_the_best_scoring_picture_is_kept(slim_backbone, bank, data, monkeypatch):
    """All candidates and their scores, against what the memory kept; candidates of a prompt are that prompt's
    pictures."""
    seen, original = [], l2dm.sample
    monkeypatch.setattr(l2dm, "sample", lambda *args: seen.append((args[2], original(*args))) or seen[-1][1])
    method = begun(slim_backbone, bank, data, eta=3)
    prompts, pictures = [prompt.text for prompt in seen[0][0]], seen[0][1]
    assert prompts == ["a photo of <rex>"] * 9 + ["a photo of <mimi>"] * 9
    latents = slim_backbone.encode_images(pictures)
    scores = rainbow_scores(unet_features(slim_backbone, latents).view(6, 3, -1), method.old.features, 1.0)
    for i, column in enumerate(scores.argmax(1).tolist()):
        assert torch.allclose(method.short.latents[i], latents[3 * i + column], atol=1e-5)
    assert method.short.weights.tolist() == pytest.approx([1 / 3] * 6)


def test_stored_captions_are_text_without_weights(slim_backbone, teach, data, monkeypatch):
    """The pictures are generated from what the concept was learned with."""
    seen, original = [], l2dm.sample
    monkeypatch.setattr(l2dm, "sample", lambda *args: seen.extend(args[2]) or original(*args))
    photos = [Picture(random(3, 32, 32), "<rex> (sharp:1.5), [old]", digest="0")]
    bank = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "l2dm", QUICK, steps=1,
                 pictures=photos).bank
    begun(slim_backbone, bank, data)
    expected = bank.vocabulary.parse_caption("<rex> (sharp:1.5), [old]")
    assert seen == [expected] * 2 and expected != bank.parse("<rex> (sharp:1.5), [old]")


def test_the_memory_has_every_real_picture_once(bank, slim_backbone, data):
    memory = LongTerm.read(bank.shared["l2dm"])
    assert memory.prompts == ("a photo of <>",) * 6
    assert memory.owners == tuple(bank[name].tokens.digest() for name in ("rex", "mimi")
                                  for _ in range(3))
    mine = begun(slim_backbone, bank, data).new
    assert mine.features.shape[0] == 3      # neither mirrored copies nor prior pictures
    own = data.latents[[0, 2, 4]]
    assert torch.allclose(mine.features, unet_features(slim_backbone, own), atol=1e-5)


def test_features_tell_pictures_apart_and_batches_not(slim_backbone):
    latents = random(5, 4, 8, 8)
    found = unet_features(slim_backbone, latents)
    assert found.shape[0] == 5
    assert torch.allclose(found[3:4], unet_features(slim_backbone, latents[3:4]), atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_a_renamed_concept_is_replayed_and_a_removed_one_is_forgotten(slim_backbone, bank, data):
    renamed = begun(slim_backbone, bank.rename("rex", "max"), data)
    assert set(renamed.short.prompts) == {"a photo of <max>", "a photo of <mimi>"}
    left = begun(slim_backbone, bank.remove("rex"), data)
    assert set(left.short.prompts) == {"a photo of <mimi>"}
    assert len(LongTerm.read(left.finish().shared).owners) == 3 + 3
    none = begun(slim_backbone, bank.remove("rex").remove("mimi"), data)
    assert none.short is None and len(LongTerm.read(none.finish().shared).owners) == 3


def test_the_memory_survives_a_file(slim_backbone, bank, data, tmp_path):
    save_bank(bank, tmp_path / "bank.safetensors")
    again = begun(slim_backbone, open_bank(tmp_path / "bank.safetensors"), data)
    assert torch.equal(again.short.latents, begun(slim_backbone, bank, data).short.latents)


@pytest.mark.parametrize("damage", [{"notes": torch.zeros(3, dtype=torch.uint8)},
                                    {"features": torch.zeros(2, 3)}, {"notes": None}])
def test_a_damaged_memory_is_refused(bank, damage):
    state = {key: value for key, value in {**bank.shared["l2dm"], **damage}.items() if value is not None}
    with pytest.raises(ConceptError, match="long-term memory"):
        LongTerm.read(state)


def test_another_feature_function_is_refused(slim_backbone, bank, data, monkeypatch):
    monkeypatch.setattr(L2DM, "features", staticmethod(lambda backbone, latents: latents.flatten(1)[:, :3]))
    with pytest.raises(ConceptError, match="length 192, this run.s have 3"):
        begun(slim_backbone, bank, data)
    assert begun(slim_backbone, ConceptBank(bank.layout), data).new.features.shape == (3, 3)


def test_every_old_task_is_replayed_alike(slim_backbone, bank, data, teach):
    """Also one that has fewer pictures."""
    single = [Picture(random(3, 32, 32), "", digest="0")]
    grown = teach(slim_backbone, bank.remove("mimi"), "tom", "l2dm", QUICK, steps=1, pictures=single).bank
    method = begun(slim_backbone, grown, data, replay=4000)
    batch = method.on_batch(data.draw(1, 0.0, torch.Generator().manual_seed(0)))
    prompts = batch.prompts[1:]
    assert method.short.prompts.count("a photo of <rex>") == 3 and len(method.short) == 4
    assert prompts.count("a photo of <tom>") / 4000 == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("replay", [1, 4])
def test_the_loss_is_the_papers_sum(slim_backbone, bank, data, replay):
    """The loop's weighted mean over the joined batch = mean over own and prior pictures (beta on the latter)
    + alpha sum over old tasks."""
    method = begun(slim_backbone, bank, data, alpha=0.5, beta=0.25, replay=replay)
    config, generator = TrainingConfig(resolution=32), torch.Generator().manual_seed(1)
    given = data.draw(2, 1.0, generator)
    batch = method.on_batch(given)
    assert batch.prompts[:4] == given.prompts and len(batch.prompts) == 4 + replay
    drawn = draw(batch, 1000, config, generator)
    context = encode_prompts(slim_backbone, bank.vocabulary.parse_all([""] * len(batch.prompts)), {})
    seen = predict(slim_backbone, batch, context, drawn, None)
    each = (seen.output - seen.target).square().mean((1, 2, 3))
    expected = (each[:2].sum() + 0.25 * each[2:4].sum()) / 4 + 0.5 * 2 * each[4:].mean()
    assert torch.allclose(denoising_loss(slim_backbone, seen, config), expected, rtol=1e-4)


def test_replay_is_decided_by_the_step(slim_backbone, bank, data):
    method, other = (begun(slim_backbone, bank, data, replay=3) for _ in range(2))
    given = data.draw(1, 1.0, torch.Generator().manual_seed(0))
    first = [method.next_batch(given).latents for _ in range(2)]      # two micro-batches of one step
    assert not torch.equal(*first)
    method.after_step(1)
    other.next_batch(given)      # a pass of a step that was broken off, or was not there
    other.after_step(1)
    assert torch.equal(method.on_batch(given).latents, other.on_batch(given).latents)


def seen_by(backbone, method, data, bank):
    """One joined batch through the model as the loop does it, the old sum folded."""
    generator = torch.Generator().manual_seed(3)
    batch = method.on_batch(data.draw(1, 0.0, generator))
    tokens = {name: bank[name].tokens for name in bank.names} | {"bear": method.token_group()}
    # for its vocabulary with the new word
    run = Trainer(method.task, make("finetune"), data, TrainingConfig(resolution=32))
    context = encode_prompts(backbone, run.vocabulary.parse_all(batch.prompts), tokens)
    return predict(backbone, batch, context, draw(batch, 1000, TrainingConfig(), generator),
                   method.processor())


def test_prior_pictures_of_old_classes_are_the_bases(slim_backbone, bank, data, monkeypatch):
    """The pretrained model draws them, without any concept, from the stored prompts with class nouns."""
    seen, original = [], l2dm.sample
    monkeypatch.setattr(l2dm, "sample", lambda *args: seen.append(args) or original(*args))
    method = begun(slim_backbone, bank, data, old_prior=2, prior_cfg=4.0)
    base = seen[1]
    assert [prompt.text for prompt in base[2]] == ["a photo of dog"] * 3 + ["a photo of cat"] * 3
    assert not len(base[1]) and base[4].cfg == 4.0
    assert method.prior.prompts == tuple(prompt.text for prompt in base[2]) and method.prior.is_prior.all()


def test_the_loss_has_the_prior_pictures_of_all_classes(slim_backbone, bank, data):
    """Eq. 4: beta times the sum over classes, beside alpha times the sum over old tasks."""
    method = begun(slim_backbone, bank, data, alpha=0.5, beta=0.25, replay=2, old_prior=3)
    config, generator = TrainingConfig(resolution=32), torch.Generator().manual_seed(1)
    batch = method.on_batch(data.draw(2, 0.0, generator))
    assert len(batch) == 2 + 2 + 3 and batch.is_prior.tolist() == [False] * 4 + [True] * 3
    drawn = draw(batch, 1000, config, generator)
    context = encode_prompts(slim_backbone, bank.vocabulary.parse_all([""] * len(batch)), {})
    seen = predict(slim_backbone, batch, context, drawn, None)
    each = (seen.output - seen.target).square().mean((1, 2, 3))
    expected = each[:2].mean() + 0.5 * 2 * each[2:4].mean() + 0.25 * 2 * each[4:].mean()
    assert torch.allclose(denoising_loss(slim_backbone, seen, config), expected, rtol=1e-4)
    assert (method.teacher.start, method.teacher.end) == (2, 4)      # prior pictures are not distilled


def test_elastic_distillation_counts_by_distance(slim_backbone, bank, data):
    """A picture that has moved most from the teacher counts most; the sum of the weights is that of uniform
    ones."""
    method = begun(slim_backbone, bank, data, replay=3, elasticity=1.0)
    with slim_backbone.folded(learning_deltas(bank, "l2dm", METHODS["l2dm"].method.builds_on_sum)):
        with torch.no_grad():
            method.adapters.up[adapter_key(1, "to_v")].add_(0.3)
        seen = seen_by(slim_backbone, method, data, bank)
        found = method.teacher.distillation(seen, 1.0)
        even = method.teacher.distillation(seen, 0.0)
        old = slim_backbone.predict(seen.noisy[1:], seen.timesteps[1:], seen.context[1:])
    d = (seen.output[1:] - old).square().mean((1, 2, 3))
    torch.testing.assert_close(found, d.square().sum() / d.sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(even, d.mean(), rtol=1e-4, atol=0)
    assert found > even > 0


def test_the_users_image_encoder_describes_pictures(slim_backbone, data):
    """It gets pictures, as the autoencoder returns them."""
    def encode(pictures):
        return pictures.flatten(2).mean(-1)

    method = begun(slim_backbone, ConceptBank(slim_backbone.layout), data, encode=encode)
    own = slim_backbone.decode_latents(data.latents[[0, 2, 4]])
    torch.testing.assert_close(method.new.features, encode(own), rtol=1e-4, atol=1e-5)


def test_distillation_is_the_distance_to_the_model_before(slim_backbone, bank, data):
    method = begun(slim_backbone, bank, data, mu=2.0, replay=2)
    with slim_backbone.folded(learning_deltas(bank, "l2dm", METHODS["l2dm"].method.builds_on_sum)):
        # at the start they are one
        assert method.penalty(seen_by(slim_backbone, method, data, bank))["distillation"].item() < 1e-8
        with torch.no_grad():
            method.adapters.up[adapter_key(1, "to_v")].add_(0.3)
        seen = seen_by(slim_backbone, method, data, bank)
        term = method.penalty(seen)["distillation"]
    assert seen.batch.prompts[1:] != ("", ) * 2
    assert all("bear" not in prompt for prompt in seen.batch.prompts[1:])
    with slim_backbone.folded(always_on_deltas(bank)):
        old = slim_backbone.predict(seen.noisy[1:], seen.timesteps[1:], seen.context[1:])
    assert torch.allclose(term, 2 * (seen.output[1:] - old).square().mean(), rtol=1e-4) and term > 1e-6
    term.backward()
    assert method.adapters.up[adapter_key(1, "to_v")].grad.any()
    # replay names old words only
    assert all(vector.grad is None or not vector.grad.any() for vector in method.words.parameters())


def test_the_teacher_computes_in_the_students_precision(slim_backbone, bank, teach):
    """The adapter has not moved in the first step, so both give the same."""
    infos = []
    teach(slim_backbone, bank, "bear", "l2dm", QUICK, steps=1, precision="bfloat16", callback=infos.append)
    assert infos[0].terms["distillation"] < 1e-8


def test_another_batch_has_no_distillation(slim_backbone, bank, data):
    method = begun(slim_backbone, bank, data)
    given = data.draw(1, 0.0, torch.Generator().manual_seed(0))
    method.on_batch(given)
    assert method.penalty(Forward(given, None, *[torch.zeros(1)] * 4)) == {}


def test_turned_off_it_is_plain_learning(slim_backbone, bank, data):
    method = begun(slim_backbone, bank, data, alpha=0.0, mu=0.0)
    given = data.draw(2, 1.0, torch.Generator().manual_seed(0))
    batch = method.on_batch(given)
    assert torch.equal(batch.weights, given.weights) and batch.latents is given.latents


def test_generating_leaves_the_model_and_the_gradients_alone(slim_backbone, bank, data):
    before = [p.detach().clone() for p in slim_backbone.unet.parameters()]
    method = begun(slim_backbone, bank, data)
    assert all(torch.equal(p, b) for p, b in zip(slim_backbone.unet.parameters(), before, strict=True))
    assert not method.short.latents.requires_grad and method.short.latents.is_contiguous()


def test_keys_and_values_alone_are_trained(bank):
    for concept in bank:
        assert {projection for _, projection in concept.deltas} == {"to_k", "to_v"}


@pytest.mark.parametrize("settings",
                         [{"eta": 0}, {"replay": 0}, {"alpha": -1.0}, {"mu": -0.1}, {"closeness": -1.0}])
def test_its_settings_are_checked(settings):
    with pytest.raises(ConceptError, match=f"'{next(iter(settings))}'"):
        make("l2dm", settings)
    assert replace(make("l2dm").config, mu=0.0).mu == 0.0
