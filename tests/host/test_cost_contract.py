"""The cost contract inside ComfyUI: what concepts add to a sampling step, in operations counted in the same
run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from continual_concepts.benchmarks.cost.synthetic import Operations
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.composition import WORDS

pytestmark = pytest.mark.usefixtures("as_in_comfyui")


@pytest.fixture(scope="module")
def word_bound(bank):
    made = ConceptBank(bank.layout)
    for name in ("rex", "mimi"):
        concept = bank[name]
        made = made.add(replace(concept, info=replace(concept.info, method="bound", composition=WORDS)))
    return made


@pytest.fixture
def per_step(studio):
    """per_step(model, positive, negative): operations of one step of KSampler, without what happens once per
    sampling."""
    def count(model, positive, negative) -> int:
        counts = []
        studio.ksampler(model, positive, negative, steps=1)      # loads the model
        for steps in (3, 4):
            with Operations() as operations:
                studio.ksampler(model, positive, negative, steps=steps)
            counts.append(operations.count)
        return counts[1] - counts[0]

    return count


def test_the_number_of_word_bound_concepts_does_not_matter(studio, word_bound, per_step):
    """What sites read is laid out once per sampling, for one concept or for two; each step then adds the
    same."""
    plain = per_step(studio.model, studio.encode(studio.clip, "a dog and a cat"),
                     studio.encode(studio.clip, ""))
    added, uncached = [], []
    for prompt in ("a <rex> on a beach", "a <rex> and <mimi>"):
        model, clip, positive = studio.aggregate(prompt, word_bound)
        negative, watched = studio.encode(clip, ""), model.clone()
        # nothing may be cached
        watched.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
        added.append(per_step(model, positive, negative) - plain)
        uncached.append(per_step(watched, positive, negative) - plain)
    assert 0 < added[0] == added[1] < uncached[0] / 4 < uncached[1] / 4


def test_prompt_activated_concepts_are_folded_once(studio, bank, per_step):
    """A step costs what it costs with the words alone."""
    model, clip, positive = studio.aggregate("a <rex> and <mimi>", bank)
    words_only, clip_of_words, words = studio.aggregate("a <rex> and <mimi>", bank, strength=0.0)
    expected = per_step(words_only, words, studio.encode(clip_of_words, ""))
    assert per_step(model, positive, studio.encode(clip, "")) == expected


def test_any_number_of_regions_is_one_evaluation(studio, word_bound, per_step):
    """Columns that end where cells end are read in one attention call, two or four of them; thirds do not,
    and still cost far less than a plain step for every region."""
    def regions_per_step(count: int) -> int:
        names = ("<rex>", "<mimi>", "<rex>", "<mimi>")[:count]
        regions = [studio.region(f"a {name}", left=i / count, right=(i + 1) / count)
                   for i, name in enumerate(names)]
        counts = []
        for steps in (1, 3, 4):
            with Operations() as operations:
                studio.regional("a meadow", regions, word_bound, steps=steps)
            counts.append(operations.count)
        return counts[2] - counts[1]

    plain = per_step(studio.model, studio.encode(studio.clip, "a dog"), studio.encode(studio.clip, ""))
    two, three, four = map(regions_per_step, (2, 3, 4))
    assert plain < two == four < three < 2 * plain
