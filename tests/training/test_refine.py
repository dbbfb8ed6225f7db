"""Refining: photos are added to a concept later; what it knew stays, and so do its name, place and words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.concepts import ConceptInfo, Provenance
from continual_concepts.core.bank.store import add_concept, restore
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, Task, make
from continual_concepts.core.training import refinement, trainer
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.loop import learn
from continual_concepts.core.training.objective import denoising_loss
from continual_concepts.core.training.record import MOST_CAPTIONS
from continual_concepts.core.training.refinement import (
    PROMPTS,
    check_refinable,
    check_start,
    knows_all,
    replay_prompts,
    settings_of,
    with_replay,
)
from continual_concepts.core.training.trainer import Trainer
from continual_concepts.tests.comparing import same
from continual_concepts.tests.quick import thinned

REFINABLE = sorted(name for name, entry in METHODS.items() if entry.method.refinable)
OTHERS = sorted(set(METHODS) - set(REFINABLE))


def photos(seed: int, count: int = 3) -> list[Picture]:
    g = torch.Generator().manual_seed(seed)
    return [Picture(torch.rand(3, 32, 32, generator=g) * 2 - 1, "", digest=f"{seed}.{i}")
            for i in range(count)]


def start(backbone, bank, name="rex", settings=None, replay=2, **training):
    """Task, method, data and configuration of a refinement with new photos."""
    config = TrainingConfig(**({"steps": 3, "batch_size": 2, "resolution": 32, "flip": False,
                                "replay": replay} | training))
    info = check_refinable(bank, name)
    task = Task(name, info.class_noun, backbone, bank.remove(name), info.kind, info.words, refined=bank)
    data = prepare(backbone, with_replay(task, photos(50), config, 2.0), name, info.class_noun,
                   Framing(32, "crop", False))
    return task, make(info.method, settings_of(info, settings or {})), data, config


def refine(backbone, bank, *given, callback=None, checkpoint_file=None, **named):
    return learn(*start(backbone, bank, *given, **named), callback, checkpoint_file)


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Replayed pictures take two steps of the sampler."""
    monkeypatch.setattr(refinement, "STEPS", 2)


@pytest.fixture(scope="module")
def learned(slim_backbone, teach):
    """learned(method, kind): a bank with <rex>, and <mimi> behind it, stored as users store them."""
    banks = {}

    def bank(method="slots", kind="object") -> ConceptBank:
        if (method, kind) not in banks:
            made = ConceptBank(slim_backbone.layout)
            for name in ("rex", "mimi"):
                made = teach(slim_backbone, made, name, method, {"stored": "float16"}, kind=kind,
                             steps=2).bank
            banks[method, kind] = made
        return banks[method, kind]

    return bank


def test_the_default_and_the_methods_of_separate_concepts_can_be_refined():
    from continual_concepts.core.methods import DEFAULT

    assert {"bound", "cidm", "lora", "slots", "tara", "textual_inversion", "tova", DEFAULT} == set(REFINABLE)


@pytest.mark.parametrize("method, kind", [*((name, "object") for name in REFINABLE), ("slots", "style")])
def test_a_start_gives_the_stored_tensors_back(slim_backbone, learned, method, kind):
    bank = learned(method, kind)
    task, fresh, _, _ = start(slim_backbone, bank)
    fresh.begin(task)
    assert method == "textual_inversion" or not same(bank["rex"], replace(
        bank["rex"], tokens=fresh.finish().tokens, deltas=fresh.finish().deltas))
    fresh.start_from(bank["rex"])
    outcome = fresh.finish()
    assert same(bank["rex"], replace(bank["rex"], tokens=outcome.tokens, deltas=outcome.deltas))
    assert outcome.tokens.placeholder_noun == bank["rex"].tokens.placeholder_noun


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_refused_in_one_sentence(slim_backbone, make_concept, method):
    concept = make_concept(slim_backbone.layout, "rex")
    info = replace(concept.info, method=method)
    bank = ConceptBank(slim_backbone.layout).add(replace(concept, info=info))
    refused = f"'{method}' cannot be refined, because .* methods that can: .*slots"
    with pytest.raises(ConceptError, match=refused):
        check_refinable(bank, "rex")


