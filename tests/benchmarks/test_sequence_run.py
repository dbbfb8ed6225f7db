"""One cell of the continual benchmark on random weights: cut and resumed, read back, alone, with prior pictures, in an order."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import replace

import pytest
import torch

from continual_concepts.benchmarks.continual import sequence_run as continual
from continual_concepts.benchmarks.continual.runs import Cell
from continual_concepts.benchmarks.continual.sequence_run import Suite, learn_sequence, prior_pictures, run_cell
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
    """Features without training: a coarse picture through a fixed map, other per kind; a caption's are random from its letters."""

    def features(self, images, kind):
        coarse = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return metrics.unit(coarse @ draw(48, 16, seed=1 if kind == "object" else 2))

    def image_text_features(self, images):
        return self.features(images, "text")

    def caption_features(self, captions):
        return metrics.unit(torch.cat([draw(1, 16, seed=zlib.crc32(caption.encode())) for caption in captions]))


def assignment(name, noun, kind, seed):
    references = draw(2, 3, 32, 32, seed=seed)
    prompts = (f"a <{name}>", f"<{name}> at night") if kind == "object" else (f"<{name}> of a dog",)
    nouns = tuple(prompt.replace(f"<{name}>", noun) for prompt in prompts)
    held_out = draw(2, 3, 32, 32, seed=seed + 1)
    return Assignment(name, noun, kind, tuple(Picture(p) for p in references), references, held_out, prompts, nouns)


@pytest.fixture(scope="module")
def suite(tiny_backbone):
    tasks = (assignment("rex", "dog", "object", 10), assignment("fido", "dog", "object", 20), assignment("chalk", "drawing", "style", 30))
    weights = sum(p.numel() for p in tiny_backbone.unet.parameters())
    levels = dict.fromkeys(("rex", "fido", "chalk"), 0.1)
    return Suite(tasks, (("rex", "mimi"),), (("rex", "fido"),), ("a photo of {}", "{} at night"), ("a dog", "a cat in a room"),
                 ToyEncoder(), QUICK, (1, 2), (3, 4), (3, 4), levels, weights)


@pytest.fixture(scope="module")
def run(tiny_backbone, suite, tmp_path_factory):
    def go(cell, folder=None, places=None, **other):
        arguments = {"settings": SETTINGS, "training": TRAINING} | other
        return run_cell(tiny_backbone, suite, cell, places or PLACES, folder=folder or tmp_path_factory.mktemp("cells"), **arguments)
    return go


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(Cell("ewc", 3, 0, 0), folder), folder


def without_times(result):
    return {name: value for name, value in result.items() if name not in TIMES}


def tensors_of(bank):
    found = {(c.name, key, i): t for c in bank for key, d in c.deltas.items() for i, t in enumerate(d.tensors())}
    return found | {(c.name, name): t for c in bank for name, t in c.tokens.vectors.items()}


def cut_at(name):
    """Progress that ends a run in the middle of a task."""
    def start(task):
        def callback(info):
            if task == name:
                raise KeyboardInterrupt
        return callback
    return start


