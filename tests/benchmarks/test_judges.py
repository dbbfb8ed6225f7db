"""Both judges tell all concepts apart on real pictures; the template judge needs no learned weights."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from continual_concepts.benchmarks.continual.concepts import concepts, random_style
from continual_concepts.benchmarks.continual.judges import EncoderJudge
from continual_concepts.benchmarks.continual.real_pictures import side_by_side
from continual_concepts.benchmarks.continual.template_judge import TemplateJudge
from continual_concepts.core.demo import judges as drawn
from continual_concepts.core.demo.judges import SceneEncoder, assignment_of, to_tensor
from continual_concepts.core.demo.render import render
from continual_concepts.core.demo.scenes import random_scene, random_thing
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.evaluation.metrics import area_under_curve

TEN = concepts(10)
NAMES = [concept.name for concept in TEN]
LEAST = {"encoder": 0.97, "template": 0.99}
PICTURES = 8      # of each concept
HARD = {("encoder", "chalk"): 0.89}      # the encoder takes some drawings of other styles for chalk


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "HELD_OUT_PICTURES", PICTURES)
        yield


@pytest.fixture(scope="module")
def tasks(few_pictures):
    return [assignment_of(concept, seed=7 + i) for i, concept in enumerate(TEN)]


@pytest.fixture(scope="module")
def judges(tasks):
    return {"encoder": EncoderJudge(SceneEncoder(), tasks), "template": TemplateJudge(TEN, tasks)}


@cache
def strangers(concept, count=PICTURES):
    """Random things of a concept's class, or things in random styles."""
    rng, pictures = random.Random(5), []
    for i in range(count):
        scene = (concept.distractor(rng) if concept.thing is not None
                 else random_scene(rng, (random_thing(rng),), random_style(rng, f"other{i}").style))
        pictures.append(render(scene))
    return to_tensor(pictures)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "template"])
def test_held_out_pictures_are_told_from_all_others(judges, tasks, name):
    table = torch.cat([judges[name].scores(task.held_out[:PICTURES], NAMES) for task in tasks])
    shown = torch.arange(len(TEN)).repeat_interleave(PICTURES)
    for i, concept in enumerate(TEN):
        own, others = table[shown == i, i], table[shown != i, i]
        least = HARD.get((name, concept.name), LEAST[name])
        assert area_under_curve(own, others) >= least, concept.name
        unknown = judges[name].scores(strangers(concept), [concept.name])[:, 0]
        assert area_under_curve(own, unknown) >= least, concept.name


def test_training_pictures_are_the_measure_of_the_template_judge(judges, tasks):
    for task in tasks[4:7]:
        known, others = (float(judges["template"].scores(images, [task.name]).mean())
                         for images in (task.references, task.held_out[:8]))
        assert known == pytest.approx(1) and others == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("number", [0, 5])      # an individual and a style
def test_worse_pictures_score_lower(judges, tasks, number):
    task, images = tasks[number], tasks[number].held_out[:6]
    small = F.interpolate(F.interpolate(images, size=(16, 16), mode="area"), size=(64, 64), mode="bilinear")
    turned = images.roll(1, dims=1)      # other colours
    scores = [float(judges["template"].scores(x, [task.name]).mean()) for x in (images, small, turned)]
    assert scores[0] > scores[1] + 0.05 and scores[0] > scores[2] + 0.3


def test_a_mirrored_thing_is_the_same_thing(judges, tasks):
    images = tasks[0].held_out[:6]
    there, mirrored = (judges["template"].scores(x, ["rex"]) for x in (images, images.flip(3)))
    assert torch.allclose(there, mirrored, atol=0.05)


@pytest.mark.slow
def test_larger_pictures_are_judged_as_well(judges, tasks):
    large = [assignment_of(TEN[i], seed=7 + i, size=128) for i in (0, 5)]
    judge = TemplateJudge(TEN, large)
    found = judge.scores(large[0].held_out[:6], ["rex", "blueprint"])
    assert (found[:, 0] > 0.8).all() and (found[:, 1] < 0.5).all()
    small = judges["template"].scores(tasks[0].held_out[:6], ["rex"])
    assert torch.allclose(found[:, :1], small, atol=0.1)


def test_an_unknown_concept_is_refused(judges, tasks):
    with pytest.raises(ConceptError, match="no drawing defines the concept 'tom'; known: blueprint"):
        judges["template"].scores(tasks[0].held_out[:1], ["tom"])


def test_references_among_themselves(judges, tasks):
    features = SceneEncoder().features(tasks[0].references, "object")
    products = (features @ features.T).numpy()
    expected = products[~np.eye(len(products), dtype=bool)].mean()
    assert judges["encoder"].among_references("rex") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("names", [("rex", "quack"), ("rex", "quack", "mimi")])
def test_real_pictures_of_several_show_each_in_its_place(names, size):
    found = side_by_side([concept for concept in TEN if concept.name in names], size, count=2)
    assert found.shape == (2, 3, size, size) and found.min() >= -1 and found.max() <= 1
    again = side_by_side([concept for concept in TEN if concept.name in names], size, count=2)
    assert torch.equal(found, again)
