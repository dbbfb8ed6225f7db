"""Variants: a concept starts from what another one has learned, under its own name. The other one stays."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.bank.tokens import default_words
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, Task, make
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.loop import learn
from continual_concepts.core.training.refinement import check_variant, settings_of
from continual_concepts.core.training.trainer import Trainer
from continual_concepts.tests.comparing import same

REFINABLE = sorted(name for name, entry in METHODS.items() if entry.method.refinable)
CONFIG = TrainingConfig(steps=3, batch_size=2, resolution=32, flip=False)


def photos(seed: int) -> list[Picture]:
    g = torch.Generator().manual_seed(seed)
    return [Picture(torch.rand(3, 32, 32, generator=g) * 2 - 1, digest=f"{seed}.{i}") for i in range(2)]


def start(backbone, bank, name, seed, method="bound", parent=None):
    task = Task(name, "dog", backbone, bank)
    settings = {}
    if parent is not None:
        origin = check_variant(bank, parent, name)
        method, settings = origin.info.method, settings_of(origin.info, {})
        words = default_words(name, len(origin.info.words))
        task = Task(name, "dog", backbone, bank, words=words, parent=origin)
    data = prepare(backbone, photos(seed), name, "dog", Framing(32, "crop", False))
    return task, make(method, settings), data, CONFIG


@pytest.mark.parametrize("method", REFINABLE)
def test_a_variant_starts_from_its_parent_which_stays(slim_backbone, method):
    bank = learn(*start(slim_backbone, ConceptBank(slim_backbone.layout), "rex", 1, method)).bank
    before = Trainer(*start(slim_backbone, bank, "rex-winter", 2, parent="rex")).snapshot()
    assert same(before["rex-winter"], bank["rex"])
    grown = learn(*start(slim_backbone, bank, "rex-winter", 2, parent="rex")).bank
    assert grown.names == ["rex", "rex-winter"] and grown["rex"] == bank["rex"]
    variant, origin = grown["rex-winter"], grown.infos["rex-winter"].provenance
    assert not same(variant, bank["rex"])
    assert variant.info.words == default_words("rex-winter", len(bank["rex"].info.words))
    assert (origin.variant_of, origin.images, origin.steps) == ("rex", ("2.0", "2.1"), 3)
    assert ConceptInfo.from_json(variant.info.to_json()).provenance.variant_of == "rex"
    assert "variant_of" not in bank["rex"].info.to_json()["provenance"]


def test_a_stopped_variant_resumes_exactly_and_only_from_its_parent(slim_backbone, tmp_path):
    bank = learn(*start(slim_backbone, ConceptBank(slim_backbone.layout), "rex", 1)).bank
    whole = learn(*start(slim_backbone, bank, "rex-winter", 2, parent="rex")).concept

    def stop(info):
        if info.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(*start(slim_backbone, bank, "rex-winter", 2, parent="rex"), stop, tmp_path / "run")
    with pytest.raises(ConceptError, match="its parent is '[0-9a-f]{16}', now ''"):
        learn(*start(slim_backbone, bank, "rex-winter", 2), None, tmp_path / "run")
    resumed = learn(*start(slim_backbone, bank, "rex-winter", 2, parent="rex"), None, tmp_path / "run")
    assert same(resumed.concept, whole)


@pytest.mark.parametrize(("parent", "name", "given", "sentence"), [
    ("mimi", "mimi-winter", {}, "the bank holds no concept 'mimi' that could have a variant; it holds rex"),
    ("rex", "rex", {}, "'rex' would be a variant of itself; give it another name, or refine it"),
    ("rex", "rex-2", {"kind": "style"}, "the kind of concept 'rex' is 'object', now 'style' is given; a var"),
    ("old", "old-2", {}, "concept 'old' of method 'ewc' cannot have a variant, because its concepts share"),
])
def test_what_cannot_be_is_one_sentence(slim_backbone, make_concept, parent, name, given, sentence):
    bank = learn(*start(slim_backbone, ConceptBank(slim_backbone.layout), "rex", 1)).bank
    if parent == "old":
        bank = learn(*start(slim_backbone, bank, "old", 1, "ewc")).bank
    with pytest.raises(ConceptError) as caught:
        check_variant(bank, parent, name, **given)
    assert str(caught.value).startswith(sentence)
