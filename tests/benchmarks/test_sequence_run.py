"""One run of the continual benchmark on random weights: resumed, read back, alone, with prior pictures."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import replace

import pytest
import torch

from continual_concepts.benchmarks.continual import pictures
from continual_concepts.benchmarks.continual import sequence_run as continual
from continual_concepts.benchmarks.continual.judges import EncoderJudge
from continual_concepts.benchmarks.continual.pictures import Sampler
from continual_concepts.benchmarks.continual.prompt_suite import PromptSuite
from continual_concepts.benchmarks.continual.runs import STYLE_RATE, Run, settings_for
from continual_concepts.benchmarks.continual.sequence_run import learn_sequence, perform, prior_pictures
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank
from continual_concepts.core.data.assignment import Assignment
from continual_concepts.core.data.framing import Picture
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation import metrics
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings
from continual_concepts.core.training.config import TrainingConfig

QUICK = SampleSettings(steps=1, cfg=2.0, size=(32, 32))
SETTINGS = {"lr": 1e-2, "token_lr": 1e-2}
TRAINING = TrainingConfig(steps=2, batch_size=2, resolution=32, flip=False)
PLACES = [0, 1, 2]
TIMES = {"seconds_per_concept"}


def draw(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class ToyEncoder:
    """Features without training: a coarse picture through a fixed map, other per kind.

    A caption's are random from its letters.
    """

    reads_texts = True

    def features(self, images, kind):
        coarse = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return metrics.unit(coarse @ draw(48, 16, seed=1 if kind == "object" else 2))

    def image_text_features(self, images):
        return self.features(images, "text")

    def caption_features(self, captions):
        return metrics.unit(torch.cat([draw(1, 16, seed=zlib.crc32(caption.encode()))
                                       for caption in captions]))


def assignment(name, noun, kind, seed):
    references = draw(2, 3, 32, 32, seed=seed)
    prompts = (f"a <{name}>", f"<{name}> at night") if kind == "object" else (f"<{name}> of a dog",)
    nouns = tuple(prompt.replace(f"<{name}>", noun) for prompt in prompts)
    held_out = draw(2, 3, 32, 32, seed=seed + 1)
    return Assignment(name, noun, kind, tuple(Picture(p) for p in references), references, held_out, prompts,
                      nouns)


@pytest.fixture(scope="module")
def suite(slim_backbone):
    tasks = (assignment("rex", "dog", "object", 10), assignment("fido", "dog", "object", 20),
             assignment("chalk", "drawing", "style", 30))
    weights = sum(p.numel() for p in slim_backbone.unet.parameters())
    encoder = ToyEncoder()
    return PromptSuite(tasks, (("rex", "mimi"),), (("rex", "fido"),), ("a photo of {}", "{} at night"),
                       ("a dog", "a cat in a room"), encoder, {"encoder": EncoderJudge(encoder, tasks)},
                       QUICK, (1, 2), (3, 4), (3, 4), weights)


@pytest.fixture(scope="module")
def run(slim_backbone, suite, tmp_path_factory):
    def go(wanted, folder=None, places=None, **other):
        arguments = {"settings": SETTINGS, "training": TRAINING} | other
        return perform(Sampler(slim_backbone), suite, wanted, places or PLACES, folder=folder
                       or tmp_path_factory.mktemp("runs"), **arguments)
    return go


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(Run("ewc", 3, 0, 0), folder), folder


def judged(result, what):
    return result["judges"]["encoder"][what]


def without_times(result):
    return {name: value for name, value in result.items() if name not in TIMES}


def tensors_of(bank):
    found = {(c.name, key, i): t for c in bank for key, d in c.deltas.items()
             for i, t in enumerate(d.tensors())}
    return found | {(c.name, name): t for c in bank for name, t in c.tokens.vectors.items()}


def cut_at(name):
    """Callbacks that interrupt a run in the middle of a task."""
    def start(task):
        def callback(info):
            if task == name:
                raise KeyboardInterrupt
        return callback
    return start


def test_the_figures_of_a_run(whole, suite):
    result, folder = whole
    assert result["concepts"] == ["rex", "fido",
                                  "chalk"] and result["method"] == "ewc" and result["steps"] == 2
    assert result["kinds"] == ["object", "object", "style"] and len(result["text_alignment"]) == 3
    just, alone = judged(result, "just"), judged(result, "alone")
    assert len(just) == len(alone) == 3
    assert [row[i] for i, row in enumerate(judged(result, "bleed"))] == alone
    assert just[2] == pytest.approx(alone[2]) and just[0] != pytest.approx(alone[0])
    # the only group names somebody whom nobody taught
    assert len(judged(result, "pairs")) == 1 and judged(result, "groups") == []
    assert result["base_change"] > 0 and 0 < result["trained_share"] < 1 and result["bytes_per_concept"] > 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["ewc-n3-o0-s0.3.safetensors", "ewc-n3-o0-s0.json"]


def test_a_finished_run_is_read_and_not_run_again(whole, run, monkeypatch):
    result, folder = whole
    monkeypatch.setattr(continual, "learn", None)
    monkeypatch.setattr(pictures, "sample", None)
    assert run(Run("ewc", 3, 0, 0), folder) == json.loads(json.dumps(result))


def test_more_pictures_of_pairs_come_from_the_bank(whole, run, suite, slim_backbone, monkeypatch, tmp_path):
    result, folder = whole
    shutil.copytree(folder, tmp_path / "more")
    assert result["pair_pictures"] == 2
    more = replace(suite, pair_seeds=(3, 4, 5, 6))
    monkeypatch.setattr(continual, "learn", None)
    again = perform(Sampler(slim_backbone), more, Run("ewc", 3, 0, 0), PLACES, SETTINGS, TRAINING,
                    tmp_path / "more")
    assert again["pair_pictures"] == 4 and judged(again, "pairs") != judged(result, "pairs")
    for found in (one := json.loads(json.dumps(again)), other := json.loads(json.dumps(result))):
        del found["pair_pictures"], found["judges"]["encoder"]["pairs"]
    assert one == other
    assert json.loads((tmp_path / "more" / "ewc-n3-o0-s0.json").read_text()) == again
    assert run(Run("ewc", 3, 0, 0), tmp_path / "more") == result      # and back, by the same bank


def test_more_pictures_of_pairs_without_the_bank_are_a_new_run(whole, suite, slim_backbone, tmp_path):
    result, folder = whole
    shutil.copy(folder / "ewc-n3-o0-s0.json", tmp_path)
    more = replace(suite, pair_seeds=(3, 4, 5, 6))
    again = perform(Sampler(slim_backbone), more, Run("ewc", 3, 0, 0), PLACES, SETTINGS, TRAINING, tmp_path)
    assert again["pair_pictures"] == 4 and judged(again, "just") == judged(result, "just")
    assert (tmp_path / "ewc-n3-o0-s0.3.safetensors").exists()


# with shared state and folded weights; with neither
@pytest.mark.parametrize(("method", "task"), [("ewc", "chalk"), ("bound", "rex")])
def test_an_interrupted_run_equals_the_whole_one(run, whole, method, task, tmp_path):
    wanted = Run(method, 3, 0, 0)
    uncut, folder = whole if method == "ewc" else (run(wanted, tmp_path / "uncut"), tmp_path / "uncut")
    with pytest.raises(KeyboardInterrupt):
        run(wanted, tmp_path / "cut", callbacks=cut_at(task))
    assert not (tmp_path / "cut" / f"{wanted.name}.json").exists()
    learned = []
    again = run(wanted, tmp_path / "cut", callbacks=lambda name: learned.append(name))
    assert learned == ["rex", "fido", "chalk"][["rex", "fido", "chalk"].index(task):]
    assert without_times(again) == without_times(uncut)
    one, two = (tensors_of(open_bank(where / f"{wanted.name}.3.safetensors"))
                for where in (folder, tmp_path / "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_an_interruption_between_bank_and_progress_repeats_the_task(run, whole, monkeypatch, tmp_path):
    original = continual.Progress.save

    def broken(self, path):
        if len(self.names) == 2:
            raise OSError("no space left")
        original(self, path)

    monkeypatch.setattr(continual.Progress, "save", broken)
    with pytest.raises(OSError):
        run(Run("ewc", 3, 0, 0), tmp_path)
    monkeypatch.undo()
    assert without_times(run(Run("ewc", 3, 0, 0), tmp_path)) == without_times(whole[0])
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_files_of_other_settings_are_refused(run, whole, tmp_path):
    longer = replace(TRAINING, steps=3)
    with pytest.raises(ConceptError, match="steps 2, but 3 was requested"):
        run(Run("ewc", 3, 0, 0), whole[1], training=longer)
    with pytest.raises(KeyboardInterrupt):
        run(Run("bound", 3, 0, 0), tmp_path, callbacks=cut_at("fido"))
    with pytest.raises(ConceptError, match="settings"):
        run(Run("bound", 3, 0, 0), tmp_path, settings={"lr": 1e-3})
    path = tmp_path / "bound-n3-o0-s0.progress.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                if key != "made_with"}))
    # progress of before it was kept
    assert run(Run("bound", 3, 0, 0), tmp_path)["concepts"] == ["rex", "fido", "chalk"]


def test_the_order_is_respected_and_the_seed_is_the_trainings(run, whole):
    backwards = run(Run("ewc", 3, 1, 0), places=[2, 1, 0])
    assert backwards["concepts"] == ["chalk", "fido", "rex"]
    assert judged(backwards, "just")[2] == pytest.approx(judged(backwards, "alone")[2])
    assert judged(backwards, "just")[2] != pytest.approx(judged(whole[0], "just")[0])
    other = run(Run("ewc", 3, 0, 1), training=replace(TRAINING, seed=1))
    assert other["concepts"] == whole[0]["concepts"]
    assert judged(other, "alone") != judged(whole[0], "alone")


@pytest.mark.parametrize("method", ["ewc"])      # in one bank its tasks would be one set of weights
def test_alone_every_concept_is_what_it_is_on_an_empty_bank(run, slim_backbone, suite, method):
    result = run(Run(method, 3, 0, 0, alone=True))
    first = run(Run(method, 1, 0, 0), places=[1])      # fido as the only task
    assert judged(result, "just")[1] == judged(first, "just")[0]
    # whatever the others are, they are not there
    assert judged(result, "alone") == pytest.approx(judged(result, "just"))
    assert judged(result, "groups") == judged(result, "pairs") == []
    assert Run(method, 3, 0, 0, alone=True).name != Run(method, 3, 0, 0).name


@pytest.mark.parametrize(("method", "wants"), [("l2dm", True), ("ewc", False)])
def test_prior_pictures_for_methods_that_want_them(slim_backbone, suite, method, wants, monkeypatch,
                                                   tmp_path):
    seen, original = [], continual.prepare

    def prepare(backbone, pictures, *rest):
        seen.append([p.is_prior for p in pictures])
        return original(backbone, pictures, *rest)

    monkeypatch.setattr(continual, "prepare", prepare)
    learn_sequence(Sampler(slim_backbone), suite, Run(method, 1, 0, 0), [0], SETTINGS, TRAINING, tmp_path)
    assert seen == [[False] * 2 + [True] * 16 * wants]


def test_prior_pictures_are_the_untouched_bases(slim_backbone, suite):
    found = prior_pictures(Sampler(slim_backbone), suite, suite.tasks[0], 3)
    assert [p.caption for p in found] == ["a dog", "dog at night", "a dog"] and all(p.is_prior for p in found)
    expected = sample(slim_backbone, ConceptBank(slim_backbone.layout), ["a dog"], [9000], QUICK)[0]
    assert torch.allclose(found[0].pixels, expected, atol=1e-4)
    assert not torch.allclose(found[0].pixels, found[2].pixels, atol=1e-3)


def test_word_bound_concepts_do_not_change_the_base(run):
    assert run(Run("bound", 1, 0, 0), places=[0])["base_change"] == 0


@pytest.mark.slow
def test_sampling_overrides_use_the_same_bank_without_learning_again(run, monkeypatch, tmp_path):
    """Every mode's figures from the bank of the usual run equal those of a run that learned for itself."""
    whole = run(Run("cidm", 3, 0, 0), tmp_path / "shared")
    sampled = Run("cidm", 3, 0, 0, overrides="mode=equal")
    assert sampled.learned_as() == Run("cidm", 3, 0, 0) and sampled.settings() == {}
    assert sampled.sampling() == {"mode": "equal"}
    own = run(sampled, tmp_path / "own")
    monkeypatch.setattr(continual, "learn", None)
    shared = run(sampled, tmp_path / "shared")
    assert without_times(shared) == without_times(own)
    assert judged(shared, "alone") != judged(whole, "alone")
    assert shared["seconds_per_concept"] == whole["seconds_per_concept"] and shared["base_change"] > 0
    assert not list((tmp_path / "shared").glob("cidm+*.safetensors"))
    assert shared["method"] == "cidm+mode=equal"


