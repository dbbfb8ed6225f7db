"""Regions in both hosts: the same weights, latents and prompts give the same guided noise and the same
latents in the library and in ComfyUI, so figures measured with the one hold for the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.routing import always_on_deltas
from continual_concepts.core.regional.noise import NoiseSettings
from continual_concepts.core.regional.regions import Region
from continual_concepts.core.sampling import found as library_found
from continual_concepts.core.sampling import regions as library
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings

TOLERANCE = 1e-4
SIZE, COUNT = (8, 16), 2      # of latents; pictures at once
SCENE = "a photo in a meadow"
SETTINGS = SampleSettings(steps=4, cfg=4.0, negative="a blurry photo")
LEFT, RIGHT, MIDDLE = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0), (0.25, 0.3, 0.8, 0.7)
CASES = {
    "boxes": ([LEFT, RIGHT], {}),
    "a rest for the scene": ([MIDDLE], {}),
    "three that overlap": ([LEFT, MIDDLE, RIGHT], {"overlap": "nearest"}),
    "feathered": ([LEFT, RIGHT], {"feather": 0.2}),
    "half as strong, late": ([LEFT, RIGHT], {"strength": 0.5, "start": 0.4}),
    "crop denoising": ([LEFT, RIGHT], {"noise": NoiseSettings(crop_denoising=0.5)}),
    "crop denoising, feathered": ([LEFT, MIDDLE],
                                  {"noise": NoiseSettings(crop_denoising=0.5), "feather": 0.1}),
    "region noise, frame": ([LEFT, RIGHT], {"noise": NoiseSettings(True)}),
    "region noise, crop": ([LEFT, MIDDLE], {"noise": NoiseSettings(True, area="crop")}),
    "region noise, literal": ([LEFT, MIDDLE], {"noise": NoiseSettings(True, outside="literal")}),
    "isolation": ([LEFT, MIDDLE], {"isolation": 0.5}),
    "everything": ([LEFT, MIDDLE], {"noise": NoiseSettings(True, area="crop", crop_denoising=0.4),
                                    "isolation": 1.0}),
    "no guidance": ([LEFT, RIGHT], {"noise": NoiseSettings(crop_denoising=0.5), "cfg": 1.0}),
}
KINDS = {
    "plain": ["a red ball", "a cat on a beach", "a blue car"],
    "prompt-activated": ["<rex>", "a photo of <mimi>", "<blueprint> of a car"],
    "word-bound": ["<rex>", "a photo of <mimi>", "<blueprint> of a car"],
}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def banks(bank, word_bound):
    """The same concepts, prompt-activated and word-bound."""
    return {"plain": bank, "prompt-activated": bank, "word-bound": word_bound}


def drawn(case: str, kind: str) -> tuple[list[Region], SampleSettings]:
    boxes, given = CASES[case]
    of_region = {key: value for key, value in given.items() if key in ("feather", "strength", "start")}
    regions = [Region(prompt, box, **of_region) for prompt, box in zip(KINDS[kind], boxes, strict=False)]
    regions[-1] = replace(regions[-1], negative="a dog")
    return regions, replace(SETTINGS, **{key: value for key, value in given.items() if key not in of_region})


class Hosts:
    """Both hosts' guided noise of the same latents, and what both sample from the same noise."""

    def __init__(self, backbone, model, clip, size=SIZE) -> None:
        self.backbone, self.model, self.clip, self.size = backbone, model, clip, size
        self.sampling = model.get_model_object("model_sampling")

    def sized(self, settings):
        """Settings with the pictures' size."""
        height, width = (side * self.backbone.picture_multiple for side in self.size)
        return replace(settings, size=(height, width))

    def _comfy(self, function, bank, regions, settings, timesteps, scene=SCENE):
        """Runs a sampler function of ComfyUI's over the noise levels of timesteps; its result as the UNet's
        latents. Without regions those of the scene's concepts are found."""
        import comfy.sample
        import comfy.samplers

        from continual_concepts.core.comfy.region_sampling import Scene, prepare

        ready = prepare(self.model, self.clip, bank, Scene(scene, settings.negative), regions, self.size,
                        settings, find_regions=not regions)
        sigmas = torch.cat([self.sampling.sigmas[timesteps], torch.zeros(1)])
        noise = self.noise()
        found = comfy.sample.sample_custom(
            ready.model, noise, settings.cfg, comfy.samplers.KSAMPLER(function), sigmas, ready.positive,
            ready.negative, torch.zeros_like(noise), disable_pbar=True)
        return ready.model.model.process_latent_in(found)

    def noise(self) -> torch.Tensor:
        return torch.randn(COUNT, self.backbone.latent_channels, *self.size,
                           generator=torch.Generator().manual_seed(4))

    def estimates(self, bank, regions, settings, timesteps=(999, 300)):
        """Pairs of guided noise estimates, of the library and of ComfyUI."""
        latents, theirs = self.noise(), []

        def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
            for sigma in sigmas[:-1]:
                scaled = latents * (1 + sigma**2).sqrt()
                theirs.append((scaled - model(scaled, sigma.expand(len(x)), **extra_args)) / sigma)
            return x

        self._comfy(sampler, bank, regions, settings, list(timesteps))
        always_on = always_on_deltas(bank, averages=True)
        with torch.inference_mode(False), torch.no_grad(), self.backbone.folded(always_on):
            run = library.RegionSampling(self.backbone, bank, bank.parse(SCENE), regions, COUNT, settings,
                                         self.size)
            last = len(timesteps) - 1
            return [(run.estimate(latents, t, i / last), theirs[i]) for i, t in enumerate(timesteps)]

    def sampled(self, monkeypatch, bank, regions, settings, scene=SCENE):
        """Latents of a whole sampling. Euler's method over noise levels is DDIM over timesteps."""
        from comfy.k_diffusion.sampling import sample_euler

        from continual_concepts.core.model.solver import FirstOrder

        timesteps = FirstOrder(self.backbone.schedule, settings.steps).timesteps
        theirs = self._comfy(sample_euler, bank, regions, settings, timesteps, scene)
        settings = self.sized(settings)
        for module in (library, library_found):
            monkeypatch.setattr(module, "solver_for", FirstOrder)
            monkeypatch.setattr(module, "starting_noise", lambda *_: self.noise())
        monkeypatch.setattr(self.backbone, "decode_latents", lambda latents: latents)
        seeds = [0] * COUNT
        with torch.inference_mode(False):
            if not regions:
                return library_found.sample_found(self.backbone, bank, scene, seeds, settings), theirs
            return library.sample_regions(self.backbone, bank, scene, regions, seeds, settings), theirs


