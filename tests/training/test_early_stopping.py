"""Evaluations while a concept is learned: when they end learning, and that runs with them resume exactly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.concepts import Provenance
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods.base import Task, make
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.early_stopping import has_stalled
from continual_concepts.core.training.loop import learn
from continual_concepts.core.training.record import setting_differences

CONFIG = TrainingConfig(steps=12, batch_size=1, resolution=32, patience=2, look_every=2)
RATES = {"lr": 1e-2, "token_lr": 1e-2}
NAN = float("nan")


@given(st.lists(st.floats(0, 1), max_size=12), st.integers(1, 4))
def test_it_has_stalled_when_the_last_evaluations_brought_nothing(scores, patience):
    best = scores.index(max(scores)) if scores else 0
    assert has_stalled(scores, patience) == (len(scores) > patience and best < len(scores) - patience)
    assert not has_stalled(scores, 0)


@pytest.fixture
def run(slim_backbone):
    photos = [Picture(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1)
              for i in range(2)]
    data = prepare(slim_backbone, photos, "rex", "dog", Framing(32, "crop", True))

    def go(config=CONFIG, evaluator=None, callback=None, file=None):
        task = Task("rex", "dog", slim_backbone, ConceptBank(slim_backbone.layout),
                    generator=torch.Generator().manual_seed(0))
        return learn(task, make("bound", RATES), data, config, callback, file, evaluator=evaluator)

    return go


def scripted(scores):
    """A evaluator with the given answers, and what it was asked about."""
    left, steps = list(scores), []

    def evaluator(bank, step):
        assert "rex" in bank
        steps.append(step)
        return left.pop(0)

    return evaluator, steps


def tensors(learned):
    return [t for _, delta in sorted(learned.concept.deltas.items()) for t in delta.tensors()]


def test_learning_ends_when_looks_get_no_better_and_the_record_says_after_how_many_steps(run):
    evaluator, steps = scripted([0.1, 0.3, 0.2, 0.3, 0.9, 0.9])
    learned = run(evaluator=evaluator)
    assert steps == [2, 4, 6, 8] and len(learned.losses) == 8 and learned.concept.info.provenance.steps == 8


def test_looks_that_get_better_change_nothing(run):
    evaluator, steps = scripted([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    learned, plain = run(evaluator=evaluator), run(replace(CONFIG, patience=0, look_every=0))
    assert steps == [2, 4, 6, 8, 10, 12] and len(learned.losses) == 12
    assert all(torch.equal(a, b) for a, b in zip(tensors(learned), tensors(plain), strict=True))


def test_a_cut_run_remembers_its_looks(run, tmp_path):
    answers = [0.1, 0.3, 0.2, 0.25, 0.9]
    whole = run(evaluator=scripted(answers)[0])

    def cut(info):
        if info.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(evaluator=scripted(answers)[0], callback=cut, file=tmp_path / "c")
    evaluator, steps = scripted(answers[2:])
    resumed = run(evaluator=evaluator, file=tmp_path / "c")
    assert steps == [6, 8] and resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(tensors(resumed), tensors(whole), strict=True))
    again = run(evaluator=scripted([])[0], file=tmp_path / "c")      # it had ended: not a step more
    assert again.losses == whole.losses


@pytest.mark.parametrize("cut_at", [4, 6, 8])
def test_a_look_that_was_cut_off_is_made_up_for(run, tmp_path, cut_at):
    answers = [0.1, 0.3, 0.2, 0.25, 0.9]
    whole = run(evaluator=scripted(answers)[0])
    asked = scripted(answers)[0]

    def cancelled(bank, step):
        if step == cut_at:
            raise KeyboardInterrupt
        return asked(bank, step)

    with pytest.raises(KeyboardInterrupt):
        run(evaluator=cancelled, file=tmp_path / "c")
    evaluator, steps = scripted(answers[cut_at // 2 - 1:])
    resumed = run(evaluator=evaluator, file=tmp_path / "c")
    assert steps[0] == cut_at and resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(tensors(resumed), tensors(whole), strict=True))


def test_early_stopping_needs_an_evaluator(run):
    with pytest.raises(ConceptError, match="setting 'patience' is 2; allowed: 0 where there is no evaluator"):
        run()
    with pytest.raises(ConceptError, match="setting 'look_every' is 0; allowed: 1 or more"):
        TrainingConfig(patience=1)


def test_a_record_of_before_a_setting_existed_had_its_default():
    method, config = make("bound", RATES), TrainingConfig(steps=5)
    settings = {"method": {"lr": 1e-2, "token_lr": 1e-2}, "training": {"steps": 5}}
    origin = Provenance(base="b", images=(), settings=settings, versions={}, date="", steps=5, seconds=1.0)
    differences = partial(setting_differences, origin.settings)
    assert differences(method, config) == []
    assert differences(method, replace(config, patience=1, look_every=1)) == [
        "its patience is 0, now 1", "its look_every is 0, now 1"]
    assert differences(make("bound", RATES | {"rank": 2}), config) == ["its rank is 4, now 2"]


@pytest.mark.parametrize(("scores", "expected"), [
    ([NAN] * 4, True), ([NAN, 0.5, 0.4, 0.3], True), ([0.5, NAN, NAN], True), ([0.5, NAN, 0.6], False),
    ([NAN, NAN, 0.1], False)])
def test_a_score_of_a_broken_picture_brings_nothing(scores, expected):
    assert has_stalled(scores, 2) == expected