def test_a_bank_of_another_order_is_refused(run, tmp_path):
    run(Run("cidm", 2, 0, 0), tmp_path, places=[0, 1])
    with pytest.raises(ConceptError, match="was made with concepts"):
        run(Run("cidm", 2, 0, 0, overrides="mode=equal"), tmp_path, places=[1, 0])


def test_files_of_an_earlier_version_are_refused(run, whole, tmp_path):
    stored = {name: value for name, value in whole[0].items() if name != "judges"}
    (tmp_path / "ewc-n3-o0-s0.json").write_text(json.dumps(stored))
    with pytest.raises(ConceptError, match="earlier version; choose another folder"):
        run(Run("ewc", 3, 0, 0), tmp_path)
    progress = {"names": ["rex"], "just": [[0.1, 0.2]], "features": [[]], "seconds": [1], "bytes": [1]}
    (tmp_path / "ewc-n3-o1-s0.progress.json").write_text(json.dumps(progress))
    with pytest.raises(ConceptError, match="earlier version; delete it"):
        run(Run("ewc", 3, 1, 0), tmp_path)


def test_a_concept_that_cannot_be_learned_names_its_run(run):
    with pytest.raises(continual.LearningError, match="ewc-n3-o0-s0: .*lr"):
        run(Run("ewc", 3, 0, 0), settings={"lr": 1e30, "token_lr": 1e30}, training=replace(TRAINING, steps=6))


