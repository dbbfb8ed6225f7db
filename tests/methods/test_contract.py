"""What every method promises, as one matrix; a new method appears in it by itself."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.composition import Kind
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.conditioning.routing import aggregate, always_on_deltas, averaged_names
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, Task, get, make
from continual_concepts.core.methods.base import Forward, register
from continual_concepts.core.neurons.neurons import NeuronSelection
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.trainer import Trainer
from continual_concepts.tests.comparing import equal, tensors_of

QUICK = SampleSettings(steps=2, cfg=2.0, size=(32, 32))
WITHOUT_HISTORY = {"alignment", "attention", "sparsity"}      # terms that a first task may have
SETTINGS = {"l2dm": {"generation_steps": 2}, "mix_of_show": {"passes": 3}}      # fewer steps for pictures


@pytest.fixture(scope="module", params=sorted(METHODS))
def method(request):
    return request.param


@pytest.fixture(scope="module")
def learn(slim_backbone, teach, method):
    """learn(bank, name, ...): three steps of the method."""
    def run(bank, name="mimi", noun="cat", **more):
        return teach(slim_backbone, bank, name, method, SETTINGS.get(method), noun=noun, **more)

    return run


@pytest.fixture(scope="module")
def run(slim_backbone, learn):
    """Two concepts in sequence, what the callbacks saw, and copies of what was there before."""
    before = {n: p.detach().clone() for n, p in slim_backbone.unet.named_parameters()}
    infos = {"rex": [], "mimi": []}
    first = learn(ConceptBank(slim_backbone.layout), "rex", "dog", callback=infos["rex"].append)
    stored = tensors_of(first.concept)
    shared = {name: {k: t.clone() for k, t in state.items()} for name, state in first.bank.shared.items()}
    second = learn(first.bank, callback=infos["mimi"].append)
    return {"first": first, "second": second, "infos": infos, "before": before, "stored": stored,
            "shared": shared}


@pytest.fixture(scope="module")
def again(run, learn, tmp_path_factory):
    """The second concept, learned once more from the first one's bank, which was saved and opened."""
    file = tmp_path_factory.mktemp("first") / "bank.safetensors"
    save_bank(run["first"].bank, file)
    return learn(open_bank(file))


def test_the_first_task_has_no_penalty(run):
    assert all(set(info.terms) <= WITHOUT_HISTORY for info in run["infos"]["rex"])


def test_penalties_are_never_negative(run):
    for name in ("rex", "mimi"):
        assert len(run["infos"][name]) == 3
        assert all(value >= 0 for info in run["infos"][name] for value in info.terms.values())


def test_a_later_penalty_has_gradient(slim_backbone, run, method):
    """One step away from the start, where a method may have zeros, every penalty over the history reaches the
    trainables."""
    data = prepare(slim_backbone, [Picture(torch.zeros(3, 32, 32))], "bear", "bear", Framing(32))
    settings = {"lr": 1e-2, "stored": "float32", **SETTINGS.get(method, {})}
    task = Task("bear", "bear", slim_backbone, run["second"].bank)
    learning = Trainer(task, make(method, settings), data, TrainingConfig(steps=2, resolution=32))
    learning.step()
    batch = data.draw(1, 1.0, torch.Generator().manual_seed(0))
    context = learning.context(batch)
    terms = learning.method.penalty(Forward(batch, context, *[torch.zeros(1)] * 4))
    for name in set(terms) - WITHOUT_HISTORY:
        learning.optimizer.zero_grad()
        terms[name].backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.any() for p in learning.parameters), name


def test_the_outcome_fits_and_has_a_size(slim_backbone, run, method):
    for concept in run["second"].bank:
        concept.check_fits(slim_backbone.layout)
        assert concept.info.method == method and concept.nbytes() > 0
        tensors = tensors_of(concept).values()
        assert all(torch.isfinite(t).all() and not t.requires_grad and t.device.type == "cpu"
                   for t in tensors)


def test_the_frozen_weights_are_unchanged(slim_backbone, run):
    for name, parameter in slim_backbone.unet.named_parameters():
        assert torch.equal(parameter, run["before"][name]) and parameter.grad is None, name


def test_old_concepts_and_banks_stay_as_they_were(run):
    assert run["first"].bank.names == ["rex"] and run["second"].bank.names == ["rex", "mimi"]
    assert equal(tensors_of(run["second"].bank["rex"]), run["stored"])


def test_a_task_leaves_the_state_that_it_was_given(run):
    assert run["shared"].keys() == run["first"].bank.shared.keys()
    for name, state in run["shared"].items():
        assert equal(state, dict(run["first"].bank.shared[name]))


