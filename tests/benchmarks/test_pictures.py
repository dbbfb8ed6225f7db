"""Pictures are reused exactly where sampling again would give the same ones, for all kinds of composition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.benchmarks.continual import pictures
from continual_concepts.benchmarks.continual.pictures import Sampler, digest_of
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.methods.base import Task, make
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.loop import learn

QUICK = SampleSettings(steps=1, cfg=2.0, size=(32, 32))
PROMPTS, SEEDS = ["a <rex>", "a <rex> at night", "<rex>"], [1, 2, 3]


def grown(backbone, method, bank, name):
    data = prepare(backbone, [Picture(torch.rand(3, 32, 32) * 2 - 1)], name, "dog", Framing(32, flip=False))
    task = Task(name, "dog", backbone, bank, generator=torch.Generator().manual_seed(0))
    training = TrainingConfig(steps=2, resolution=32, flip=False)
    return learn(task, make(method, {"lr": 0.05, "token_lr": 0.05}), data, training).bank


@pytest.fixture(scope="module")
def banks(slim_backbone):
    """Method -> its bank of one concept, and the same with another one."""
    found = {}
    for method in ("bound", "slots", "cidm", "finetune", "lora_c"):
        torch.manual_seed(0)
        one = grown(slim_backbone, method, ConceptBank(slim_backbone.layout), "rex")
        found[method] = one, grown(slim_backbone, method, one, "mimi")
    return found


@pytest.mark.parametrize(("method", "mode", "same"), [
    ("bound", "sharp", True), ("slots", "sharp", True), ("cidm", "sharp", True), ("cidm", "equal", False),
    ("cidm", "released", False), ("finetune", "sharp", False), ("lora_c", "sharp", False),
])
def test_digests_are_equal_where_pictures_are(slim_backbone, banks, method, mode, same):
    settings = replace(QUICK, mode=mode)
    before, after = (sample(slim_backbone, bank, PROMPTS, SEEDS, settings) for bank in banks[method])
    digests = [digest_of(slim_backbone, bank, PROMPTS, SEEDS, settings) for bank in banks[method]]
    assert torch.equal(before, after) == same and (digests[0] == digests[1]) == same


def test_seeds_settings_and_prompts_are_part_of_the_digest(slim_backbone, banks):
    bank = banks["bound"][0]
    digests = [digest_of(slim_backbone, bank, *arguments) for arguments in (
        (PROMPTS, SEEDS, QUICK), (PROMPTS, [1, 2, 4], QUICK), (PROMPTS[::-1], SEEDS, QUICK),
        (PROMPTS, SEEDS, replace(QUICK, cfg=3.0)), (PROMPTS, SEEDS, replace(QUICK, negative="a <rex>")))]
    assert len(set(digests)) == len(digests)


def test_changed_words_alone_change_the_digest(slim_backbone, banks):
    bank = banks["bound"][0]
    concept = bank["rex"]
    vectors = {name: vector + 1e-3 for name, vector in concept.tokens.vectors.items()}
    other = ConceptBank(bank.layout).add(replace(concept, tokens=replace(concept.tokens, vectors=vectors)))
    before, after = (digest_of(slim_backbone, b, PROMPTS, SEEDS, QUICK) for b in (bank, other))
    assert before != after


def test_the_same_pictures_are_sampled_once_and_old_ones_are_dropped(slim_backbone, banks, monkeypatch):
    calls = []
    monkeypatch.setattr(pictures, "sample", lambda *arguments: calls.append(1) or sample(*arguments))
    sampler, (one, both) = Sampler(slim_backbone), banks["bound"]
    first = sampler.sample(one, PROMPTS, SEEDS, QUICK)
    assert torch.equal(sampler.sample(both, PROMPTS, SEEDS, QUICK), first) and len(calls) == 1
    assert torch.equal(first, sample(slim_backbone, both, PROMPTS, SEEDS, QUICK))
    monkeypatch.setattr(pictures, "MOST_BYTES", first.nbytes)
    sampler.sample(one, PROMPTS, [5, 6, 7], QUICK)
    sampler.sample(one, PROMPTS, SEEDS, QUICK)
    assert len(calls) == 3