@pytest.mark.parametrize("given, message", [
    ({"class_noun": "cat"}, "class noun of concept 'rex' is 'dog', now 'cat'"),
    ({"kind": "style"}, "kind of concept 'rex' is 'object', now 'style'"),
    ({"method": "lora"}, "method of concept 'rex' is 'slots', now 'lora'"),
    ({"words": ("rex1",)}, "words of concept 'rex' is 'rex-1")])
def test_noun_kind_method_and_words_stay(learned, given, message):
    with pytest.raises(ConceptError, match=message):
        check_refinable(learned(), "rex", **given)
    assert isinstance(check_refinable(learned(), "rex", class_noun=" dog ", kind="", method="slots"),
                      ConceptInfo)


def test_what_is_not_there_cannot_be_refined(learned):
    with pytest.raises(ConceptError, match="no concept 'fido' that could be refined; it holds rex, mimi"):
        check_refinable(learned(), "fido")
    with pytest.raises(ConceptError, match="it holds none; learn it first"):
        check_refinable(None, "fido")


@pytest.mark.parametrize("method, settings, message", [
    ("lora", {"rank": 2}, "factors of to_q at site 0 are .*x4, the settings of the method need .*x2"),
    ("lora", {"scale": 2.0}, "scale 1; .* scale 2"), ("lora", {"layerwise": False}, "words for clip_l"),
    ("lora", {"projections": "v"}, "has a delta of to_k"), ("slots", {"slots": 4}, "slots of site 0")])
def test_settings_that_do_not_fit_the_concept_are_refused(slim_backbone, learned, method, settings, message):
    with pytest.raises(ConceptError, match=message):
        refine(slim_backbone, learned(method), settings=settings)


@pytest.mark.parametrize("method, settings", [("lora", {"rank": 2}), ("slots", {"slots": 4}),
                                              ("slots", {"learn_words": True})])
def test_settings_that_do_not_fit_are_found_without_drawing(slim_backbone, learned, method, settings):
    task, _, _, _ = start(slim_backbone, learned(method), replay=0)
    with pytest.raises(ConceptError, match="of the method need"):
        check_start(task, make(method, settings_of(task.start.info, settings)))
    state = task.generator.get_state()
    check_start(task, make(method, settings_of(task.start.info, {})))
    assert torch.equal(task.generator.get_state(), state)


def test_locked_keys_are_computed_again(slim_backbone, teach):
    bank = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "tova", {"lock_keys": True},
                 steps=2).bank
    again = refine(slim_backbone, bank, steps=1).concept
    assert again.deltas.keys() == bank["rex"].deltas.keys() and (0, "to_k") in again.deltas


def test_captions_of_new_photos_must_name_the_concept(slim_backbone, learned):
    bank = learned()
    task, method, data, config = start(slim_backbone, bank)
    captions = tuple("a dog" if not prior else caption
                     for caption, prior in zip(data.captions, data.is_prior.tolist(), strict=True))
    with pytest.raises(ConceptError, match="no caption of concept 'rex' names it"):
        learn(task, method, replace(data, captions=captions), config)


@pytest.mark.parametrize("record", [[], "lost", {"method": 3}, {"method": {"slots": 8, "unknown": 1}}])
def test_a_concept_without_a_readable_record_is_refined_with_the_usual_settings(learned, record):
    info = learned()["rex"].info
    info = replace(info, provenance=replace(info.provenance, settings=record))
    assert set(settings_of(info, {"lr": 0.1})) <= {"slots", "lr"}


@pytest.mark.parametrize("method", ["slots", "cidm"])
def test_a_refined_concept_keeps_its_place_and_says_what_it_was_learned_from(slim_backbone, learned, method):
    bank = learned(method)
    result = refine(slim_backbone, bank)
    before, after = bank["rex"].info, result.bank["rex"].info
    assert result.bank.names == ["rex", "mimi"] == bank.names
    assert not same(result.bank["rex"], bank["rex"]) and same(result.bank["mimi"], bank["mimi"])
    assert (after.words, after.class_noun, after.kind, after.method, after.composes) == \
        (before.words, before.class_noun, before.kind, before.method, before.composes)
    origin = after.provenance
    assert origin.images == (*before.provenance.images, "50.0", "50.1", "50.2") and origin.steps == 3
    assert [dict(run) for run in origin.refined] == [{
        "date": before.provenance.date, "steps": 2, "seconds": before.provenance.seconds, "photos": 3}]
    assert ConceptInfo.from_json(after.to_json()) == after and "refined" not in before.to_json()["provenance"]
    assert "captions" not in replace(before, provenance=Provenance()).to_json()["provenance"]
    assert knows_all(after, photos(50)) and not knows_all(after, photos(51))
    twice = refine(slim_backbone, result.bank, steps=1).bank["rex"].info.provenance
    assert [run["steps"] for run in twice.refined] == [2, 3] and twice.images == origin.images


