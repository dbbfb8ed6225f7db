"""The training loop: repeatable, resumable bit for bit, and it leaves base and bank as they were."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import Task, make
from continual_concepts.core.training import checkpoint
from continual_concepts.core.training.config import OPTIMIZERS, TrainingConfig
from continual_concepts.core.training.loop import learn
from continual_concepts.core.training.trainer import Trainer, lr_factor
from continual_concepts.tests.comparing import same as same_concept


@pytest.fixture
def empty(slim_backbone):
    return ConceptBank(slim_backbone.layout)


def same(one, two) -> bool:
    return one.losses == two.losses and same_concept(one.concept, two.concept)


def test_the_seed_decides_everything(slim_backbone, empty, teach):
    first = teach(slim_backbone, empty)
    assert same(first, teach(slim_backbone, empty)) and not same(first, teach(slim_backbone, empty, seed=1))
    assert len(first.losses) == 3 and any(d.up.any() for d in first.concept.deltas.values())


class Stop(BaseException):
    """As a host's cancel."""


def stop_at(step, error=KeyboardInterrupt):
    def callback(info):
        if info.step == step:
            raise error

    return callback


SETTINGS = [
    {"steps": 4, "schedule": "cosine", "warmup": 2, "caption_dropout": 0.5, "accumulation": 2,
     "batch_size": 1},
    {"steps": 3, "schedule": "linear", "optimizer": "SGD", "noise_offset": 0.1, "min_snr_gamma": 5.0,
     "checkpoint_every": 1},
]


