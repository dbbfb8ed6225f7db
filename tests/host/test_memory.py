"""Memory while learning in ComfyUI: the plan's line, weights in main memory, and a text encoder that is not
needed."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.data.framing import Framing
from continual_concepts.core.data.pictures import Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.methods.base import Task, make
from continual_concepts.core.training import planning
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")


@pytest.fixture
def learned(studio, own_folder):
    """learned(...): a finished run. The next one does not go on from its checkpoint."""
    def learn(**given):
        concept = studio.learn(**given)["spot"]
        for file in (own_folder / "concept_banks" / ".unfinished").iterdir():
            file.unlink()
        return concept

    return learn


def same(one, two) -> bool:
    return all(torch.equal(*pair) for place, delta in one.deltas.items()
               for pair in zip(delta.tensors(), two.deltas[place].tensors(), strict=True))


@pytest.mark.parametrize(("method", "text"), [("slots", "only once per caption"), ("bound", "in every step")])
def test_the_notes_say_what_learning_takes(studio, learned, monkeypatch, method, text):
    plain = learned(method=method)
    monkeypatch.setattr(planning, "LEAST", 0)
    result = studio.learner(method=method)
    line, = (line for line in result.ui["text"][0].splitlines() if line.startswith("memory: "))
    assert line.startswith("memory: about 0.") and "in float32, activations 0." in line
    assert line.endswith(f"no measures; the text encoder works {text}")
    assert same(result.args[0]["spot"], plain)


@pytest.fixture
def backbone_of(studio):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    return lambda: ComfyBackbone(studio.model, studio.clip, studio.vae)


def trainer_of(studio, backbone, method) -> Trainer:
    photos = [Picture(photo.permute(2, 0, 1) * 2 - 1) for photo in studio.photos()]
    data = prepare(backbone, photos, "spot", "dog", Framing(studio.side))
    return Trainer(Task("spot", "dog", backbone, ConceptBank(backbone.layout)), make(method), data,
                   TrainingConfig(steps=3, resolution=studio.side))


@pytest.mark.parametrize(("method", "is_needed"), [("slots", False), ("bound", True)])
def test_the_text_encoder_may_be_unloaded_if_words_are_not_trained(studio, backbone_of, method, is_needed):
    import comfy.model_management as management

    backbone = backbone_of()

    def is_loaded() -> bool:
        return any(loaded.model is studio.clip.patcher for loaded in management.current_loaded_models)

    with torch.inference_mode(False), backbone.training():
        trainer = trainer_of(studio, backbone, method)
        with trainer.session():
            trainer.step()
            trainer.step()      # both photos have been seen
            assert is_loaded()
            management.free_memory(1e30, backbone.device)
            backbone.make_room(0)
            trainer.step()
    assert is_loaded() == is_needed


def test_weights_that_stay_in_main_memory_teach_the_same(studio, learned, monkeypatch):
    """The last measure. The host fetches these weights whenever they are used."""
    import comfy.model_management as management

    from continual_concepts.core.comfy import backbone as module

    load, init, lines = management.load_models_gpu, module.ComfyBackbone.__init__, []
    predict = module.ComfyBackbone.predict
    whole = learned(method="slots", steps=3)

    def partly(models, *args, force_full_load=False, **more) -> None:
        load(models, *args, force_full_load=force_full_load, **more)
        if not force_full_load:
            models[0].partially_unload(models[0].offload_device, 0.7 * models[0].model_size())

    def with_a_card(self, *args) -> None:
        init(self, *args)
        self.can_offload = True

    def short_of_memory(self, *args):
        self.load(with_text=False)
        lines.append(self.model.model.model_lowvram)
        if not self.model.model.model_lowvram:
            raise torch.cuda.OutOfMemoryError("no memory")
        return predict(self, *args)

    monkeypatch.setattr(management, "load_models_gpu", partly)
    monkeypatch.setattr(module.ComfyBackbone, "__init__", with_a_card)
    monkeypatch.setattr(module.ComfyBackbone, "predict", short_of_memory)
    result = studio.learner(method="slots", steps=3)
    monkeypatch.undo()
    management.unload_all_models()
    assert lines == [False, False, True, True, True] and same(result.args[0]["spot"], whole)
    assert "gradient checkpointing, part of the model in main memory" in result.ui["text"][0]
