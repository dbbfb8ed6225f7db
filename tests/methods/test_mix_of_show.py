"""Mix-of-Show: single concepts, what their layers read, and the least squares that fuses them."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.attention.adapters import AdapterProcessor, LowRankAdapters
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.prompts import Vocabulary
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import always_on_deltas, learning_deltas
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, Task, make
from continual_concepts.core.methods.fusion import mark
from continual_concepts.core.methods.mix_of_show import GROUPS
from continual_concepts.core.model.processor import AttentionProcessor
from continual_concepts.core.neurons.recording import MomentRecorder, record_moments

QUICK = {"passes": 3, "rows": 24, "lr": 0.05}


@pytest.fixture(scope="module")
def bank(slim_backbone, teach):
    bank = ConceptBank(slim_backbone.layout)
    for name, noun in (("rex", "dog"), ("mimi", "cat")):
        bank = teach(slim_backbone, bank, name, "mix_of_show", QUICK, noun=noun).bank
    return bank


@pytest.fixture(scope="module")
def singles(slim_backbone, teach):
    """The same two concepts before any fusion: LoRA-M learns exactly so."""
    def single(name, noun):
        return teach(slim_backbone, ConceptBank(slim_backbone.layout), name, "lora_m", {"lr": 0.05},
                     noun=noun).concept

    return {"rex": single("rex", "dog"), "mimi": single("mimi", "cat")}


def kept(bank, concept, key):
    """Inputs and targets that the state holds of one concept at one projection."""
    group = next(name for name, projections in GROUPS.items() if key[1] in projections)
    keys = [(site.index, projection) for site in bank.layout.sites for projection in GROUPS[group]]
    shapes = [bank.layout.sites[i].shape(p) for i, p in keys]
    state, owner, at = bank.shared["mix_of_show"], mark(concept.tokens, concept.deltas), keys.index(key)
    return tuple(state[f"{owner}.{group}.{part}"].split([shape[side] for shape in shapes], dim=1)[at]
                 for part, side in (("inputs", 1), ("targets", 0)))


def test_single_concepts_are_trained_alone(bank, singles):
    for name, single in singles.items():
        assert torch.equal(bank[name].tokens.vectors["clip_l"], single.tokens.vectors["clip_l"])
    assert learning_deltas(bank, "mix_of_show", METHODS["mix_of_show"].method.builds_on_sum) == {}


def test_targets_are_what_single_concepts_do(bank, singles):
    for name, single in singles.items():
        for key, delta in single.deltas.items():
            inputs, targets = kept(bank, bank[name], key)
            assert torch.allclose(delta.apply(inputs), targets,
                                  atol=1e-4 * float(targets.abs().max()) + 1e-7) and targets.any(), key
            assert inputs.shape[0] == (6 if key[1] in GROUPS["text"] else QUICK["rows"])


def test_the_records_add_up_to_the_least_squares_solution(bank):
    """Dense normal equations over both concepts' rows: D = T^T X (X^T X + rho I)^-1, rho on the scale of the
    rows' own Gram."""
    total = always_on_deltas(bank)
    assert len(total) == 4 * len(bank.layout)
    for key, delta in total.items():
        x, t = (torch.cat(parts).double()
                for parts in zip(*(kept(bank, concept, key) for concept in bank), strict=True))
        rho = 1e-3 * x.square().sum() / len(x)
        expected = t.T @ x @ torch.linalg.inv(x.T @ x + rho * torch.eye(x.shape[1]))
        assert torch.allclose(delta.dense().double(), expected, atol=2e-3 * float(expected.abs().max())), key


def test_fused_weights_serve_both_concepts_better_than_their_mean(bank, singles):
    total = always_on_deltas(bank)

    def error(delta_of):
        return sum(float((delta_of(key).apply(x) - t).square().sum() / t.square().sum())
                   for key in total for concept in bank for x, t in [kept(bank, concept, key)])

    def mean(key):
        # of the one, the other's half left out: what a mean leaves of it at best
        return singles["rex"].deltas[key].scaled(0.5)

    assert error(total.get) < 0.25 * error(mean)


def test_the_first_record_has_no_more_rank_than_the_adapter(bank):
    assert all(delta.up.shape[1] <= 4 for delta in bank["rex"].deltas.values())
    assert all(delta.up.shape[1] <= 12 for delta in bank["mimi"].deltas.values())


