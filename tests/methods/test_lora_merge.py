"""LoRA-M is the mean of the deltas, LoRA-C the mean of the predictions; both learn every concept alone on the
base."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.concepts import Concept
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import always_on_deltas, averaged_names
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import make
from continual_concepts.core.model.solver import denoise, solver_for
from continual_concepts.core.sampling import sampling
from continual_concepts.core.sampling.sampling import sample, starting_noise
from continual_concepts.core.sampling.settings import SampleSettings

QUICK = SampleSettings(steps=3, cfg=2.0, size=(32, 32))
NOUNS = {"rex": "dog", "mimi": "cat"}


@pytest.fixture(scope="module")
def banks(slim_backbone, teach):
    def grown(method, names):
        bank = ConceptBank(slim_backbone.layout)
        for name in names:      # rates high enough that a wrong composition shows
            bank = teach(slim_backbone, bank, name, method, {"lr": 0.1}, noun=NOUNS[name], steps=4).bank
        return bank

    return {(m, names): grown(m, names) for m in ("lora_m", "lora_c")
            for names in (("rex",), ("mimi",), ("rex", "mimi"))}


def as_method(bank, method):
    """The same concepts as another method's."""
    other = ConceptBank(bank.layout)
    for concept in bank:
        other = other.add(Concept(replace(concept.info, method=method, composition=None), concept.tokens,
                                  concept.deltas))
    return other


@pytest.mark.parametrize("method", ["lora_m", "lora_c"])
def test_every_concept_is_learned_alone(banks, method):
    alone, after = banks[method, ("mimi",)]["mimi"], banks[method, ("rex", "mimi")]["mimi"]
    assert all(torch.equal(alone.tokens.vectors[name], vector)
               for name, vector in after.tokens.vectors.items())
    for key, delta in after.deltas.items():
        assert torch.equal(alone.deltas[key].up,
                           delta.up) and torch.equal(alone.deltas[key].down, delta.down) and delta.up.any()


def test_the_merge_is_the_mean_of_the_deltas(banks):
    bank = banks["lora_m", ("rex", "mimi")]
    found = always_on_deltas(bank)
    for key, delta in found.items():
        expected = torch.stack([concept.deltas[key].dense() for concept in bank]).mean(0)
        assert torch.allclose(delta.dense(), expected, atol=1e-7) and expected.any()
    assert [make("lora_m").composition.share(g) for g in (1, 2, 4)] == [1.0, 0.5, 0.25]


def folded_estimates(backbone, bank, prompt, x, t):
    """The guided prediction of every concept's own model, each with its deltas folded into the weights."""
    tokens = {concept.name: concept.tokens for concept in bank}
    context = encode_prompts(backbone, bank.vocabulary.parse_all(["", prompt]), tokens)
    for concept in bank:
        with backbone.folded(concept.deltas):
            timesteps = torch.full((2,), t)
            output = backbone.predict(torch.cat([x, x]), timesteps, context)
        without, wanted = backbone.schedule.to_epsilon(output, torch.cat([x, x]), timesteps).chunk(2)
        yield without + QUICK.cfg * (wanted - without)


@torch.no_grad()
def test_sampling_is_the_mean_of_the_predictions(slim_backbone, banks):
    bank, prompt = banks["lora_c", ("rex", "mimi")], "a <rex> and a <mimi>"

    def estimate(x, t, _progress):
        return torch.stack(list(folded_estimates(slim_backbone, bank, prompt, x, t))).mean(0)

    noise = starting_noise(slim_backbone, [7], (32, 32))
    latents = denoise(solver_for(slim_backbone.schedule, QUICK.steps), noise, estimate)
    expected = slim_backbone.decode_latents(latents)
    found = sample(slim_backbone, bank, [prompt], [7], QUICK)
    assert torch.allclose(found, expected, atol=1e-4)
    merged = sample(slim_backbone, as_method(bank, "lora_m"), [prompt], [7], QUICK)
    activated = sample(slim_backbone, as_method(bank, "cidm"), [prompt], [7], QUICK)
    assert not torch.allclose(found, merged, atol=1e-3) and not torch.allclose(found, activated, atol=1e-3)


@torch.no_grad()
def test_one_prediction_is_the_mean_of_all(slim_backbone, banks, monkeypatch):
    """What the sampler is told in its first step, against the folded models, far below what pictures can
    show."""
    bank, seen = banks["lora_c", ("rex", "mimi")], []
    monkeypatch.setattr(sampling, "denoise", lambda _solver, x, estimate,
                        *_: seen.append((x, estimate(x, 500, 0.0))) or x)
    sample(slim_backbone, bank, ["a <rex>"], [3], QUICK)
    x, found = seen[0]
    each = list(folded_estimates(slim_backbone, bank, "a <rex>", x, 500))
    assert torch.allclose(found, (each[0] + each[1]) / 2, atol=1e-5)
    assert (each[0] - each[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["rex", "mimi"])
def test_one_concept_alone_is_as_if_it_were_activated(slim_backbone, banks, name):
    for method in ("lora_m", "lora_c"):
        bank = banks[method, (name,)]
        activated = sample(slim_backbone, as_method(bank, "cidm"), [f"a <{name}>"], [7], QUICK)
        assert torch.allclose(sample(slim_backbone, bank, [f"a <{name}>"], [7], QUICK), activated, atol=1e-4)


def test_an_average_costs_one_evaluation_per_concept(slim_backbone, banks, monkeypatch):
    calls, plain = [], slim_backbone.predict
    monkeypatch.setattr(slim_backbone, "predict", lambda *args,
                        **more: calls.append(1) or plain(*args, **more))
    counts = {}
    for method in ("lora_m", "lora_c"):
        calls.clear()
        sample(slim_backbone, banks[method, ("rex", "mimi")], ["a <rex>"], [7], QUICK)
        counts[method] = len(calls)
    assert counts == {"lora_m": QUICK.steps, "lora_c": 2 * QUICK.steps}


def test_an_average_leaves_the_weights_of_others_alone(banks):
    assert always_on_deltas(banks["lora_c", ("rex", "mimi")]) == {}
    assert averaged_names(banks["lora_c", ("rex", "mimi")]) == ["rex", "mimi"]


@pytest.mark.parametrize("settings", [{"rank": 129}, {"token_lr": -1.0}, {"first_std": -0.1}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ConceptError, match=f"'{next(iter(settings))}'"):
        make("lora_c", settings)
