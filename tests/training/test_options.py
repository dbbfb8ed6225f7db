"""Every training option with every method: the method's loss terms are still there, and the seed decides."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import TrainingData, prepare
from continual_concepts.core.methods import METHODS, Task, make
from continual_concepts.core.methods.base import Method
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.memory_plan import Measures
from continual_concepts.core.training.trainer import Trainer
from continual_concepts.tests.quick import thinned

# Settings with which a method's terms appear in the second step of a second task.
QUICK = {"cns": {"selection_steps": 1, "calibration": 1},
         "scns": {"selection_steps": 1, "tie_previous": 1.0, "tie_base": 1.0},
         "l2dm": {"eta": 1, "generation_steps": 1}, "mix_of_show": {"passes": 1, "rows": 4}}
PLAIN = {"steps": 2, "batch_size": 2, "resolution": 32, "flip": False}
OPTIONS = {
    "plain": {},
    "flip and noise offset": {"flip": True, "noise_offset": 0.1},
    "buckets": {"framing": "buckets"},
    "accumulation": {"accumulation": 2},
    "prior pictures": {"prior_weight": 0.5},
    "caption_dropout": {"caption_dropout": 0.5},
    "dropout in micro-batches": {"caption_dropout": 0.5},
    "micro-batches": {},
    "masks": {},
    "weights, precision and optimiser": {
        "min_snr_gamma": 5.0, "precision": "bfloat16", "optimizer": "SGD", "max_grad_norm": 0.0,
        "weight_decay": 0.0, "schedule": "cosine", "warmup": 1},
    "early stopping": {"patience": 1, "look_every": 1},
}
RECOMPUTED = {"gradient_checkpointing": True}
RANDOM = list(OPTIONS)[:7]      # options that change what is drawn
# Methods that change batches, whose draws an option could disturb. tests/methods/test_contract.py repeats all
# methods without options.
CHANGING = {name for name, entry in METHODS.items() if entry.method.on_batch is not Method.on_batch}
REPEATED = {"slots", "bound", *CHANGING}
# Methods whose steps are the loop's own, so that an option meets nothing of theirs but what is trained and
# stored. "slots" and "bound" stand for them with the other options.
HOOKS = ("penalty", "on_batch", "begin_step", "end_step", "after_step")
PLAIN_STEPS = {name for name, entry in METHODS.items()
               if all(getattr(entry.method, hook) is getattr(Method, hook) for hook in HOOKS)} - REPEATED
OF_WHAT_IS_TRAINED = {"plain", "weights, precision and optimiser", "early stopping"}
CASES = [(method, option) for method in sorted(METHODS) for option in OPTIONS
         if method not in PLAIN_STEPS or option in OF_WHAT_IS_TRAINED]
# In the quick suite, "slots" meets all options. The others learn without options, and those with steps of
# their own meet about a third of the options.
OFTEN = {place for place, (method, option) in enumerate(CASES) if method == "slots" or option == "plain"
         or (sorted(METHODS).index(method) + list(OPTIONS).index(option)) % 3 == 0}


@cache
def training_set(backbone, option: str, name: str, noun: str, framing: Framing) -> TrainingData:
    """The encoded pictures. Training leaves them as they are."""
    return prepare(backbone, pictures(option, name, noun), name, noun, framing)


def pictures(option: str, name: str, noun: str) -> list[Picture]:
    g = torch.Generator().manual_seed(len(name))
    mask = (torch.arange(32) < 20).float().expand(1, 32, 32) if option == "masks" else None
    own = [Picture(torch.rand(3, 32, 32, generator=g) * 2 - 1, "", mask, digest=f"{i}") for i in range(3)]
    prior = [Picture(torch.rand(3, 32, 32, generator=g) * 2 - 1, f"a {noun}", is_prior=True)]
    return own + prior * (option == "prior pictures")


def trained(backbone, bank, method: str, option: str, name: str = "mimi",
            noun: str = "cat") -> tuple[Trainer, list[dict]]:
    """A trainer after two steps, and the terms of each step."""
    config = TrainingConfig(**(PLAIN | (RECOMPUTED if option == "recomputed" else OPTIONS[option])))
    kind = option if option in ("masks", "prior pictures") else "plain"
    data = training_set(backbone, kind, name, noun, Framing(config.resolution, config.framing, config.flip))
    settings = {"lr": 1e-2, "token_lr": 1e-2, "stored": "float32"} | QUICK.get(method, {})
    trainer, terms = Trainer(Task(name, noun, backbone, bank), make(method, settings), data, config), []
    trainer.measures = Measures(config.gradient_checkpointing, 1 if "micro-batches" in option else 0)
    with trainer.session():
        for _ in range(config.steps):
            terms.append(trainer.step().terms)
            trainer.evaluate(lambda grown, step: float(step))
    return trainer, terms


@pytest.fixture(scope="module")
def plain(slim_backbone):
    """plain(method): the bank with a first task, and the trainer and terms of a second one without
    options."""
    made = {}

    def of(method: str):
        if method not in made:
            first, _ = trained(slim_backbone, ConceptBank(slim_backbone.layout), method, "plain", "rex",
                               "dog")
            bank = first.snapshot()
            bank = replace(bank, shared={method: first.method.finish().shared})
            made[method] = bank, *trained(slim_backbone, bank, method, "plain")
        return made[method]

    return of


def parameters(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])


@pytest.mark.parametrize(("method", "option"), thinned(CASES, OFTEN.__contains__))
def test_an_option_takes_no_term_away(slim_backbone, plain, method, option):
    bank, first, expected = plain(method)
    trainer, terms = trained(slim_backbone, bank, method, option)
    assert set().union(*terms) >= set().union(*expected)      # masks switch CIDM's attention term on
    assert len(trainer.scores) == (2 if option == "early stopping" else 0)
    if option == "plain" or option in RANDOM and method in REPEATED:
        again = first if option == "plain" else trained(slim_backbone, bank, method, option)[0]
        assert torch.equal(parameters(trainer), parameters(again)) and trainer.losses == again.losses


@pytest.mark.parametrize("method", thinned(sorted(METHODS), lambda place: place % 2 == 0))
def test_recomputed_activations_change_nothing(slim_backbone, plain, method):
    bank, trainer, expected = plain(method)
    recomputed, terms = trained(slim_backbone, bank, method, "recomputed")
    assert [step.keys() for step in terms] == [step.keys() for step in expected]
    assert torch.allclose(parameters(recomputed), parameters(trainer), atol=1e-6)


@pytest.mark.parametrize("option", ["caption_dropout", "dropout in micro-batches"])
@pytest.mark.parametrize(("method", "term"), [("lwf", "distil"), ("l2dm", "distillation")])
def test_distillation_survives_dropped_captions(slim_backbone, plain, method, term, option):
    """In every step: both methods recognise the batch that they returned, which dropping captions used to
    replace."""
    bank = plain(method)[0]
    _, terms = trained(slim_backbone, bank, method, option)
    assert all(step[term] > 0 for step in terms[1:]) and all(term in step for step in terms)