def test_the_earlier_version_can_be_restored(slim_backbone, learned, tmp_path):
    bank, file = learned(), tmp_path / "bank.safetensors"
    for concept in bank:
        add_concept(file, concept, {}, ConceptBank(bank.layout))
    result = refine(slim_backbone, bank, steps=1)
    grown = add_concept(file, result.concept, {}, bank.remove("rex"), in_place=True)
    assert grown.names == ["rex", "mimi"] and same(grown["rex"], result.concept)
    assert same(restore(file)["rex"], bank["rex"])


def test_replayed_pictures_are_taught_what_the_concept_predicted(slim_backbone, learned):
    """At the start the concept is still what it was. So the loss of these rows is zero."""
    task, method, data, config = start(slim_backbone, learned(), replay=4)
    assert int(data.is_prior.sum()) == 4 and all("<rex>" in caption for caption in data.captions)
    trainer, rows = Trainer(task, method, data, config), []
    assert trainer.before is not None
    taught = trainer.before.taught

    def seen(*given):
        result = taught(*given)
        rows.append(((result.output - result.target).abs().amax((1, 2, 3)), result.batch.is_prior))
        return result

    trainer.before.taught = seen
    with trainer.session():
        trainer.step()
        trainer.step()
    (first, is_prior), (second, again) = rows
    assert first[is_prior].max() < 1e-4 < 0.1 < first[~is_prior].min()
    assert second[again].max() > 1e-4      # the concept has changed, the target has not


def test_replay_keeps_what_the_concept_knew(slim_backbone, learned):
    bank = learned()

    def change(replay: int) -> float:
        """How far a refined concept has moved from what it predicted for its own pictures."""
        refined = refine(slim_backbone, bank, replay=replay, steps=20).concept
        trainer, changes = Trainer(*start(slim_backbone, bank, replay=4)), []
        trainer.method.start_from(refined)
        taught = trainer.before.taught

        def seen(*given):
            result = taught(*given)
            difference = (result.output - result.target).detach()
            changes.append(float(difference[result.batch.is_prior].square().mean()))
            return result

        trainer.before.taught = seen
        with trainer.session():
            trainer.step()
        return changes[0]

    assert change(4) < 0.75 * change(0)


def captioned(bank, *captions):
    """The bank with these captions in the record of <rex>."""
    concept = bank["rex"]
    origin = replace(concept.info.provenance, captions=captions)
    return bank.replace(replace(concept, info=replace(concept.info, provenance=origin)))


def test_the_record_holds_different_captions_of_all_runs(slim_backbone, learned):
    bank = captioned(learned(), "<> at night", "a photo of <>")
    task, method, data, config = start(slim_backbone, bank)
    assert len(data.captions) == 5      # two are replayed
    given = ("<rex> on a beach", "a photo of <rex>", "<rex> and <mimi>", *data.captions[3:])
    origin = learn(task, method, replace(data, captions=given), config).concept.info.provenance
    assert origin.captions == ("<> at night", "a photo of <>", "<> on a beach", "<> and <mimi>")
    assert learned()["rex"].info.provenance.captions == ("a photo of <>",)


def test_a_record_holds_few_captions_of_many(slim_backbone, learned):
    task, method, data, config = start(slim_backbone, captioned(learned(), *(f"<> {i}" for i in range(100))))
    kept = learn(task, method, data, config).concept.info.provenance.captions
    assert len(kept) == len(set(kept)) == MOST_CAPTIONS and kept[0] == "<> 0" and kept[-1] == "<> 97"


