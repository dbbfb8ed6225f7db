"""CNS: few entries, chosen per concept, bit-identical elsewhere, tied to what was learned before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from continual_concepts.core.attention.adapters import AdapterProcessor
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import always_on_deltas
from continual_concepts.core.data.batch import Batch
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import Task, make
from continual_concepts.core.methods.cns import CNS
from continual_concepts.core.model.deltas import SparseDelta
from continual_concepts.core.neurons.neurons import NeuronSelection
from continual_concepts.core.neurons.scores import key_value_weights, weight_of
from continual_concepts.core.neurons.sparse import SparseAdapters, SparseLinear
from continual_concepts.core.training.config import TrainingConfig
from continual_concepts.core.training.objective import denoising_loss, draw, predict

QUICK = {"selection_steps": 2, "calibration": 2, "share": 0.058}


@pytest.fixture(scope="module")
def banks(slim_backbone, teach):
    """After one concept, and after two."""
    one = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "cns", QUICK, steps=4).bank
    return one, teach(slim_backbone, one, "mimi", "cns", QUICK, steps=4, noun="cat").bank


def selection_of(concept):
    return NeuronSelection({key: d.indices for key, d in concept.deltas.items()},
                           {key: d.size for key, d in concept.deltas.items()})


def stored(bank, prefix):
    state = bank.shared["cns"]
    return NeuronSelection.from_tensors({k[len(prefix):]: state[k] for k in state if k.startswith(prefix)},
                                        bank.layout)


def same(one, two):
    if one.indices.keys() != two.indices.keys():
        return False
    return all(torch.equal(one.indices[key], two.indices[key]) for key in one.indices)


def begun(backbone, bank, settings=None, selection=None, name="bear"):
    method = make("cns", {"stored": "float32"} | (settings or {}))
    method.use_selection(selection)
    method.begin(Task(name, "bear", backbone, bank))
    return method


def test_a_concept_has_its_share_of_the_keys_and_values(banks, slim_backbone):
    for concept in banks[1]:
        assert set(concept.deltas) == set(key_value_weights(slim_backbone.layout))
        for delta in concept.deltas.values():
            assert isinstance(delta, SparseDelta)
            assert delta.indices.numel() == int(0.058 * delta.size[0] * delta.size[1])
            assert delta.values.any()
        assert selection_of(concept).share() == pytest.approx(0.058, abs=0.001)


def test_the_share_agrees_with_the_papers_figures_of_stable_diffusion():
    """16 sites: widths 320 x 5, 640 x 5, 1280 x 6, context 768; 859.5 M weights in the UNet. 53 % of the base
    neurons are general."""
    weights = 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280)
    assert 0.47 * make("cns").config.base_share * weights / 859.5e6 == pytest.approx(0.0013, abs=0.0001)


def test_the_share_is_what_the_general_neurons_leave(slim_backbone, teach):
    """It differs between weights and concepts, and is never more than the base neurons."""
    settings, infos = {"selection_steps": 2, "calibration": 4, "quorum": 0.25}, []
    bank = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "cns", settings, steps=4,
                 callback=infos.append).bank
    found, general = selection_of(bank["rex"]), stored(bank, "general.")
    shares = {key: len(places) / (found.sizes[key][0] * found.sizes[key][1])
              for key, places in found.indices.items()}
    assert len(found & general) == 0 and len(set(shares.values())) > 1
    assert max(shares.values()) <= 0.12 and found.share() < 0.12
    entries = sum(a * b for a, b in (slim_backbone.layout.sites[i].shape(part)
                                     for i, part in key_value_weights(slim_backbone.layout)))
    assert infos[-1].monitors["share"] == pytest.approx(len(found) / entries)


def test_the_calibration_shows_what_the_base_knows(slim_backbone, monkeypatch):
    monkeypatch.setattr(slim_backbone, "known_prompts", ("a red dog", "a cat"), raising=False)
    assert begun(slim_backbone, ConceptBank(slim_backbone.layout)).prompts == ("a red dog", "a cat")
    assert len(load_base().known_prompts) == 32


def test_concept_neurons_are_not_general(banks):
    general = stored(banks[1], "general.")
    assert len(general) and all(len(selection_of(concept) & general) == 0 for concept in banks[1])


def test_concepts_choose_for_themselves(banks):
    assert not same(*(selection_of(concept) for concept in banks[1]))


def test_the_bank_keeps_the_union(banks):
    first, second = (selection_of(concept) for concept in banks[1])
    assert same(stored(banks[0], "union."), first) and same(stored(banks[1], "union."), first | second)


def test_general_neurons_are_found_once(banks, slim_backbone, teach, monkeypatch):
    assert same(stored(banks[0], "general."), stored(banks[1], "general."))
    monkeypatch.setattr("continual_concepts.core.methods.cns.general_neurons", None)
    teach(slim_backbone, banks[1], "bear", "cns", QUICK, steps=3)
    with pytest.raises(TypeError):      # made in another way, they would have to be found again
        teach(slim_backbone, banks[1], "bear", "cns", QUICK | {"quorum": 0.6}, steps=3)


def test_other_weights_stay_bit_identical(banks, slim_backbone):
    bank = banks[1]
    union, layout = stored(bank, "union."), slim_backbone.layout
    before = {key: slim_backbone.weight(layout.sites[key[0]], key[1]).clone()
              for key in key_value_weights(layout)}
    with slim_backbone.folded(always_on_deltas(bank)):
        for key, weight in before.items():
            now, mask = slim_backbone.weight(layout.sites[key[0]], key[1]), union.mask(key)
            assert torch.equal(now[~mask], weight[~mask]) and not torch.equal(now[mask], weight[mask])


def test_a_saved_bank_goes_on_with_the_same_masks(banks, tmp_path):
    save_bank(banks[1], tmp_path / "bank.safetensors")
    again = open_bank(tmp_path / "bank.safetensors")
    assert same(stored(again, "union."), stored(banks[1], "union."))
    for name in ("rex", "mimi"):
        for key, delta in banks[1][name].deltas.items():
            assert torch.equal(again[name].deltas[key].indices, delta.indices)
            assert torch.equal(again[name].deltas[key].values, delta.values)


@pytest.mark.parametrize("settings",
                         [{"score": "activation"}, {"unit": "row"}, {"calibration": 0}, {"layerwise": False}])
def test_the_other_readings_learn_too(slim_backbone, teach, settings):
    learned = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "cns", QUICK | settings, steps=3)
    found = selection_of(learned.concept)
    assert all(delta.values.any() for delta in learned.concept.deltas.values())
    assert found.share() == pytest.approx(0.058, abs=0.03)      # rows of a narrow site are coarse
    if settings.get("unit") == "row":
        assert all((found.mask(key).sum(1) % found.sizes[key][1] == 0).all() for key in found.sizes)
    assert any(name.startswith("general.")
               for name in learned.bank.shared["cns"]) == ("calibration" not in settings)


def test_words_alone_are_trained_before_the_choice(slim_backbone, teach):
    infos = []
    learned = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "cns", steps=2,
                    callback=infos.append)
    assert not learned.concept.deltas and not learned.bank.shared and not infos[0].snapshot()["rex"].deltas


def test_the_loss_goes_down(slim_backbone, teach):
    """By the deltas alone: words held still, the same noise and timesteps with and without them."""
    picture = Picture(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    bank = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "cns", QUICK | {"token_lr": 0.0},
                 pictures=[picture], steps=25, schedule="constant").bank
    data, config = prepare(slim_backbone, [picture], "rex", "dog",
                           Framing(32, flip=False)), TrainingConfig(resolution=32)
    batch, g = data.draw(16, 0.0, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
    context = encode_prompts(slim_backbone, bank.vocabulary.parse_all(batch.prompts),
                             {"rex": bank["rex"].tokens})
    drawn, losses = draw(batch, 1000, config, g), []
    for deltas in ({}, always_on_deltas(bank)):
        with torch.no_grad(), slim_backbone.folded(deltas):
            seen = predict(slim_backbone, batch, context, drawn, None)
            losses.append(float(denoising_loss(slim_backbone, seen, config)))
    assert losses[1] < losses[0]


def everything(backbone):
    """The first tenth of every key and value weight."""
    layout = backbone.layout
    sizes = {key: layout.sites[key[0]].shape(key[1]) for key in key_value_weights(layout)}
    return NeuronSelection({key: torch.arange(a * b // 10) for key, (a, b) in sizes.items()}, sizes)


def learn_with(slim_backbone, teach, monkeypatch, bank, chosen, name, settings, **training):
    monkeypatch.setattr(CNS, "selection", chosen)
    return teach(slim_backbone, bank, name, "cns", settings, **training)


def test_a_selection_from_outside_is_used(slim_backbone, teach, monkeypatch):
    chosen, bank = everything(slim_backbone), ConceptBank(slim_backbone.layout)
    learned = learn_with(slim_backbone, teach, monkeypatch, bank, chosen, "rex", {})
    assert same(selection_of(learned.concept), chosen) and same(stored(learned.bank, "union."), chosen)
    assert all(delta.values.any() for delta in learned.concept.deltas.values())


def test_a_selection_may_hold_any_projection_of_some_sites(slim_backbone, teach, monkeypatch):
    indices = {(1, "to_q"): torch.tensor([0, 9]), (2, "to_k"): torch.tensor([], dtype=torch.long)}
    chosen = NeuronSelection(indices,
                             {key: slim_backbone.layout.sites[key[0]].shape(key[1]) for key in indices})
    learned = learn_with(slim_backbone, teach, monkeypatch, ConceptBank(slim_backbone.layout), chosen, "rex",
                         {})
    assert list(learned.concept.deltas) == [(1, "to_q")] and learned.concept.deltas[1, "to_q"].values.all()


def test_selections_that_cannot_be_used_are_refused(slim_backbone, tiny_sdxl):
    bank = ConceptBank(slim_backbone.layout)
    with pytest.raises(ConceptError, match="needs"):
        begun(slim_backbone, bank, selection=everything(tiny_sdxl))
    with pytest.raises(ConceptError, match="0 entries"):
        begun(slim_backbone, bank, selection=NeuronSelection({}, {}))


def test_the_second_task_protects_the_neurons_of_the_first(slim_backbone, teach, monkeypatch):
    """Where both concepts chose the same neurons, the tie holds them; where it is off, they move."""
    chosen, moved = everything(slim_backbone), []
    first = learn_with(slim_backbone, teach, monkeypatch, ConceptBank(slim_backbone.layout), chosen, "rex",
                       {}).bank
    for tie in (0.0, 1e6):
        infos = []
        settings = {"tie_previous": tie, "tie_base": 0.0, "token_lr": 0.0}
        learned = learn_with(slim_backbone, teach, monkeypatch, first, chosen, "mimi", settings, steps=8,
                             noun="cat", callback=infos.append)
        moved.append(sum(float(d.values.square().sum()) for d in learned.concept.deltas.values()))
        assert set(infos[-1].terms) == ({"previous"} if tie else set())
    assert moved[1] < 0.5 * moved[0]


def test_the_ties_are_the_two_distances(slim_backbone, banks):
    """previous: to W_t-1 on old neurons; base: to W_0 on all chosen ones; both over the energy of the chosen
    weights."""
    chosen, bank = everything(slim_backbone), banks[1]
    method = begun(slim_backbone, bank, {"tie_previous": 2.0, "tie_base": 3.0}, chosen)
    drift = always_on_deltas(bank)
    latents = torch.zeros(1, 4, 8, 8)
    batch = Batch(latents, ("",), latents[:, :1], torch.zeros(1, dtype=torch.bool), torch.ones(1))
    with slim_backbone.folded(drift):      # as while training
        method.on_batch(batch)
    g, previous, base, energy = torch.Generator().manual_seed(0), 0.0, 0.0, 0.0
    union = stored(bank, "union.")
    for key in chosen.sizes:
        values, places = method.adapters.at(key)
        with torch.no_grad():
            values.copy_(torch.randn(values.shape, generator=g))
        now = SparseDelta(chosen.sizes[key], places, values.detach()).dense()
        mask = chosen.mask(key)
        previous += float((now * (union.mask(key) & mask)).square().sum())
        base += float(((now + drift[key].dense()) * mask).square().sum())
        energy += float(((weight_of(slim_backbone, key) + drift[key].dense()) * mask).square().sum())
    terms = method.penalty(None)
    assert terms["previous"].item() == pytest.approx(2.0 * previous / energy, rel=1e-4)
    assert terms["base"].item() == pytest.approx(3.0 * base / energy, rel=1e-4)


def test_no_tie_before_the_second_task(slim_backbone):
    assert begun(slim_backbone, ConceptBank(slim_backbone.layout),
                 selection=everything(slim_backbone)).penalty(None) == {}


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resuming_is_exact_before_at_and_after_the_choice(slim_backbone, teach, banks, tmp_path, stop_after):
    def stop(info):
        if info.step == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(slim_backbone, banks[0], "mimi", "cns", QUICK, steps=4, noun="cat", callback=stop,
              checkpoint_file=tmp_path / "c")
    again = teach(slim_backbone, banks[0], "mimi", "cns", QUICK, steps=4, noun="cat",
                  checkpoint_file=tmp_path / "c").bank
    for key, delta in banks[1]["mimi"].deltas.items():
        assert torch.equal(again["mimi"].deltas[key].indices, delta.indices)
        assert torch.equal(again["mimi"].deltas[key].values, delta.values)
    assert all(torch.equal(again.shared["cns"][name], tensor)
               for name, tensor in banks[1].shared["cns"].items())


def test_the_sparse_product_and_its_gradients():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=g, requires_grad=True)
    values, places = torch.randn(4, generator=g,
                                 requires_grad=True), torch.tensor([0, 7, 12, 19], dtype=torch.int32)
    out = torch.randn(2, 3, 4, generator=g)
    dense = torch.zeros(20).index_put((places.long(),), values).view(4, 5)
    expected = torch.autograd.grad((F.linear(x, dense) * out).sum(), (x, values))
    y = SparseLinear.apply(x, values, places, (4, 5))
    found = torch.autograd.grad((y * out).sum(), (x, values))
    assert torch.allclose(y, F.linear(x, dense))
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(found, expected, strict=True))


def test_trainables_are_the_sparse_values_and_the_words(slim_backbone):
    method = begun(slim_backbone, ConceptBank(slim_backbone.layout), {"share": 0.058})
    words, weights = method.parameter_groups()
    expected = sum(int(0.058 * a * b) for a, b in method.adapters.all_sizes.values())
    assert sum(p.numel() for p in weights["params"]) == expected and len(words["params"]) == 1
    assert weights["weight_decay"] == 0.0


def test_other_projections_are_left_alone(slim_backbone):
    layout, key = slim_backbone.layout, (0, "to_k")
    site, adapters = layout.sites[0], SparseAdapters(layout, {key: 3}, "cpu")
    size = site.shape("to_k")
    adapters.place(NeuronSelection({key: torch.arange(3)}, {key: size}))
    x, y = torch.ones(1, 2, size[1]), torch.ones(1, 2, size[0])
    assert AdapterProcessor(adapters).project(site, "to_v", x, y) is y
    assert AdapterProcessor(adapters).project(site, "to_k", x, y) is not y


@pytest.mark.parametrize("settings", [
    {"share": -0.1}, {"base_share": 0.0}, {"general_share": 1.1}, {"general_share": 0.6, "share": 0.1},
    {"unit": "column"}, {"score": "fisher"}, {"selection_steps": 0}, {"calibration": 99},
    {"quorum": 0.0}, {"tie_previous": -1.0}, {"tie_base": -1.0},
])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ConceptError, match=f"'{next(iter(settings))}'"):
        make("cns", settings)


def test_it_learns_on_two_text_encoders(tiny_sdxl, teach):
    concept = teach(tiny_sdxl, ConceptBank(tiny_sdxl.layout), "rex", "cns", QUICK, steps=3).concept
    assert len(concept.deltas) == 2 * len(tiny_sdxl.layout)
    assert all(delta.values.any() for delta in concept.deltas.values())
