"""MODELs and CLIPs of our nodes are freed with their last reference, without the garbage collector.

ComfyUI warns of a memory leak where a MODEL goes together with the one that it was cloned from. That happens
when both are parts of one cycle.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui")


@pytest.fixture
def uncollected():
    """Nothing is freed but by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def freed(make) -> list[bool]:
    """For each object that `make` returns, whether it is freed when the last reference to it goes."""
    watched = [weakref.ref(made) for made in make()]
    return [found() is None for found in watched]


def left(make) -> set[str]:
    """Types of this package, and tensors, that only the garbage collector frees after `make`."""
    gc.collect()
    make()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return {type(each).__qualname__ for each in gc.garbage
                if isinstance(each, torch.Tensor) or type(each).__module__.startswith("continual_concepts")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.parametrize("prompt", ["a <rex>", "a dog"])
def test_applied_concepts(studio, mixed, uncollected, prompt):
    def make():
        model, clip, conditioning = studio.aggregate(prompt, mixed)
        studio.ksampler(model, conditioning, conditioning)
        return [model, clip, clip.cond_stage_model]

    gone = freed(make)
    assert gone[:2] == [True, True], gone


def test_applied_twice(studio, mixed, bank, uncollected):
    def make():
        first = studio.aggregate("", mixed)[0]
        second, _, conditioning = studio.aggregate("a <mimi>", bank, model=first)
        studio.ksampler(second, conditioning, conditioning)
        return [first, second]

    assert freed(make) == [True, True]


def test_regions(studio, bank, uncollected):
    def make():
        regions = [studio.region("<rex>", right=0.5), studio.region("<mimi>", left=0.5)]
        model, clip, _ = studio.aggregate("", bank)
        positive = studio.encode(clip, "two dogs")
        applied = studio.apply_regions(regions, positive, studio.encode(clip, ""), model=model, clip=clip)
        studio.ksampler(applied[0], applied[1], applied[2])
        studio.regional("two dogs", regions, bank=bank)
        return [model, clip, applied[0]]

    assert freed(make) == [True] * 3


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("settings", [{}, {"solo": 0.7}, {"outside": "literal", "region_noise": True}],
                         ids=str)
def test_sampling_with_regions_leaves_nothing(studio, bank, uncollected, overlap, settings):
    regions = [studio.region("<rex>", right=0.7 if overlap else 0.5), studio.region("<mimi>", left=0.5)]
    assert left(lambda: studio.regional("two dogs", regions, bank=bank, **settings)) == set()


@pytest.mark.parametrize("method", ["slots", "lora", "bound", "cidm", "l2dm", "cns", "clora"])
def test_learning_leaves_nothing(studio, bank, uncollected, method):
    assert left(lambda: studio.learn(bank=bank, method=method, preview_every=2)) == set()


def test_learning(studio, pack, uncollected):
    def make():
        model, clip, vae = studio.model.clone(), studio.clip.clone(), studio.vae
        bank = studio.learn(model=model, clip=clip, vae=vae, method="slots")
        return [model, clip, bank]

    assert freed(make) == [True] * 3