def test_overrides_divide_into_learning_and_sampling():
    changed = Run("bound", 3, 0, 0, overrides="rank=2+mode=paper+apart=false")
    assert changed.settings() == {"rank": 2, "apart": False} and changed.sampling() == {"mode": "paper"}
    assert changed.learned_as().overrides == "rank=2+apart=false"
    longer = Run("bound", 3, 0, 0, overrides="steps=50+rank=2")
    assert longer.steps(200) == 50 and longer.settings() == {"rank": 2} and changed.steps(200) == 200
    for text in ("steps=0", "steps=x"):
        with pytest.raises(ConceptError, match=f"override '{text}' is no number of steps"):
            Run("bound", 3, 0, 0, overrides=text).steps(200)


def test_rates_of_styles_are_multiplied():
    settings = {"lr": 1e-3, "token_lr": 2e-2, "rank": 4, STYLE_RATE: 4.0}
    assert settings_for(settings, "style") == {"lr": 4e-3, "token_lr": 8e-2, "rank": 4}
    assert settings_for(settings, "object") == {"lr": 1e-3, "token_lr": 2e-2, "rank": 4}
    assert settings_for({"rank": 4}, "style") == {"rank": 4}
    assert Run("lora", 2, 0, 0, overrides="style_rate=4+rank=2").settings() == {"rank": 2, STYLE_RATE: 4.0}
    for text in ("0", "-1", "nan", "inf", "four"):
        with pytest.raises(ConceptError, match=f"override 'style_rate={text}' is no factor"):
            Run("lora", 2, 0, 0, overrides=f"style_rate={text}").settings()
