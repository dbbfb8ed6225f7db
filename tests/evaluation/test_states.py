"""Kept states: learning is the same with them, they survive a stop, and the best one is proposed."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation.states import (
    Judging,
    judge_states,
    proposed,
    states_picture,
    thumbnailed,
    unseen_prompt,
)
from continual_concepts.core.methods import Task, make
from continual_concepts.core.sampling.settings import SampleSettings
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.loop import learn
from continual_concepts.tests.comparing import same

PHOTO = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def run(backbone, method="bound", callback=None, file=None, keep=()):
    task = Task("rex", "dog", backbone, ConceptBank(backbone.layout))
    data = prepare(backbone, [Picture(PHOTO)], "rex", "dog", Framing(32))
    return learn(task, make(method), data, TrainingConfig(steps=4, resolution=32), callback, file, keep=keep)


def test_kept_states_do_not_change_what_is_learned_and_survive_a_stop(tiny_backbone, tmp_path):
    seen = {}
    plain = run(tiny_backbone, callback=lambda info: seen.update({info.step: info.snapshot()["rex"]}))
    kept = run(tiny_backbone, keep=(2, 3, 4))
    assert same(kept.concept, plain.concept) and kept.losses == plain.losses
    assert list(kept.kept) == [2, 3, 4] and list(plain.kept) == [4]
    assert all(same(kept.kept[step], seen[step]) for step in (2, 3, 4))
    assert kept.kept[2].info.provenance.steps == 2

    def stop(info):
        if info.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_backbone, callback=stop, file=tmp_path / "run", keep=(2, 4))
    resumed = run(tiny_backbone, file=tmp_path / "run", keep=(2, 4))
    assert list(resumed.kept) == [2, 4] and same(resumed.kept[2], seen[2])
    assert same(resumed.concept, plain.concept)


def test_methods_that_pass_a_state_on_keep_no_earlier_one(tiny_backbone):
    with pytest.raises(ConceptError, match="method 'cidm' passes a state to later concepts"):
        run(tiny_backbone, "cidm", keep=(2,))


def test_every_state_is_drawn_and_scored(tiny_backbone):
    learned = run(tiny_backbone, keep=(2, 4))
    task = Task("rex", "dog", tiny_backbone, ConceptBank(tiny_backbone.layout))

    def encode(pictures):
        return torch.nn.functional.normalize(torch.stack([p.flatten()[:64] for p in pictures]), dim=-1)

    states = judge_states(task, learned.kept, ["a photo of <rex> in the snow"], [PHOTO], encode,
                          SampleSettings(steps=2, size=(32, 32)), seed=5, samples=2)
    assert [state.step for state in states] == [2, 4] and states[0].pictures.shape == (2, 3, 32, 32)
    assert all(-1 <= state.likeness <= 1 and state.spread >= 0 and -1 <= state.fidelity <= 1
               for state in states)
    assert states[0].describe().startswith("step 2: likeness ") and ", fidelity " in states[0].describe()
    assert thumbnailed(states[0]).thumbnail.startswith(b"\xff\xd8")
    assert states_picture(states).width > 2 * 220
    plain = judge_states(task, learned.kept, ["a photo of <rex>"], [PHOTO], encode,
                         SampleSettings(steps=2, size=(32, 32)), seed=5, samples=1)
    assert math.isnan(plain[0].fidelity) and math.isnan(plain[0].spread)      # of one picture it is unknown
    assert "no likeness, because a picture holds NaN" in replace(plain[0], likeness=math.nan).describe()
    assert plain[0].describe() == f"step {plain[0].step}: likeness {100 * plain[0].likeness:.1f}"


@pytest.mark.parametrize(("rows", "best"), [
    ([(0.5, 0.01, 0.9), (0.7, 0.02, 0.4), (0.69, 0.02, 0.6), (0.66, 0.02, 0.8)], 2),
    ([(0.5, 0.01, 0.9), (0.7, 0.0, 0.4)], 1),
    ([(0.5, 0.01, math.nan), (0.7, 0.3, math.nan)], 1),
    ([(0.7, 0.01, 0.5), (0.7, 0.01, 0.5)], 0),
    ([(math.nan, math.nan, 0.9), (0.7, math.nan, 0.4), (0.6, math.nan, 0.8)], 1),
    ([(0.7, 0.01, math.nan), (0.695, 0.01, 0.4)], 1),
    ([(math.nan, math.nan, math.nan)] * 3, 2),
])
def test_the_best_fidelity_within_one_standard_error_is_proposed(rows, best):
    states = [SimpleNamespace(likeness=a, spread=b, fidelity=c) for a, b, c in rows]
    assert proposed(states) == best


def test_the_usual_prompt_shows_what_no_caption_mentions():
    assert unseen_prompt("rex", "object", ["in the Snow", "rex"]) == "a photo of <rex> on a beach"
    assert unseen_prompt("ink", "style", ["<ink> of a car"]) == "<ink> of a dog"
    assert unseen_prompt("rex", "object", ["snow beach meadow night room"]) == "a photo of <rex> in the snow"
    assert Judging(4).steps(200) == (50, 100, 150, 200) and Judging(12).steps(3) == (1, 2, 3)


@pytest.mark.parametrize(("given", "sentence"), [
    ({"states": 0}, "kept states is 0; allowed: 1 to 12"),
    ({"samples": 17}, "samples is 17; allowed: 1 to 16"),
    ({"prompts": ("a <rex>",) * 9}, "there are 9 sample prompts; allowed: up to 8"),
])
def test_wrong_values_are_named(given, sentence):
    with pytest.raises(ConceptError, match=sentence):
        Judging(**given)


@pytest.mark.parametrize(("prompt", "sentence"), [
    ("a dog", "the sample prompt 'a dog' does not name the concept; write <rex> where it should be"),
    ("<rex> and <mimi>", "the sample prompt '<rex> and <mimi>' names <mimi>, which the bank does not hold"),
    ("<rex> and <rex-1>", "the sample prompt '<rex> and <rex-1>' names the concept in another form, too"),
    ("<rex> and <rex:0.8>", "names the concept in another form, too; allowed: <rex>"),
])
def test_sample_prompts_are_checked_before_anything_is_learned(prompt, sentence):
    info, other = (ConceptInfo(name, "dog", "slots", (f"{name}-1",)) for name in ("rex", "tom"))
    Judging(prompts=("<rex> and <tom>",)).check_prompts(info, [other, info])
    with pytest.raises(ConceptError, match=sentence):
        Judging(prompts=(prompt,)).check_prompts(info, [other])