def test_recorded_moments_are_of_the_inputs(slim_backbone):
    """Every x that a processor sees at to_q and to_out, of both halves of guidance, and nothing else."""
    seen = {}

    class Watch(AttentionProcessor):
        def project(self, site, projection, x, y):
            seen.setdefault((site.index, projection), []).append(x.flatten(0, -2))
            return y

    context = encode_prompts(slim_backbone, Vocabulary([]).parse_all(["", "a dog", "a cat"]), {})
    recorder = record_moments(slim_backbone, context, Watch(), (8, 8), 3, seed=0)
    assert {key[1] for key in recorder.sums} == {"to_q", "to_out"}
    assert {key[1] for key in seen} == {"to_q", "to_k", "to_v", "to_out"}
    for key in recorder.sums:
        x = torch.cat(seen[key]).double()
        assert len(x) == recorder.counts[key] and len(seen[key]) == 3
        rows = recorder.leading(key, 40).double()
        moment = x.T @ x / len(x)
        if x.shape[1] <= 40:
            assert torch.allclose(rows.T @ rows, moment, atol=1e-4) and not rows[x.shape[1]:].any()
        values = torch.linalg.eigvalsh(moment).flip(0)
        left = torch.linalg.eigvalsh(moment - rows.T @ rows).abs().max()
        assert left < values[40:].sum() + 1e-4      # what is cut off is the tail


def test_the_recording_denoises_with_the_concept_s_own_weights(slim_backbone):
    context = encode_prompts(slim_backbone, Vocabulary([]).parse_all(["", "a dog"]), {})
    adapters = LowRankAdapters(slim_backbone.layout, 2, 1.0, torch.Generator().manual_seed(0), "cpu")
    plain = record_moments(slim_backbone, context, AdapterProcessor(adapters), (8, 8), 2, seed=0)
    base = record_moments(slim_backbone, context, AttentionProcessor(), (8, 8), 2, seed=0)
    assert torch.equal(plain.sums[0, "to_out"], base.sums[0, "to_out"])
    with torch.no_grad():
        for up in adapters.up.values():
            up.add_(0.5)
    changed = record_moments(slim_backbone, context, AdapterProcessor(adapters), (8, 8), 2, seed=0)
    assert not torch.allclose(changed.sums[0, "to_out"], base.sums[0, "to_out"], rtol=1e-2)
    assert not torch.equal(record_moments(slim_backbone, context, AttentionProcessor(), (8, 8), 2,
                                          seed=1).sums[0, "to_q"], base.sums[0, "to_q"])


def test_the_recording_ends_at_a_clean_picture(slim_backbone, monkeypatch):
    """With a base that knows the noise exactly, DDIM's last latents are the clean ones whatever the
    guidance."""
    clean, schedule, last = torch.zeros(1, 4, 8, 8) + 0.3, slim_backbone.schedule, []

    def oracle(latents, t, context, processor=None):
        alpha = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        last.append(latents)
        return (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()

    monkeypatch.setattr(slim_backbone, "predict", oracle)
    context = encode_prompts(slim_backbone, Vocabulary([]).parse_all(["", "a dog"]), {})
    record_moments(slim_backbone, context, AttentionProcessor(), (8, 8), 50, seed=0)
    assert len(last) == 50
    alphas = schedule.alphas_cumprod[torch.linspace(999, 0, 51).long()]
    noise = [float((x[:1] - alpha.sqrt() * clean).std() / (1 - alpha).sqrt())
             for x, alpha in zip(last, alphas, strict=False)]
    assert noise == pytest.approx([noise[0]] * 50, rel=1e-2)      # one and the same noise all the way down


def test_finishing_twice_gives_the_same(slim_backbone, bank):
    """Pictures asked for in the middle of training leave no trace."""
    method = make("mix_of_show", QUICK | {"stored": "float32"})
    method.begin(Task("new", "dog", slim_backbone, bank))
    with torch.no_grad():
        for up in method.adapters.up.values():
            up.add_(0.1)
    method.size = (8, 8)
    one, two = method.finish(), method.finish()
    assert all(torch.equal(one.deltas[key].up, two.deltas[key].up)
               for key in one.deltas) and len(one.shared) == 12
    assert all(torch.equal(one.shared[name], tensor) for name, tensor in two.shared.items())


def test_a_leading_row_is_the_direction_of_most_energy():
    recorder = MomentRecorder(AttentionProcessor())
    x = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 1, 1, 1, 1, 1])

    class Place:
        index = 0

    recorder.project(Place, "to_q", x, x)
    recorder.project(Place, "to_k", x, x)
    first = recorder.leading((0, "to_q"), 1)[0]
    assert first[0].abs() / first.norm() > 0.99
    assert first.norm() == pytest.approx(float(x[..., 0].square().mean().sqrt()), rel=0.02)
    assert list(recorder.sums) == [(0, "to_q")]


@pytest.mark.parametrize("settings", [{"passes": 0}, {"rows": 0}, {"ridge": 0.0}, {"rank": 129}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ConceptError, match=f"'{next(iter(settings))}'"):
        make("mix_of_show", settings)