@pytest.mark.parametrize("training", SETTINGS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_a_stopped_run_resumes_bit_for_bit(slim_backbone, empty, teach, tmp_path, training, error):
    file = tmp_path / "run.safetensors"
    whole = teach(slim_backbone, empty, **training)
    with pytest.raises(error):
        teach(slim_backbone, empty, callback=stop_at(2, error), checkpoint_file=file, **training)
    assert file.exists()
    seen, told = [], []
    assert same(teach(slim_backbone, empty, callback=lambda info: seen.append(info.step),
                      checkpoint_file=file, say=told.append, **training), whole)
    assert seen == list(range(3, training["steps"] + 1)) and told == ["resumed at step 2"]
    teach(slim_backbone, empty, checkpoint_file=file, say=told.append, **training)
    assert told[1:] == ["all steps were already done; nothing was trained now"]


@pytest.mark.parametrize("where", ["predict", "optimizer", "after_step"])
def test_an_interrupted_step_resumes_exactly(slim_backbone, empty, teach, tmp_path, monkeypatch, where):
    """In the forward pass the state of the last step is saved; in the middle of an update the last saved file
    stands."""
    file, calls = tmp_path / "run.safetensors", []
    training = {"steps": 3, "accumulation": 2, "checkpoint_every": 1}
    whole = teach(slim_backbone, empty, **training)

    def interrupting(function, at):
        def wrapped(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped

    if where == "predict":      # the second batch of the second step
        monkeypatch.setattr(slim_backbone, "predict", interrupting(slim_backbone.predict, 4))
    elif where == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "zero_grad", interrupting(torch.optim.AdamW.zero_grad, 2))
    else:
        method = type(make("cidm"))
        monkeypatch.setattr(method, "after_step", interrupting(method.after_step, 2))
    with pytest.raises(KeyboardInterrupt):
        teach(slim_backbone, empty, checkpoint_file=file, **training)
    monkeypatch.undo()
    assert len(checkpoint.load(file)["losses"]) == 1
    assert same(teach(slim_backbone, empty, checkpoint_file=file, **training), whole)


@pytest.fixture
def stopped(slim_backbone, empty, teach, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        teach(slim_backbone, empty, callback=stop_at(1), checkpoint_file=tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


@pytest.mark.parametrize("other", [{"name": "mimi"}, {"method": "finetune"}, {"settings": {"rank": 2}},
                                   {"steps": 9}, {"noun": "cat"}])
def test_another_runs_checkpoint_is_refused_and_kept(slim_backbone, empty, teach, stopped, other):
    before = stopped.read_bytes()
    with pytest.raises(ConceptError, match="another run"):
        teach(slim_backbone, empty, checkpoint_file=stopped, **other)
    assert stopped.read_bytes() == before


def test_a_checkpoint_over_another_bank_is_refused(slim_backbone, empty, teach, make_concept, stopped):
    with pytest.raises(ConceptError, match="its bank"):
        teach(slim_backbone, empty.add(make_concept(empty.layout, "other")), checkpoint_file=stopped)


def test_damaged_checkpoints_are_refused(slim_backbone, empty, teach, stopped):
    state = checkpoint.load(stopped)
    for change in ({"modules": {}}, {"optimizer": {}}, {"losses": None}, {"generator": torch.zeros(3)}):
        checkpoint.save(stopped, state | change)
        with pytest.raises(ConceptError, match="damaged"):
            teach(slim_backbone, empty, checkpoint_file=stopped)
    stopped.write_bytes(b"nonsense")
    with pytest.raises(ConceptError, match="not a checkpoint"):
        teach(slim_backbone, empty, checkpoint_file=stopped)


def test_checkpoints_hold_nested_state(tmp_path):
    state = {"a": [1, (2.5, None)], 3: {"t": torch.arange(3), "empty": torch.zeros(0)}, "s": "text",
             "b": True, "same": [torch.ones(2)] * 2}
    checkpoint.save(tmp_path / "c", state)
    again = checkpoint.load(tmp_path / "c")
    assert torch.equal(again[3].pop("t"),
                       state[3].pop("t")) and again[3].pop("empty").shape == state[3].pop("empty").shape
    assert all(torch.equal(t, torch.ones(2)) for t in again.pop("same")) and state.pop("same")
    assert again == state


def test_the_base_and_the_bank_are_what_they_were(slim_backbone, empty, teach):
    modules = (slim_backbone.unet, slim_backbone.vae, slim_backbone.text[0].model)
    before = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in modules]
    teach(slim_backbone, empty)
    assert len(empty) == 0 and not empty.shared
    for module, old in zip(modules, before, strict=True):
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter,
                               old[name]) and parameter.grad is None and not parameter.requires_grad, name


def test_it_learns_under_inference_mode(slim_backbone, empty, teach):
    """ComfyUI runs nodes under it."""
    normal = teach(slim_backbone, empty)
    with torch.inference_mode():
        inside = teach(slim_backbone, empty)
        assert len(teach(slim_backbone, inside.bank, "mimi", settings={"shared": "gradient"},
                         steps=1).bank) == 2
    assert same(normal, inside)


@pytest.mark.parametrize("settings", [{"lr": 1e30}, {"token_lr": 1e38}])
def test_nan_ends_the_run_with_one_sentence(slim_backbone, empty, teach, settings, tmp_path):
    with pytest.raises(ConceptError, match="bank is unchanged"):
        teach(slim_backbone, empty, settings=settings, checkpoint_file=tmp_path / "c", max_grad_norm=0.0)
    assert not (tmp_path / "c").exists() and len(empty) == 0


def test_a_gradient_of_nan_is_noticed_too(slim_backbone, empty, teach, monkeypatch):
    """Also in the last step, where no later loss would show it."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(ConceptError, match="gradient became nan at step 1"):
        teach(slim_backbone, empty, steps=1)


def test_eight_bit_optimisers_where_there_are_any(slim_backbone, empty, teach, monkeypatch):
    """Of bitsandbytes, which a person may have or not; here something of its shape stands in for it."""
    class AdamW8bit(torch.optim.AdamW):
        used = 0

        def step(self, *args, **kwargs):
            AdamW8bit.used += 1
            return super().step(*args, **kwargs)

    optim = SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__path__=[], optim=optim))
    teach(slim_backbone, empty, optimizer="AdamW8bit", steps=2)
    assert AdamW8bit.used == 2
    for missing in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConceptError, match="'optimizer' is 'AdamW8bit'; allowed: .* where bitsandbytes is "
                                           "installed"):
        TrainingConfig(optimizer="AdamW8bit")


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "SGD", "RMSprop", "Adagrad", *OPTIMIZERS[3:]])
def test_optimisers_by_name(slim_backbone, empty, teach, optimizer):
    learned = teach(slim_backbone, empty, optimizer=optimizer, steps=1, settings={"attention_weight": 0.0})
    assert any(d.up.any() for d in learned.concept.deltas.values())


def test_captions_may_name_other_concepts_by_any_word(slim_backbone, empty, teach, make_concept):
    old = make_concept(empty.layout, "mimi", size=0.1)
    old = replace(old, info=replace(old.info, words=("fluff", "puff")),
                  tokens=replace(old.tokens, words=("fluff", "puff")))
    picture = Picture(torch.zeros(3, 32, 32), "<rex> beside <fluff> <puff>")
    assert len(teach(slim_backbone, empty.add(old), pictures=[picture], steps=1).bank) == 2
    with pytest.raises(ConceptError, match="<nobody>"):
        teach(slim_backbone, empty, pictures=[Picture(torch.zeros(3, 32, 32), "<nobody>")])


def test_terms_are_averaged_over_batches(slim_backbone, empty, teach):
    infos, mask = [], torch.zeros(1, 32, 32)
    mask[:, :16] = 1
    teach(slim_backbone, empty, callback=infos.append, steps=1, accumulation=4, batch_size=1,
          caption_dropout=0.6, pictures=[Picture(torch.zeros(3, 32, 32), mask=mask)])
    assert infos[0].terms["attention"] > 0      # although the last batch alone may have none
    assert infos[0].step == infos[0].total == 1 and infos[0].grad_norm > 0


@pytest.mark.parametrize(("schedule", "warmup", "expected"), [
    ("constant", 0, [1, 1, 1, 1]), ("linear", 0, [1, 0.75, 0.5, 0.25]), ("cosine", 2, [0.5, 1, 1, 0.5]),
    ("linear", 8, [1 / 8, 2 / 8, 3 / 8, 4 / 8]),
])
def test_learning_rate_schedules(schedule, warmup, expected):
    factor = lr_factor(TrainingConfig(steps=4, schedule=schedule, warmup=warmup))
    assert [factor(i) for i in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("training", [{"gradient_checkpointing": True}, {"precision": "bfloat16"}])
def test_other_ways_to_run_learn_too(slim_backbone, empty, teach, training):
    learned = teach(slim_backbone, empty, **training)
    assert learned.losses == pytest.approx(teach(slim_backbone, empty).losses, rel=0.05)
    assert all(v.dtype == torch.float32 for v in learned.concept.tokens.vectors.values())


def test_provenance_tells_how_a_concept_came_to_be(slim_backbone, empty, teach):
    origin = teach(slim_backbone, empty).concept.info.provenance
    assert origin.images == ("0", "1", "2") and origin.steps == 3 and origin.base == slim_backbone.fingerprint
    assert origin.settings["training"]["resolution"] == 32 and origin.settings["method"]["rank"] == 4
    assert "torch" in origin.versions
    with pytest.raises(ConceptError, match="'rex'"):
        teach(slim_backbone, teach(slim_backbone, empty, steps=1).bank)


def test_captions_that_never_name_the_concept_are_refused(slim_backbone, empty, make_concept):
    data = prepare(slim_backbone, [Picture(torch.zeros(3, 32, 32), "a photo of <mimi>")], "rex", "dog",
                   Framing(32))
    task = Task("rex", "dog", slim_backbone, empty.add(make_concept(empty.layout, "mimi")))
    with pytest.raises(ConceptError, match="no caption of concept 'rex' names it; write <rex>"):
        Trainer(task, make("bound"), data, TrainingConfig(steps=1, resolution=32))


def test_a_batch_of_dropped_captions_is_no_error(slim_backbone):
    """Bound deltas get no gradient from it; the step counts all the same."""
    data = prepare(slim_backbone, [Picture(torch.zeros(3, 32, 32), "a <rex>")], "rex", "dog", Framing(32))
    config = TrainingConfig(steps=3, resolution=32, caption_dropout=0.99)
    learned = learn(Task("rex", "dog", slim_backbone, ConceptBank(slim_backbone.layout)), make("bound"), data,
                    config)
    assert len(learned.losses) == 3


def test_names_that_differ_by_case_have_checkpoints_of_their_own_on_any_disk(tmp_path):
    bank, names = tmp_path / "bank.safetensors", ("rex", "Rex", "REX", "R" * 200, "r" * 200)
    files = [checkpoint.file_beside(bank, name) for name in names]
    assert files[0].name == ".bank.safetensors.rex.checkpoint"
    assert len({file.name.casefold() for file in files}) == len(names)