def test_the_seed_decides_everything(learn, run, again):
    assert again.losses == run["second"].losses
    assert equal(tensors_of(again.concept), tensors_of(run["second"].concept))
    other = learn(run["first"].bank, seed=1)
    assert other.losses != run["second"].losses
    assert not equal(tensors_of(other.concept), tensors_of(run["second"].concept))


def test_a_stopped_second_task_resumes_bit_for_bit(learn, run, method, tmp_path):
    def stop(info):
        if info.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(run["first"].bank, callback=stop, checkpoint_file=tmp_path / "c")
    resumed = learn(run["first"].bank, checkpoint_file=tmp_path / "c")
    assert equal(tensors_of(resumed.concept), tensors_of(run["second"].concept))
    shared, expected = resumed.bank.shared.get(method, {}), run["second"].bank.shared.get(method, {})
    assert equal(dict(shared), dict(expected))


def test_zero_strength_is_the_base(slim_backbone, run, method):
    bank = run["second"].bank
    found = aggregate(slim_backbone, bank, bank.parse("a <rex>"), strength=0.0, without=averaged_names(bank))
    assert found.deltas.keys() == always_on_deltas(bank).keys()
    if METHODS[method].method.composition.kind is Kind.PROMPT:
        assert not found.deltas
        base = sample(slim_backbone, ConceptBank(bank.layout), ["a dog"], [1], QUICK)
        assert torch.equal(sample(slim_backbone, bank, ["a dog"], [1], QUICK), base)


def test_a_learned_concept_shows(slim_backbone, run):
    bank = run["second"].bank
    rex, mimi = sample(slim_backbone, bank, ["a <rex>", "a <mimi>"], [1, 1], QUICK)
    assert not torch.allclose(rex, mimi, atol=1e-3)


def test_removing_the_second_restores_the_pictures_of_the_first(slim_backbone, run):
    before = sample(slim_backbone, run["first"].bank, ["a <rex>"], [1], QUICK)
    assert torch.equal(sample(slim_backbone, run["second"].bank.remove("mimi"), ["a <rex>"], [1], QUICK),
                       before)


def test_a_saved_bank_samples_the_same(slim_backbone, run, tmp_path):
    save_bank(run["second"].bank, tmp_path / "bank.safetensors")
    again = open_bank(tmp_path / "bank.safetensors")
    first, second = (sample(slim_backbone, bank, ["<rex> and <mimi>", "a dog"], [1, 2], QUICK)
                     for bank in (again, run["second"].bank))
    assert torch.equal(first, second)


def test_learning_goes_on_from_a_saved_bank(run, again, method):
    assert again.bank.names == ["rex", "mimi"]
    assert equal(tensors_of(again.concept), tensors_of(run["second"].concept))
    shared, expected = again.bank.shared.get(method, {}), run["second"].bank.shared.get(method, {})
    assert equal(dict(shared), dict(expected))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"lr": -1.0}, {"stored": "int8"}, {"no_such_setting": 1}])
def test_bad_settings_are_named(method, settings):
    name = next(iter(settings))
    with pytest.raises(ConceptError, match="stored type" if name == "stored" else name):
        make(method, settings)


def test_an_empty_class_noun_is_refused(slim_backbone, method):
    with pytest.raises(ConceptError, match="'rex'"):
        make(method).begin(Task("rex", "", slim_backbone, ConceptBank(slim_backbone.layout)))


def test_a_single_word_needs_no_class_noun(slim_backbone, method):
    chosen = make(method)
    chosen.begin(Task("rex", "", slim_backbone, ConceptBank(slim_backbone.layout), words=("rex",)))
    assert chosen.token_group().words == ("rex",) and chosen.finish().tokens.vectors["clip_l"].shape[1] == 1


def test_a_neuron_selection_is_used_or_refused(slim_backbone, method):
    """It used to be dropped without a word by methods that train everything."""
    layout = slim_backbone.layout
    selection = NeuronSelection.of_rows({(0, "to_k"): torch.tensor([1, 2])}, layout)
    chosen = make(method)
    if method in ("cns", "scns"):
        chosen.use_selection(selection)
        chosen.begin(Task("rex", "dog", slim_backbone, ConceptBank(layout)))
        assert chosen.finish().deltas.keys() == {(0, "to_k")}
    else:
        says = f"method '{method}' cannot use a neuron selection; methods that can: cns, scns"
        with pytest.raises(ConceptError, match=says):
            chosen.use_selection(selection)


def test_unknown_methods_are_refused_with_the_known_ones():
    with pytest.raises(ConceptError, match="cidm, .*finetune"):
        get("ewx")
    for name in ("cidm", "CIDM"):
        with pytest.raises(ConceptError, match="taken"):
            register(name, get("cidm").config, "")(get("cidm").method)
