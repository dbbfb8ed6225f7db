"""EWC: the Fisher against gradients taken one by one, the tie's closed form, and that it holds what
mattered."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.attention.adapters import AdapterProcessor
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.routing import always_on_deltas
from continual_concepts.core.data.batch import Batch
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import TrainingSet, prepare
from continual_concepts.core.methods import Task, make
from continual_concepts.core.methods.ewc import squared_gradients
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.objective import denoising_loss, draw, predict
from continual_concepts.core.training.trainer import Trainer

SETTINGS = {"rank": 2, "scale": 0.5}


@pytest.fixture(scope="module")
def banks(slim_backbone, teach):
    one = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "ewc", SETTINGS, steps=4).bank
    return one, teach(slim_backbone, one, "mimi", "ewc", SETTINGS | {"decay": 0.5}, steps=4, noun="cat").bank


def begun(backbone, bank, **settings):
    method = make("ewc", SETTINGS | {"stored": "float32"} | settings)
    method.begin(Task("bear", "bear", backbone, bank))
    return method


def fisher(bank):
    return {name: f for name, f in bank.shared["ewc"].items() if name.startswith("fisher.")}


def test_squared_gradients_are_those_of_every_sample_alone():
    g = torch.Generator().manual_seed(0)
    x, up, down, out = (torch.randn(*s, generator=g) for s in ((3, 5, 4), (6, 2), (2, 4), (3, 5, 6)))
    expected = [torch.zeros(6, 2), torch.zeros(2, 4)]
    for sample, gradient in zip(x, out, strict=True):
        factors = up.clone().requires_grad_(), down.clone().requires_grad_()
        found = torch.autograd.grad(((0.3 * sample @ factors[1].T @ factors[0].T) * gradient).sum(), factors)
        expected = [total + one.square() for total, one in zip(expected, found, strict=True)]
    assert all(torch.allclose(*pair, rtol=1e-4)
               for pair in zip(squared_gradients(out, x, up, down, 0.3), expected, strict=True))


def test_the_gathered_squares_are_the_denoising_losss_alone(slim_backbone, banks):
    """Of own pictures, whatever the tie adds: sample by sample through the whole UNet, up to the batch
    mean."""
    g = torch.Generator().manual_seed(0)
    pictures = [Picture(torch.rand(3, 32, 32, generator=g) * 2 - 1, "a cat", is_prior=i == 2)
                for i in range(3)]
    data, config = prepare(slim_backbone, pictures, "bear", "bear",
                           Framing(32, flip=False)), TrainingConfig(steps=1, resolution=32)
    run = Trainer(Task("bear", "bear", slim_backbone, banks[0]), make("ewc", SETTINGS | {"tie": 1e3}), data,
                  config)
    whole = Batch(data.latents, data.captions, data.masks, data.is_prior, torch.ones(3))
    drawn = draw(whole, len(slim_backbone.schedule), config, torch.Generator().manual_seed(0))
    processor = run.method.processor()
    run.method.on_batch(whole)
    context = run.context(whole)
    seen = predict(slim_backbone, whole, context, drawn, processor)
    (denoising_loss(slim_backbone, seen, config) + run.method.penalty(seen)["tie"]).backward()
    noted, factors = dict(run.method.pending), run.method.factors
    expected = {name: torch.zeros_like(p) for name, p in factors.items()}
    plain = AdapterProcessor(run.method.adapters, run.method)
    for i in range(2):
        one, rows = Batch(*(part[i:i + 1] for part in vars(whole).values())), slice(i, i + 1)
        part = type(drawn)(drawn.timesteps[rows], drawn.noise[rows])
        loss = denoising_loss(slim_backbone, predict(slim_backbone, one, context[rows], part, plain),
                              config) / 3
        gradients = torch.autograd.grad(loss, list(factors.values()), retain_graph=True)
        for name, gradient in zip(factors, gradients, strict=True):
            expected[name] += gradient.square()
    assert noted.keys() == expected.keys() and any(squares.any() for squares in noted.values())
    for name, squares in noted.items():
        assert torch.allclose(squares, expected[name], rtol=1e-3,
                              atol=1e-4 * float(expected[name].max()) + 1e-20), name


def test_the_tie_is_its_formula(slim_backbone, banks):
    method, expected = begun(slim_backbone, banks[1], tie=3.0), 0.0
    g, state = torch.Generator().manual_seed(0), banks[1].shared["ewc"]
    assert method.penalty(None)["tie"] == 0
    with torch.no_grad():
        for name, factor in method.factors.items():
            step = 0.1 * torch.randn(factor.shape, generator=g)
            kind, key = name.split(".")
            assert torch.equal(factor, state[f"{key}.{kind}"])
            factor += step
            expected += 1.5 * float((state[f"fisher.{name}"] * step.square()).sum())
    assert method.penalty(None)["tie"].item() == pytest.approx(expected, rel=1e-4)


def test_every_tasks_fisher_has_mean_one_and_old_ones_fade(banks):
    means = [float(torch.cat([f.flatten() for f in fisher(bank).values()]).mean()) for bank in banks]
    assert means == pytest.approx([1.0, 1.5], rel=1e-4)
    assert all(bool((second >= 0.5 * first).all())
               for first, second in zip(*(fisher(b).values() for b in banks), strict=True))


def test_the_window_forgets_early_steps(slim_backbone, banks):
    """Exponential mean: the plain mean at first, of about the window's length later."""
    method = begun(slim_backbone, banks[0], fisher_window=4)
    for step in range(1, 41):
        method.pending = {"a": torch.tensor([1.0 if step <= 20 else 3.0])}
        method.after_step(step)
        assert step != 20 or method.mean["a"].item() == pytest.approx(1.0)
    assert method.mean["a"].item() == pytest.approx(3.0 - 2.0 * 0.75**20)
    method.pending = {"a": torch.tensor([float("inf")])}
    method.after_step(41)
    assert torch.isfinite(method.mean["a"]).all() and not method.pending


