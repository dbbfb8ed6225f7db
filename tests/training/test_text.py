"""What the text encoders have to do while a concept is learned."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.methods import Task, make
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.trainer import Trainer

CAPTIONS = ("a photo of <rex>", "<rex> on a beach")
BASES = ["slim_backbone", "tiny_sdxl", "tiny_transformer"]


@pytest.fixture
def training(request, monkeypatch):
    """training(base, method, settings): a trainer, and a list to which every pass of a text encoder is
    added."""
    def begin(base, method, settings=None):
        backbone, passes = request.getfixturevalue(base), []
        pictures = [Picture(torch.full((3, 32, 32), shade), caption)
                    for shade, caption in zip((-0.5, 0.5), CAPTIONS, strict=True)]
        data = prepare(backbone, pictures, "rex", "dog", Framing(32, flip=False))
        task = Task("rex", "dog", backbone, ConceptBank(backbone.layout))
        trainer = Trainer(task, make(method, settings), data,
                          TrainingConfig(steps=8, batch_size=2, resolution=32))
        for encoder in backbone.text:
            monkeypatch.setattr(encoder, "encode", lambda ids, *rest, encode=encoder.encode:
                                passes.append(len(ids)) or encode(ids, *rest))
        return trainer, passes

    return begin


@pytest.mark.parametrize("base", BASES)
def test_slots_encode_every_caption_once(training, base):
    """The caption with the class noun, and the noun in the place of the words; each in one pass of one
    row."""
    trainer, passes = training(base, "slots")
    with trainer.session():
        losses = [trainer.step().loss]
        assert passes == [1] * 2 * len(CAPTIONS) * len(trainer.task.backbone.text)
        passes.clear()
        losses += [trainer.step().loss for _ in range(3)]
    assert not passes and len(set(losses)) == 4


def test_the_text_encoder_may_be_away_while_slots_are_learned(training, monkeypatch):
    """Its weights and its forward pass are not needed once every caption has been seen."""
    trainer, _ = training("slim_backbone", "slots")
    encoder = trainer.task.backbone.text[0]
    with trainer.session():
        trainer.step()
        monkeypatch.setattr(encoder, "encode", pytest.fail)
        monkeypatch.setattr(encoder, "vectors", pytest.fail)
        weights = {name: p.data for name, p in encoder.model.named_parameters()}
        try:
            for parameter in encoder.model.parameters():
                parameter.data = torch.empty(0)
            assert trainer.step().loss > 0
        finally:
            for name, parameter in encoder.model.named_parameters():
                parameter.data = weights[name]


@pytest.mark.parametrize(("method", "settings"), [("bound", {}), ("slots", {"learn_words": True})])
def test_words_that_are_learned_are_encoded_in_every_step(training, method, settings):
    trainer, passes = training("slim_backbone", method, settings)
    counts = []
    with trainer.session():
        for _ in range(3):
            passes.clear()
            trainer.step()
            counts.append(len(passes))
    assert counts == [1 + len(CAPTIONS), 1, 1]      # the captions with the class noun are cached