@pytest.fixture
def hosts(reference, demo):
    return Hosts(reference, *demo[:2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_guided_noise(hosts, banks, case, kind):
    """In the first step and in the last one."""
    regions, settings = drawn(case, kind)
    errors = [relative_error(comfy, ours) for ours, comfy in hosts.estimates(banks[kind], regions, settings)]
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_whole_sampling(hosts, banks, monkeypatch, kind):
    regions, settings = drawn("everything", kind)
    ours, comfy = hosts.sampled(monkeypatch, banks[kind], regions, settings)
    plain, _ = hosts.sampled(monkeypatch, banks[kind], [replace(region, prompt=SCENE) for region in regions],
                             settings)
    assert relative_error(comfy, ours) < TOLERANCE and relative_error(ours, plain) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["prompt-activated", "word-bound"])
@torch.inference_mode()
def test_found_regions(hosts, banks, monkeypatch, reference, kind):
    """Regions that are found in the first steps are the same in both hosts."""
    from continual_concepts.core.sampling import sampling

    scene = "a photo of <rex> and <mimi> in a meadow"
    ours, comfy = hosts.sampled(monkeypatch, banks[kind], [], SETTINGS, scene)
    monkeypatch.setattr(sampling, "solver_for", library_found.solver_for)
    monkeypatch.setattr(sampling, "starting_noise", library_found.starting_noise)
    with torch.inference_mode(False):
        plain = sample(reference, banks[kind], [scene] * COUNT, [0] * COUNT, hosts.sized(SETTINGS))
    assert relative_error(comfy, ours) < TOLERANCE and relative_error(ours, plain) > 100 * TOLERANCE


@pytest.mark.parametrize("case", ["boxes", "crop denoising", "region noise, crop", "region noise, frame"])
@torch.inference_mode()
def test_sdxl(tiny_xl, tiny_sdxl, make_concept, monkeypatch, case):
    """A region that is evaluated alone has a pooled text and a size of its own."""
    monkeypatch.setattr(tiny_sdxl, "picture_multiple", 8)      # as ComfyUI counts the picture's size
    bank = ConceptBank(tiny_sdxl.layout)
    for i, name in enumerate(("rex", "mimi")):
        bank = bank.add(make_concept(tiny_sdxl.layout, name, seed=i, size=0.3))
    regions, settings = drawn(case, "prompt-activated")
    pairs = Hosts(tiny_sdxl, *tiny_xl[:2]).estimates(bank, regions, settings)
    assert max(relative_error(comfy, ours) for ours, comfy in pairs) < TOLERANCE


@pytest.fixture(scope="module")
def half_bound(bank):
    """Concepts whose keys and values act through their words, queries and outputs on the whole prompt."""
    from continual_concepts.core.bank.composition import Composition, Kind

    made = ConceptBank(bank.layout)
    for concept in bank:
        composition = Composition(Kind.WORDS, free=("to_q", "to_out"))
        made = made.add(replace(concept, info=replace(concept.info, composition=composition)))
    return made


@torch.inference_mode()
def test_free_projections_of_concepts_that_negative_prompts_name(hosts, half_bound):
    regions = [Region("<rex>", LEFT), Region("a photo of <mimi>", RIGHT, negative="a (<rex>:0.5)")]
    settings = replace(SETTINGS, negative="<blueprint>")
    errors = [relative_error(comfy, ours) for ours, comfy in hosts.estimates(half_bound, regions, settings)]
    assert max(errors) < TOLERANCE


@torch.inference_mode()
def test_free_projections_of_concepts_in_the_model_act_once(hosts, half_bound, studio):
    """Regions leave out what the MODEL's weights hold already."""
    from comfy.k_diffusion.sampling import sample_euler

    scene, regions = "<rex> in a meadow", [Region("a photo of <rex>", LEFT), Region("<mimi>", RIGHT)]
    model, clip, *_ = studio.aggregate(scene, half_bound)
    held = Hosts(hosts.backbone, model, clip)
    found, expected = (host._comfy(sample_euler, own, regions, SETTINGS, [999, 500], scene)
                       for host, own in ((held, None), (hosts, half_bound)))
    assert relative_error(found, expected) < TOLERANCE
