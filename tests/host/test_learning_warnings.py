"""What Concept Learner warns of and refuses before it learns."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")


def test_it_warns_of_concepts_that_will_get_in_each_others_way(studio, bank, caplog):
    from continual_concepts.core.bank.bank import ConceptBank

    known = ConceptBank(bank.layout).add(bank["rex"])
    inputs = {"model": studio.model, "clip": studio.clip, "vae": studio.vae, "images": studio.photos(),
              "name": "rexy", "class_noun": "dog", "kind": "object", "method": "bound", "steps": 1, "lr": 0.0,
              "token_lr": 0.0, "resolution": studio.side, "batch_size": 1, "seed": 0, "preview_every": 0,
              "if_known": "keep it", "bank": known}
    listed = {key: value if isinstance(value, list) else [value] for key, value in inputs.items()}
    found = studio.pack.ConceptLearner.execute(**listed)
    assert "<rexy>" in found.ui["text"][0] and "<rexy>" in caplog.text


def test_a_neuron_selection_for_a_method_without_neurons_is_refused(studio):
    """It used to be dropped silently, and everything was trained."""
    from continual_concepts.core.errors import ConceptError
    from continual_concepts.core.neurons.neurons import NeuronSelection

    selection = NeuronSelection.of_rows({(0, "to_k"): torch.tensor([1])}, studio.bank.layout)
    says = "method 'bound' cannot use a neuron selection; methods that can: cns, scns"
    with pytest.raises(ConceptError, match=says):
        studio.learn(method="bound", selection=selection)
    assert studio.learn(method="cns", selection=selection)["spot"].deltas.keys() == {(0, "to_k")}
