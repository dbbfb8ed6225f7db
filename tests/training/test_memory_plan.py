"""The memory plan: what is counted is what is kept, a run that fits is left alone, and memory that runs out
takes a further measure."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods.base import Task, make
from continual_concepts.core.model.activations import Activations, Block, _Meter, activations_of
from continual_concepts.core.model.checkpointing import blocks_run_by
from continual_concepts.core.training import planning
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.loop import learn
from continual_concepts.core.training.memory_plan import Measures, MemoryPlan, planned
from continual_concepts.core.training.trainer import Trainer
from continual_concepts.tests.quick import thinned

GIB = 2**30
NEEDS = {Measures(): 100, Measures(True): 60, Measures(True, 2): 40, Measures(True, 1): 30,
         Measures(True, 1, True): 30}


@pytest.mark.parametrize(("free", "expected"), [
    (None, Measures()), (1000, Measures()), (127, Measures()),      # (100 + 10) * 1.15 = 126.5
    (126, Measures(True)), (70, Measures(True)), (69, Measures(True, 2)), (45, Measures(True, 1)),
    (1, Measures(True, 1, True))])
def test_measures_are_taken_one_after_another_until_it_fits(free, expected):
    assert planned(Measures(), 4, free, 10, NEEDS.__getitem__, can_offload=True) == expected


def test_measures_of_the_settings_stay_and_a_host_that_cannot_offload_does_not():
    assert planned(Measures(True), 4, 10**6, 10, NEEDS.__getitem__, False) == Measures(True)
    assert planned(Measures(), 4, 1, 10, NEEDS.__getitem__, False) == Measures(True, 1)


def test_blocks_that_are_recomputed_keep_only_their_outputs():
    """Three blocks keep 30, 50 and 20 beside outputs of 5 each. The second one takes the most."""
    blocks = (Block(10, 36, 30), Block(45, 57, 50), Block(100, 27, 20))
    found = Activations(kept=125, peak=127, largest=2, convolution=3, blocks=blocks)
    assert found.bytes(False) == 127 + 2 * 2 + 2 * 3
    assert found.bytes(True) == (45 - 30 + 57) + 2 * 2 + 2 * 3


def plan_of(**more):
    given = {"weights": 2 * GIB, "type": "float16", "concept": 2**20, "activations": 3 * GIB,
             "unsaved": 3 * GIB, "free": 6 * GIB, "measures": Measures(), "reads_text": False}
    return MemoryPlan(**(given | more))


def test_the_line():
    assert plan_of().line() == (
        "memory: about 5.0 of 8.0 GB: model 2.0 in float16, activations 3.0, concept 0.001; no measures; "
        "the text encoder works only once per caption")
    saved = plan_of(activations=GIB, measures=Measures(True, 1), free=2 * GIB, reads_text=True)
    assert saved.line() == (
        "memory: about 3.0 of 4.0 GB: model 2.0 in float16, activations 1.0, concept 0.001; measures: "
        "gradient checkpointing, micro-batches of 1 (without them 5.0 GB); the text encoder works in every "
        "step")
    assert plan_of(free=None).line().startswith("memory: about 5.0 GB: ")
    assert plan_of(free=GIB).line().endswith("; it may not fit, so lower resolution")
    assert "may not fit" not in plan_of(free=2 * GIB, measures=Measures(True, 1, True)).line()


@pytest.fixture(scope="module")
def training_set(slim_backbone):
    g = torch.Generator().manual_seed(3)
    pictures = [Picture(torch.rand(3, 32, 32, generator=g) * 2 - 1, caption)
                for caption in ("a <spot>", "", "<spot> in a park", "")]
    return prepare(slim_backbone, pictures, "spot", "dog", Framing(32, flip=False))


CONFIG = TrainingConfig(steps=2, batch_size=2, resolution=32)


def run_of(backbone, data, method="slots", config=CONFIG):
    task = Task("spot", "dog", backbone, ConceptBank(backbone.layout))
    return Trainer(task, make(method), data, config)


@pytest.mark.parametrize(("method", "rows"),
                         thinned([("slots", 2), ("bound", 1), ("lora", 2)], lambda place: place == 0))
def test_what_is_counted_without_numbers_is_what_is_kept_with_them(tiny_backbone, training_set, method, rows):
    trainer, found = run_of(tiny_backbone, training_set, method), []
    with trainer.session():
        encode, forward = planning._passes(trainer, rows)
        encode()      # states of words that are not trained are kept from now on
        for checkpointing in (nullcontext(), tiny_backbone.gradient_checkpointing(True)):
            meter = _Meter()
            with checkpointing, meter:
                text = encode()
                loss = forward(text)
                found.append(meter.live)
                loss.backward()
            del loss, text
            trainer.optimizer.zero_grad()
        counted = activations_of(encode, forward, tiny_backbone.gradient_checkpointing)
    assert counted.kept == found[0] > 10**5
    saved = sum(block.kept for block in counted.blocks)
    # PyTorch also keeps the state of its random generator for every block
    assert counted.kept - saved == pytest.approx(found[1], rel=0.05) and saved > 0.3 * counted.kept
    assert all(p.grad is None for p in trainer.parameters)


def learned(backbone, data, method="slots", say=None, **config):
    task = Task("spot", "dog", backbone, ConceptBank(backbone.layout))
    settings = TrainingConfig(**{"steps": 2, "batch_size": 2, "resolution": 32, **config})
    return learn(task, make(method), data, settings, say=say)


def tensors(result):
    concept = result.concept
    return [*concept.tokens.vectors.values(),
            *(tensor for _, delta in sorted(concept.deltas.items()) for tensor in delta.tensors())]


def same(one, two):
    return one.losses == two.losses and all(map(torch.equal, tensors(one), tensors(two)))


@pytest.fixture
def planning_all(monkeypatch):
    """Plans for small models, too."""
    monkeypatch.setattr(planning, "LEAST", 0)


PLANNED = ["slots", "bound", "lora", "cns", "tara", "lwf", "l2dm", "ccdm"]


@pytest.mark.parametrize("method", thinned(PLANNED, lambda place: place % 3 == 0))
def test_planning_changes_nothing(slim_backbone, training_set, planning_all, method):
    lines = []
    planned_run = learned(slim_backbone, training_set, method, lines.append)
    assert same(planned_run, learned(slim_backbone, training_set, method))
    assert len(lines) == 1 and "no measures" in lines[0], lines


def test_scarce_memory_is_planned_for_and_changes_no_number(slim_backbone, training_set, planning_all,
                                                            monkeypatch):
    plain, lines = learned(slim_backbone, training_set), []
    trainer = run_of(slim_backbone, training_set)
    with trainer.session():
        whole = planning.activation_bytes(trainer)(Measures()) + planning.concept_bytes(trainer)
    monkeypatch.setattr(type(slim_backbone), "free_memory", lambda self, with_text: whole)
    assert same(learned(slim_backbone, training_set, say=lines.append), plain)
    assert "measures: gradient checkpointing (without them" in lines[0]


def test_a_plan_that_fails_does_not_end_the_run(slim_backbone, training_set, planning_all, monkeypatch):
    plain, lines = learned(slim_backbone, training_set), []
    monkeypatch.setattr(planning, "activations_of", lambda *_: [][0])
    assert same(learned(slim_backbone, training_set, say=lines.append), plain)
    assert lines == ["memory: not known for this model (IndexError: 'list index out of range')"]


def test_small_models_have_no_plan(slim_backbone, training_set):
    lines = []
    learned(slim_backbone, training_set, say=lines.append)
    assert lines == []


def test_memory_that_runs_out_steps_down(slim_backbone, training_set, monkeypatch):
    plain, lines, predict, seen = learned(slim_backbone, training_set), [], slim_backbone.predict, []

    def once(latents, *args):
        seen.append(len(latents))
        if len(seen) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(latents, *args)

    monkeypatch.setattr(slim_backbone, "predict", once)
    assert same(learned(slim_backbone, training_set, say=lines.append), plain)
    assert seen == [2, 2, 2] and lines == [
        "memory ran out at step 2; learning continues with gradient checkpointing"]
    seen.clear()
    with pytest.warns(UserWarning, match="memory ran out at step 2; learning continues with gradient"):
        learned(slim_backbone, training_set)


def test_without_a_further_measure_the_sentence_names_those_that_were_taken(slim_backbone, training_set,
                                                                            monkeypatch):
    def never(latents, *args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(slim_backbone, "predict", never)
    with pytest.raises(ConceptError, match="memory ran out at step 1 of concept 'spot' with 1 pictures of 32 "
                                           "pixels at once and gradient checkpointing, micro-batches of 1; "
                                           "lower resolution or batch_size; the bank is unchanged"):
        learned(slim_backbone, training_set, say=lambda line: None)


def test_blocks_run_as_usual_after_measuring(slim_backbone, training_set):
    calls = []
    with blocks_run_by(lambda forward, *args: calls.append(1) or forward(*args)):
        learned(slim_backbone, training_set, gradient_checkpointing=True)
    count = len(calls)
    learned(slim_backbone, training_set, gradient_checkpointing=True)
    assert count > 0 and len(calls) == count


ENDS = [torch.cuda.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()]
GATHER = [("ewc", {}), ("lwf", {}), ("l2dm", {"generation_steps": 1}), ("stamina", {}),
          ("cns", {"selection_steps": 2, "calibration": 2}), ("scns", {"selection_steps": 2})]
BROKEN_OFF = [*((method, settings, error) for method, settings in GATHER for error in ENDS),
              ("slots", {}, RuntimeError("DefaultCPUAllocator: can't allocate memory"))]


@pytest.fixture(scope="module")
def second_task(teach, slim_backbone):
    """second_task(method, settings): a function that learns the second task, and its result without an error.
    """
    made = {}

    def learned(method, settings):
        if method not in made:
            empty = ConceptBank(slim_backbone.layout)
            bank = teach(slim_backbone, empty, "rex", method, settings, steps=1).bank
            learn_second = partial(teach, slim_backbone, bank, "mimi", method, settings, noun="cat", steps=3,
                                   accumulation=2, checkpoint_every=0)
            made[method] = learn_second, learn_second()
        return made[method]

    return learned


def breaking_off(backbone, error, monkeypatch):
    """The second backward pass of the second step ends in an error, when the first one has added up."""
    calls, backward = [], torch.Tensor.backward

    def counted(tensor, *args, **more):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return backward(tensor, *args, **more)

    monkeypatch.setattr(torch.Tensor, "backward", counted)


@pytest.mark.filterwarnings("ignore:memory ran out at step 2")
# in the quick suite, each method meets one of the two ends
@pytest.mark.parametrize(("method", "settings", "error"),
                         thinned(BROKEN_OFF, lambda place: place % 4 in (0, 3)))
def test_a_step_that_is_broken_off_leaves_nothing_behind(slim_backbone, second_task, monkeypatch, tmp_path,
                                                         method, settings, error):
    """A second task is as without the error, whether it steps down or is resumed: no random number is drawn
    twice and no gradient counts twice."""
    learn_second, whole = second_task(method, settings)
    breaking_off(slim_backbone, error, monkeypatch)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            learn_second(checkpoint_file=tmp_path / "run")
        monkeypatch.undo()
    again = learn_second(checkpoint_file=tmp_path / "run")
    assert same(again, whole)
    shared, expected = (run.bank.shared.get(method, {}) for run in (again, whole))
    assert all(torch.equal(shared[name], tensor) for name, tensor in expected.items())


def test_a_resumed_run_keeps_its_micro_batches(slim_backbone, training_set, monkeypatch, tmp_path):
    """They add up gradients in another order, so that without them the result would differ."""
    config = TrainingConfig(steps=4, batch_size=2, resolution=32, gradient_checkpointing=True)
    predict, seen = slim_backbone.predict, []

    def scarce(latents, *args):
        seen.append(len(latents))
        if len(latents) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(latents, *args)

    def run(**more):
        task = Task("spot", "dog", slim_backbone, ConceptBank(slim_backbone.layout))
        return learn(task, make("slots"), training_set, config, say=lambda line: None, **more)

    def stop(info):
        if info.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(slim_backbone, "predict", scarce)
    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint_file=tmp_path / "run", callback=stop)
    monkeypatch.setattr(slim_backbone, "predict", lambda latents, *args: seen.append(len(latents))
                        or predict(latents, *args))
    seen.clear()
    assert same(run(checkpoint_file=tmp_path / "run"), whole) and set(seen) == {1}
