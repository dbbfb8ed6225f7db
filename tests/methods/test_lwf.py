"""LwF: the old model's answers to old requests are the target, and the requests change nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.routing import learning_deltas
from continual_concepts.core.data.batch import Batch
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, Task, make
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.objective import denoising_loss, draw, predict
from continual_concepts.core.training.trainer import Trainer

CONFIG = TrainingConfig(steps=4, batch_size=2, resolution=32)


@pytest.fixture(scope="module")
def bank(slim_backbone, teach):
    return teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "lwf", steps=3).bank


def running(backbone, bank, **settings):
    pictures = [Picture(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1,
                        "a cat" if i < 2 else "a hill", is_prior=i == 2) for i in range(3)]
    data = prepare(backbone, pictures, "mimi", "cat", Framing(32, flip=False))
    return Trainer(Task("mimi", "cat", backbone, bank), make("lwf", settings), data, CONFIG), data


def test_old_requests_come_in_turn_beside_the_batch(slim_backbone, bank):
    run, data = running(slim_backbone, bank)
    batch = Batch(data.latents, data.captions, data.masks, data.is_prior, torch.tensor([1.0, 1.0, 0.5]))
    added = run.method.on_batch(batch)
    assert added.prompts == ("a <mimi>", "a <mimi>", "a hill", "a <rex>", "a cat")
    assert torch.equal(added.latents[3:],
                       data.latents[:2]) and added.is_prior.tolist() == [False, False, True, True, True]
    assert added.weights.tolist() == pytest.approx([5 / 3, 5 / 3, 2.5 / 3, 0, 0])
    run.method.after_step(1)
    assert run.method.on_batch(batch).prompts[3:] == ("a cat", "a <rex>")
    words = replace(batch, prompts=("<mimi-1> <mimi>", "a hill", "a hill"))
    assert run.method.on_batch(batch).prompts[3:] == ("a cat", "a <rex>")
    assert run.method.on_batch(words).prompts[3] == "cat cat"


def test_the_denoising_loss_is_that_of_the_batch_alone(slim_backbone, bank):
    run, data = running(slim_backbone, bank)
    batch = Batch(data.latents, data.captions, data.masks, data.is_prior, torch.tensor([1.0, 1.0, 0.5]))
    added = run.method.on_batch(batch)
    drawn = draw(added, 1000, CONFIG, torch.Generator().manual_seed(0))
    whole = predict(slim_backbone, added, run.context(added), drawn, run.method.processor())
    part = predict(slim_backbone, batch, run.context(batch),
                   type(drawn)(drawn.timesteps[:3], drawn.noise[:3]), run.method.processor())
    assert torch.allclose(denoising_loss(slim_backbone, whole, CONFIG),
                          denoising_loss(slim_backbone, part, CONFIG), rtol=1e-5)


def test_the_penalty_is_the_distance_from_the_old_model(slim_backbone, bank):
    """Zero before anything moved; afterwards the closed form, with gradient to the adapter and none to the
    words."""
    run, data = running(slim_backbone, bank, distil=2.0)
    batch = run.method.on_batch(data.draw(2, 1.0, torch.Generator().manual_seed(0)))
    drawn = draw(batch, 1000, CONFIG, torch.Generator().manual_seed(0))
    with slim_backbone.folded(learning_deltas(bank, "lwf", METHODS["lwf"].method.builds_on_sum)):
        def seen():
            return predict(slim_backbone, batch, run.context(batch), drawn, run.method.processor())

        assert run.method.penalty(seen())["distil"].item() < 1e-9
        with torch.no_grad():
            for parameter in run.method.adapters.up.parameters():
                parameter += 0.05
        now = seen()
        teacher = slim_backbone.predict(now.noisy, now.timesteps, now.context).detach()
        term = run.method.penalty(now)["distil"]
    assert term.item() == pytest.approx(2.0 * float((now.output.detach() - teacher)[-2:].square().mean()),
                                        rel=1e-4)
    assert term > 0
    term.backward()
    assert all(p.grad.any() for p in run.method.adapters.up.parameters())
    assert all(p.grad is None or not p.grad.any() for p in run.method.words.parameters())


def test_it_keeps_old_answers(slim_backbone, bank, teach):
    """A strong penalty: the second task changes less of what <rex> looks like."""
    changes = []
    for distil in (0.0, 100.0):
        settings = {"distil": distil, "token_lr": 0.0, "lr": 5e-3}
        grown = teach(slim_backbone, bank, "mimi", "lwf", settings, steps=12, noun="cat").concept
        changes.append(sum(float(delta.dense().square().sum()) for delta in grown.deltas.values()))
    assert changes[1] < 0.7 * changes[0]


def test_nothing_is_asked_before_the_second_task_or_at_weight_zero(slim_backbone, bank, teach):
    empty = ConceptBank(slim_backbone.layout)
    one, other = (teach(slim_backbone, empty, "rex", name).concept for name in ("lwf", "finetune"))
    assert all(torch.equal(one.deltas[key].up, delta.up) for key, delta in other.deltas.items())
    run, data = running(slim_backbone, bank, distil=0.0)
    batch = data.draw(2, 1.0, torch.Generator().manual_seed(0))
    assert run.method.on_batch(batch) is batch and run.method.penalty(None) == {}


def test_it_teaches_alike_with_checkpointing_and_half_precision(slim_backbone, bank, teach):
    plain, again, half = (teach(slim_backbone, bank, "mimi", "lwf", steps=2, noun="cat", **more)
                          for more in ({}, {"gradient_checkpointing": True}, {"precision": "bfloat16"}))
    assert plain.losses == pytest.approx(again.losses, rel=1e-4)
    assert plain.losses == pytest.approx(half.losses, rel=0.1)
    infos = []
    teach(slim_backbone, bank, "mimi", "lwf", steps=1, noun="cat", precision="bfloat16",
          callback=infos.append)
    # the adapter has not moved: the teacher computes as the student does
    assert infos[0].terms["distil"] < 1e-3


def test_a_negative_weight_is_refused():
    with pytest.raises(ConceptError, match="'distil'"):
        make("lwf", {"distil": -1.0})