def test_the_tie_holds_what_mattered(slim_backbone, banks, teach):
    """With a strong tie the Fisher-weighted distance from the old weights shrinks more than the plain one."""
    moved = []
    for tie in (0.0, 1e4):
        state = teach(slim_backbone, banks[0], "mimi", "ewc", SETTINGS | {"tie": tie, "token_lr": 0.0},
                      steps=8).bank.shared["ewc"]
        weighted = plain = 0.0
        for name, f in fisher(banks[0]).items():
            _, kind, key = name.split(".")
            change = (state[f"{key}.{kind}"] - banks[0].shared["ewc"][f"{key}.{kind}"]).square()
            weighted, plain = weighted + float((f * change).sum()), plain + float(change.sum())
        moved.append((weighted, plain))
    assert moved[1][0] < 0.2 * moved[0][0] and moved[1][0] / moved[1][1] < moved[0][0] / moved[0][1]


def test_a_first_task_is_plain_finetuning(slim_backbone, teach):
    bank = ConceptBank(slim_backbone.layout)
    one, other = (teach(slim_backbone, bank, "rex", name, {"rank": 2}).concept
                  for name in ("ewc", "finetune"))
    assert all(torch.equal(one.deltas[key].up, delta.up) for key, delta in other.deltas.items())


def test_records_add_up_to_the_adapter_and_another_rank_starts_without_a_tie(slim_backbone, banks):
    state = banks[1].shared["ewc"]
    for (index, projection), delta in always_on_deltas(banks[1]).items():
        name = f"{index}-{projection}"
        assert torch.allclose(delta.dense(), 0.5 * state[f"{name}.up"] @ state[f"{name}.down"], atol=1e-5)
    assert begun(slim_backbone, banks[1], rank=3).penalty(None) == {}


@pytest.mark.parametrize("settings", [{"tie": -1.0}, {"decay": 1.5}, {"fisher_window": 0}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(Exception, match=f"'{next(iter(settings))}'"):
        make("ewc", settings)


def test_prior_pictures_alone_leave_no_fisher(slim_backbone, banks):
    method = begun(slim_backbone, banks[0])
    data = TrainingSet(torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 8, 8), ("a",), torch.tensor([True]), ())
    method.on_batch(Batch(data.latents, data.captions, data.masks, data.is_prior, torch.ones(1)))
    method._note((0, "to_q"), torch.ones(1, 2, 32), torch.ones(1, 2, 32))
    method.after_step(1)
    state = method.shared_state()
    assert method.fisher and all(torch.equal(state[f"fisher.{name}"], f) for name, f in method.fisher.items())