@pytest.mark.parametrize("captions, prompts", [
    (("a photo of <> (2019)", "<> and <mimi>"), ["a photo of <rex> (2019)", "<rex> and <mimi>"]),
    (("<> and <fido>", "a dog", "<> asleep", "<>" + 1000 * " "), ["<rex> asleep"]),
    (("<> and <fido>",), [text.format("<rex>") for text in PROMPTS["object"]]),
    ((), [text.format("<rex>") for text in PROMPTS["object"]])])
def test_captions_of_the_record_are_replayed(slim_backbone, learned, captions, prompts):
    bank = captioned(learned(), *captions)
    data = start(slim_backbone, bank, replay=6)[2]
    pairs = zip(data.captions, data.is_prior.tolist(), strict=True)
    replayed = [caption for caption, is_prior in pairs if is_prior]
    assert replayed == [prompts[i % len(prompts)] for i in range(6)]


def test_captions_follow_a_renamed_concept(slim_backbone, learned):
    bank = captioned(learned(), "<> asleep").rename("rex", "tom")
    info = bank.infos["tom"]
    task = Task("tom", "dog", slim_backbone, bank.remove("tom"), "object", info.words, refined=bank)
    assert [prompt.text for prompt in replay_prompts(task)] == ["<tom> asleep"]


def test_no_pictures_are_replayed_where_none_are_asked_for_or_nothing_is_refined(slim_backbone, learned):
    assert not start(slim_backbone, learned(), replay=0)[2].is_prior.any()
    assert not start(slim_backbone, learned(), prior_weight=0.0)[2].is_prior.any()
    new = Task("rex", "dog", slim_backbone, ConceptBank(slim_backbone.layout))
    assert len(with_replay(new, photos(1), TrainingConfig(resolution=32), 2.0)) == 3


def test_replayed_pictures_count_twice_and_other_prior_pictures_once(slim_backbone, learned, monkeypatch):
    task, method, _, config = start(slim_backbone, learned(), prior_weight=0.25, batch_size=6)
    prior = [replace(photo, caption="a photo of a dog", is_prior=True) for photo in photos(60)]
    pictures = with_replay(task, [*photos(50), *prior], config, 2.0)
    data = prepare(slim_backbone, pictures, "rex", "dog", Framing(32, "crop", False))
    weights = {}

    def recorded(backbone, seen, config):
        batch = seen.batch
        for text, is_prior, weight in zip(batch.prompts, batch.is_prior.tolist(), batch.weights.tolist(),
                                          strict=True):
            weights["photo" if not is_prior else "replayed" if "<rex>" in text else "other"] = weight
        return denoising_loss(backbone, seen, config)

    monkeypatch.setattr(trainer, "denoising_loss", recorded)
    Trainer(task, method, data, config).step()
    assert weights == {"photo": 1.0, "replayed": 0.5, "other": 0.25}


@pytest.mark.parametrize(("method", "training"), thinned([
    ("slots", {}), ("cidm", {"batch_size": 1}), ("tara", {"caption_dropout": 0.5}),
    ("bound", {"precision": "bfloat16", "min_snr_gamma": 5.0, "gradient_checkpointing": True})
], lambda place: place in (0, 3)))
def test_a_stopped_refinement_resumes_bit_for_bit(slim_backbone, learned, tmp_path, method, training):
    file, bank = tmp_path / "run.safetensors", learned(method)
    whole = refine(slim_backbone, bank, **training)

    def stop(info):
        if info.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(slim_backbone, bank, callback=stop, checkpoint_file=file, **training)
    resumed = refine(slim_backbone, bank, checkpoint_file=file, **training)
    assert resumed.losses == whole.losses and same(resumed.concept, whole.concept)


def test_checkpoints_of_learning_and_refining_do_not_mix(slim_backbone, learned, tmp_path):
    file, bank = tmp_path / "run.safetensors", learned()
    refine(slim_backbone, bank, replay=0, checkpoint_file=file)
    task, method, data, config = start(slim_backbone, bank, replay=0)
    with pytest.raises(ConceptError, match="belongs to another run: its refined concept is"):
        learn(replace(task, refined=None), method, data, config, checkpoint_file=file)


def test_previews_show_the_refined_concept(slim_backbone, learned):
    banks = []
    refine(slim_backbone, learned(), callback=lambda info: banks.append(info.snapshot()))
    assert [set(bank.names) for bank in banks] == [{"rex", "mimi"}] * 3
    assert not same(banks[0]["rex"], banks[2]["rex"])