def test_a_cells_figures(whole, suite):
    result, folder = whole
    assert result["concepts"] == ["rex", "fido", "chalk"] and result["method"] == "ewc" and result["steps"] == 2
    for name in ("just_learned", "image_alignment", "text_alignment", "retention", "forgetting"):
        assert len(result[name]) == 3
    assert [len(row) for row in result["bleed"]] == [2, 2]      # objects alone
    assert result["forgetting"] == pytest.approx([a - b for a, b in zip(result["just_learned"], result["image_alignment"], strict=True)])
    assert result["just_learned"][2] == result["image_alignment"][2] and result["just_learned"][0] != result["image_alignment"][0]
    assert "confusion" in result and "multi_alignment" not in result      # the only group names somebody whom nobody taught
    assert result["base_drift"] > 0 and 0 < result["trained_share"] < 1 and result["bytes_per_concept"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["ewc-n3-o0-s0.3.safetensors", "ewc-n3-o0-s0.json"]


def test_a_finished_cell_is_read_and_not_run_again(whole, run, monkeypatch):
    result, folder = whole
    monkeypatch.setattr(continual, "learn", None)
    monkeypatch.setattr(continual, "sample", None)
    assert run(Cell("ewc", 3, 0, 0), folder) == json.loads(json.dumps(result))


def test_more_pictures_of_pairs_are_made_from_the_cells_bank(whole, run, suite, tiny_backbone, monkeypatch, tmp_path):
    result, folder = whole
    shutil.copytree(folder, tmp_path / "more")
    assert result["pair_pictures"] == 2
    more = replace(suite, pair_seeds=(3, 4, 5, 6))
    monkeypatch.setattr(continual, "learn", None)
    again = run_cell(tiny_backbone, more, Cell("ewc", 3, 0, 0), PLACES, SETTINGS, TRAINING, tmp_path / "more")
    assert again["pair_pictures"] == 4 and again["pair_alignment"] != result["pair_alignment"]
    for found in (one := dict(again), other := json.loads(json.dumps(result))):
        for name in ("pair_pictures", "pair_alignment", "confusion"):
            found.pop(name)
    assert one == other
    assert json.loads((tmp_path / "more" / "ewc-n3-o0-s0.json").read_text()) == again
    assert run(Cell("ewc", 3, 0, 0), tmp_path / "more") == result      # and back, by the same bank


def test_more_pictures_of_pairs_without_the_bank_are_a_new_run(whole, suite, tiny_backbone, tmp_path):
    result, folder = whole
    shutil.copy(folder / "ewc-n3-o0-s0.json", tmp_path)
    more = replace(suite, pair_seeds=(3, 4, 5, 6))
    again = run_cell(tiny_backbone, more, Cell("ewc", 3, 0, 0), PLACES, SETTINGS, TRAINING, tmp_path)
    assert again["pair_pictures"] == 4 and again["just_learned"] == result["just_learned"]
    assert (tmp_path / "ewc-n3-o0-s0.3.safetensors").exists()


@pytest.mark.parametrize(("method", "task"), [("ewc", "chalk"), ("bound", "rex")])      # with shared state and folded weights; with neither
def test_a_cut_run_resumed_equals_the_whole_one(run, whole, method, task, tmp_path):
    cell = Cell(method, 3, 0, 0)
    uncut, folder = whole if method == "ewc" else (run(cell, tmp_path / "uncut"), tmp_path / "uncut")
    with pytest.raises(KeyboardInterrupt):
        run(cell, tmp_path / "cut", progress=cut_at(task))
    assert not (tmp_path / "cut" / f"{cell.name}.json").exists()
    learned = []
    again = run(cell, tmp_path / "cut", progress=lambda name: learned.append(name))
    assert learned == ["rex", "fido", "chalk"][["rex", "fido", "chalk"].index(task):]
    assert without_times(again) == without_times(uncut)
    one, two = (tensors_of(open_bank(where / f"{cell.name}.3.safetensors")) for where in (folder, tmp_path / "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_cut_between_bank_and_progress_learns_that_task_again(run, whole, monkeypatch, tmp_path):
    original = continual.Progress.save

    def broken(self, path):
        if len(self.names) == 2:
            raise OSError("no space left")
        original(self, path)

    monkeypatch.setattr(continual.Progress, "save", broken)
    with pytest.raises(OSError):
        run(Cell("ewc", 3, 0, 0), tmp_path)
    monkeypatch.undo()
    assert without_times(run(Cell("ewc", 3, 0, 0), tmp_path)) == without_times(whole[0])
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_what_was_made_otherwise_is_not_mixed_in(run, whole, tmp_path):
    longer = replace(TRAINING, steps=3)
    with pytest.raises(ConceptError, match="steps 2, asked for are 3"):
        run(Cell("ewc", 3, 0, 0), whole[1], training=longer)
    with pytest.raises(KeyboardInterrupt):
        run(Cell("bound", 3, 0, 0), tmp_path, progress=cut_at("fido"))
    with pytest.raises(ConceptError, match="settings"):
        run(Cell("bound", 3, 0, 0), tmp_path, settings={"lr": 1e-3})
    path = tmp_path / "bound-n3-o0-s0.progress.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "made_with"}))
    assert run(Cell("bound", 3, 0, 0), tmp_path)["concepts"] == ["rex", "fido", "chalk"]      # progress of before it was kept


def test_the_order_is_respected_and_the_seed_is_the_trainings(run, whole):
    backwards = run(Cell("ewc", 3, 1, 0), places=[2, 1, 0])
    assert backwards["concepts"] == ["chalk", "fido", "rex"]
    assert backwards["just_learned"][2] == backwards["image_alignment"][2]
    assert backwards["just_learned"][2] != whole[0]["just_learned"][0]
    other = run(Cell("ewc", 3, 0, 1), training=replace(TRAINING, seed=1))
    assert other["concepts"] == whole[0]["concepts"] and other["image_alignment"] != whole[0]["image_alignment"]


@pytest.mark.parametrize("method", ["ewc"])      # in one bank its tasks would be one set of weights
def test_alone_every_concept_is_what_it_is_on_an_empty_bank(run, tiny_backbone, suite, method):
    result = run(Cell(method, 3, 0, 0, alone=True))
    first = run(Cell(method, 1, 0, 0), places=[1])      # fido as the only task
    assert result["just_learned"][1] == first["just_learned"][0]
    assert result["image_alignment"] == result["just_learned"]      # whatever the others are, they are not there
    assert not {"multi_alignment", "multi_present", "pair_alignment", "confusion"} & set(result)
    assert Cell(method, 3, 0, 0, alone=True).name != Cell(method, 3, 0, 0).name


@pytest.mark.parametrize(("method", "wants"), [("l2dm", True), ("ewc", False)])
def test_prior_pictures_for_methods_that_want_them(tiny_backbone, suite, method, wants, monkeypatch, tmp_path):
    seen, original = [], continual.prepare

    def prepare(backbone, pictures, *rest):
        seen.append([p.is_prior for p in pictures])
        return original(backbone, pictures, *rest)

    monkeypatch.setattr(continual, "prepare", prepare)
    learn_sequence(tiny_backbone, suite, Cell(method, 1, 0, 0), [0], SETTINGS, TRAINING, tmp_path)
    assert seen == [[False] * 2 + [True] * 16 * wants]


def test_prior_pictures_are_the_untouched_bases(tiny_backbone, suite):
    found = prior_pictures(tiny_backbone, suite, suite.tasks[0], 3)
    assert [p.caption for p in found] == ["a dog", "dog at night", "a dog"] and all(p.is_prior for p in found)
    expected = sample(tiny_backbone, ConceptBank(tiny_backbone.layout), ["a dog"], [9000], QUICK)[0]
    assert torch.allclose(found[0].pixels, expected, atol=1e-4)
    assert not torch.allclose(found[0].pixels, found[2].pixels, atol=1e-3)


def test_routed_and_bound_concepts_leave_the_base_where_it_was(run):
    assert run(Cell("bound", 1, 0, 0), places=[0])["base_drift"] == 0


def test_another_reading_looks_at_the_same_learning_without_learning_again(run, monkeypatch, tmp_path):
    """Every mode's figures from the bank of the usual cell equal those of a run that learned for itself."""
    whole = run(Cell("cidm", 3, 0, 0), tmp_path / "shared")
    reading = Cell("cidm", 3, 0, 0, variant="mode=equal")
    assert reading.learned_as() == Cell("cidm", 3, 0, 0) and reading.settings() == {} and reading.sampling() == {"mode": "equal"}
    own = run(reading, tmp_path / "own")
    monkeypatch.setattr(continual, "learn", None)
    shared = run(reading, tmp_path / "shared")
    assert without_times(shared) == without_times(own) and shared["image_alignment"] != whole["image_alignment"]
    assert shared["seconds_per_concept"] == whole["seconds_per_concept"] and shared["base_drift"] > 0
    assert not list((tmp_path / "shared").glob("cidm+*.safetensors")) and shared["method"] == "cidm+mode=equal"


def test_another_reading_of_another_order_is_refused(run, tmp_path):
    run(Cell("cidm", 2, 0, 0), tmp_path, places=[0, 1])
    with pytest.raises(ConceptError, match="was made with concepts"):
        run(Cell("cidm", 2, 0, 0, variant="mode=equal"), tmp_path, places=[1, 0])


def test_a_variant_divides_into_learning_and_looking():
    cell = Cell("bound", 3, 0, 0, variant="rank=2+mode=paper+apart=false")
    assert cell.settings() == {"rank": 2, "apart": False} and cell.sampling() == {"mode": "paper"}
    assert cell.learned_as().variant == "rank=2+apart=false"
