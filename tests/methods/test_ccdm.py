"""CCDM's reading: a slow shared part, own parts apart from it and from each other, records that nothing later
touches."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.routing import aggregate
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import Task, make

SETTINGS = {"rank": 2, "shared_rank": 3, "scale": 0.5}


@pytest.fixture(scope="module")
def banks(slim_backbone, teach):
    one = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "ccdm", SETTINGS).bank
    return one, teach(slim_backbone, one, "mimi", "ccdm", SETTINGS, noun="cat").bank


def begun(backbone, bank, **settings):
    method = make("ccdm", SETTINGS | {"stored": "float32"} | settings)
    method.begin(Task("bear", "bear", backbone, bank))
    return method


def test_a_record_is_the_shared_part_of_its_time_and_its_own(banks):
    for bank, name in zip(banks, ("rex", "mimi"), strict=True):
        for (index, projection), delta in bank[name].deltas.items():
            key = f"{index}-{projection}"
            shared = 0.5 * bank.shared["ccdm"][f"up.{key}"] @ bank.shared["ccdm"][f"down.{key}"]
            own = 0.5 * delta.up[:, 3:] @ delta.down[3:]
            assert delta.up.shape[1] == 5 and shared.any() and own.any()
            assert torch.allclose(delta.dense(), shared + own, atol=1e-6)


def test_the_program_is_the_record(slim_backbone, banks):
    method, site = begun(slim_backbone, banks[1]), slim_backbone.layout.sites[2]
    with torch.no_grad():
        for parameter in method.adapters.parameters():
            parameter += 0.1
    x, y = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 3, 32)
    expected = method.finish().deltas[2, "to_q"].apply(x)
    assert torch.allclose(method.processor().project(site, "to_q", x, y), expected,
                          atol=1e-5) and expected.any()


def test_the_shared_part_moves_slowly(slim_backbone, banks, teach):
    def moved(slow):
        bank = teach(slim_backbone, banks[0], "mimi", "ccdm", SETTINGS | {"slow": slow}, noun="cat").bank
        return sum(float((f - banks[0].shared["ccdm"][name]).abs().sum())
                   for name, f in bank.shared["ccdm"].items())

    still, slow, quick = moved(0.0), moved(0.1), moved(1.0)
    assert still == 0 and 0 < slow < 0.2 * quick


def test_the_penalties_are_their_formulas(slim_backbone, banks):
    """Column by column over all old concepts."""
    method, g = begun(slim_backbone, banks[1], gamma_shared=2.0,
                      gamma_specific=3.0), torch.Generator().manual_seed(0)
    assert {name: term.item()
            for name, term in method.penalty(None).items()} == {"shared": 0.0, "specific": 0.0}
    shared = specific = 0.0
    for key in method.adapters.keys:
        name = f"{key[0]}-{key[1]}"
        with torch.no_grad():
            method.adapters.up[name].copy_(torch.randn(method.adapters.up[name].shape, generator=g))
        up = 0.5 * method.adapters.up[name].detach()
        for column in up.T:
            shared += sum(abs(float(column @ other)) for other in 0.5
                          * banks[1].shared["ccdm"][f"up.{name}"].T)
            specific += sum(abs(float(column @ other)) for concept in banks[1] for other in 0.5
                            * concept.deltas[key].up[:, 3:].T)
    terms = method.penalty(None)
    assert terms["shared"].item() == pytest.approx(2 * shared, rel=1e-4)
    assert terms["specific"].item() == pytest.approx(3 * specific, rel=1e-4)
    sum(terms.values()).backward()
    assert all(p.grad.any() for p in method.adapters.up.parameters())
    assert all(p.grad is None for p in method.shared.parameters())


def test_penalties_keep_the_own_parts_apart(slim_backbone, banks, teach):
    overlaps = []
    for gamma in (0.0, 10.0):
        settings = SETTINGS | {"gamma_shared": gamma, "gamma_specific": gamma}
        grown = teach(slim_backbone, banks[1], "bear", "ccdm", settings, steps=6, noun="bear").bank
        overlap = norm = 0.0
        for key, delta in grown["bear"].deltas.items():
            others = torch.cat([delta.up[:, :3], banks[1]["rex"].deltas[key].up[:, 3:],
                                banks[1]["mimi"].deltas[key].up[:, 3:]], dim=1)
            own = delta.up[:, 3:]
            overlap, norm = overlap + float((others.T @ own).abs().sum()), norm + float(own.norm())
        overlaps.append(overlap / norm)
    assert overlaps[1] < 0.7 * overlaps[0]


def test_concepts_are_routed(slim_backbone, banks):
    deltas = aggregate(slim_backbone, banks[1], banks[1].parse("a <mimi>")).deltas
    assert all(torch.equal(deltas[key].dense(), delta.dense())
               for key, delta in banks[1]["mimi"].deltas.items())


def test_the_shared_rank_of_a_bank_stays(slim_backbone, banks):
    with pytest.raises(ConceptError, match="'shared_rank' is 2; allowed: 3"):
        begun(slim_backbone, banks[1], shared_rank=2)
    assert begun(slim_backbone, banks[1], rank=7).penalty(None)      # the own rank is free


@pytest.mark.parametrize("settings", [{"shared_rank": 0}, {"slow": 2.0}, {"gamma_shared": -1.0},
                                      {"gamma_specific": -1.0}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ConceptError, match=f"'{next(iter(settings))}'"):
        make("ccdm", settings)
