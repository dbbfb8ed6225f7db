"""Every form of LoRA becomes the exact deltas that its formula gives."""

from __future__ import annotations

from random import Random

import pytest
import torch
from safetensors.torch import save_file

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.interop.importing import import_concept
from continual_concepts.core.interop.lora_deltas import frozen_weight, lora_deltas
from continual_concepts.core.interop.lora_file import LoraFile, read_lora
from continual_concepts.core.interop.lora_forms import Change, Matrix, full_rank
from continual_concepts.tests.comparing import distance
from continual_concepts.tests.lora_files import FORMS, Writer, module_names, written


@pytest.fixture(scope="module")
def weight(tiny_backbone):
    def of(site: int, projection: str) -> torch.Tensor:
        return tiny_backbone.weight(tiny_backbone.layout.sites[site], projection).detach()

    return of


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_exact(form, tiny_backbone, weight):
    state, changes = written(form, tiny_backbone.layout, weight)
    taken = lora_deltas(LoraFile(state), tiny_backbone.layout, "it", "", tiny_backbone)
    assert taken.deltas.keys() == changes.keys()
    for key, change in changes.items():
        assert distance(taken.deltas[key].dense(), change) < 2e-6, key
    assert taken.share == 1 and not taken.left and sum(taken.forms.values()) == len(changes)


@pytest.mark.parametrize("form", ["loha_of_full_rank", "lokr", "dora_of_rows"])
def test_a_bank_keeps_them(form, tiny_backbone, weight, tmp_path):
    state, changes = written(form, tiny_backbone.layout, weight)
    save_file(state, tmp_path / "some.safetensors")
    result = import_concept("rex", "dog", "object", tiny_backbone.layout, tiny_backbone.text,
                            tmp_path / "some.safetensors", trigger="dog", backbone=tiny_backbone)
    save_bank(ConceptBank(tiny_backbone.layout).add(result.concept), tmp_path / "bank.safetensors")
    stored = open_bank(tmp_path / "bank.safetensors")["rex"]
    for key, change in changes.items():
        assert distance(stored.deltas[key].dense(), change) < 5e-4, key      # rounded to fp16 once
    assert any("kept exactly" in note for note in result.notes)
    assert bool(stored.info.provenance.base) == form.startswith("dora")


def test_the_lowest_rank_that_is_exact():
    writer = Writer()
    few, many = (Matrix(writer.random(16, r), writer.random(r, 12)) for r in (2, 4))
    assert Change("LoHa", few, few).delta().down.shape[0] == 4
    assert Change("LoHa", many, many).delta().down.shape[0] == 12      # 16 columns: as a product with I
    assert Change("LoKr", Matrix(writer.random(2, 2)), few).delta().down.shape[0] == 4
    assert full_rank(torch.zeros(3, 5)).dense().equal(torch.zeros(3, 5))


def test_energies_are_squared_norms():
    writer = Writer()
    one, other = (Matrix(writer.random(6, 2), writer.random(2, 4)) for _ in range(2))
    for change, dense in ((Change("LoRA", one, None, 0.5), 0.5 * one.dense()),
                          (Change("LoHa", one, other, 2.0), 2 * one.dense() * other.dense()),
                          (Change("LoKr", one, other, 3.0), 3 * torch.kron(one.dense(), other.dense()))):
        assert change.energy() == pytest.approx(float(dense.square().sum()), rel=1e-5)
        assert change.shape == dense.shape and distance(change.delta().dense(), dense) < 1e-5


def test_convolutions_with_a_core_tensor(tiny_backbone, weight):
    """They are no part of a concept, and count with their true size."""
    writer = Writer()
    state, changes = written("lora", tiny_backbone.layout, weight)
    core, up, down = writer.random(2, 3, 3, 3), writer.random(8, 2, 1, 1), writer.random(3, 5, 1, 1)
    name = "lora_unet_down_blocks_0_resnets_0_conv"
    for side, tensor in (("up", up), ("down", down), ("mid", core)):
        state[f"{name}1.lora_{side}.weight"] = tensor
    sides = {f"w{n}_{side}": writer.random(2, wide) for n in (1, 2) for side, wide in (("a", 6), ("b", 5))}
    sides |= {side: writer.random(2, 2, 3, 3) for side in ("t1", "t2")}
    state |= {f"{name}2.hada_{side}": tensor for side, tensor in sides.items()}
    convolution = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], core, down[:, :, 0, 0])
    one, other = (torch.einsum("ijkl,ip,jr->prkl", sides[f"t{n}"], sides[f"w{n}_a"], sides[f"w{n}_b"])
                  for n in (1, 2))
    outside = float(convolution.square().sum() + (one * other).square().sum())
    inside = sum(float(change.square().sum()) for change in changes.values())
    taken = lora_deltas(LoraFile(state), tiny_backbone.layout, "it")
    assert taken.left["convolutions"].layers == 2
    assert taken.share == pytest.approx(inside / (inside + outside), rel=1e-4)


def test_frozen_weights_of_a_base(tiny_backbone, weight):
    for projection in ("to_k", "to_out"):      # to_out has a bias
        site = tiny_backbone.layout.sites[1]
        assert torch.allclose(frozen_weight(tiny_backbone, site, projection, tiny_backbone.device),
                              weight(1, projection), atol=1e-6)


def test_norms_of_a_full_change_count(tiny_backbone, weight):
    state, changes = written("diff", tiny_backbone.layout, weight)
    state["lora_unet_down_blocks_0_resnets_0_norm1.diff"] = torch.ones(32)
    taken = lora_deltas(LoraFile(state), tiny_backbone.layout, "it")
    inside = sum(float(change.square().sum()) for change in changes.values())
    assert taken.left["normalisation"].share == pytest.approx(32 / (32 + inside), rel=1e-4)


ODD = (lambda t, r: t[:1] if t.ndim else t.view(1), lambda t, r: t.flatten(), lambda t, r: t.int(),
       lambda t, r: t * torch.nan, lambda t, r: t.new_zeros(0), lambda t, r: t * 1e38,
       lambda t, r: t.T.contiguous() if t.ndim == 2 else t, lambda t, r: t[None, None],
       lambda t, r: torch.tensor(r.uniform(-1e9, 1e9)), lambda t, r: None)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_tensors_give_a_concept_or_one_sentence(form, tiny_backbone, weight):
    """Never another exception, and never NaN in a delta."""
    state, _ = written(form, tiny_backbone.layout, weight)
    state = {key: tensor for key, tensor in state.items() if key.startswith("lora_unet_mid_block_")}
    random = Random(form)
    for change in ODD * 3:
        key = random.choice(sorted(state))
        damaged = {**state, key: change(state[key], random)}
        damaged = {name: tensor for name, tensor in damaged.items() if tensor is not None}
        try:
            taken = lora_deltas(LoraFile(damaged), tiny_backbone.layout, "it", "", tiny_backbone)
        except ConceptError as error:
            assert str(error).startswith("it") and "\n" not in str(error)
        else:
            assert all(torch.isfinite(delta.dense()).all() for delta in taken.deltas.values())


def test_dora_needs_the_base(tiny_backbone, weight):
    state, _ = written("dora_of_columns", tiny_backbone.layout, weight)
    with pytest.raises(ConceptError, match="form DoRA, which needs the weights of the base"):
        lora_deltas(LoraFile(state), tiny_backbone.layout, "it")


DAMAGED = {
    "loha: ranks": ("loha", {"hada_w1_a": torch.ones(32, 3)}, "has ranks 3 and 2"),
    "loha: shapes": ("loha", {"hada_w2_a": torch.ones(16, 2)}, "multiplies a .* matrix"),
    "loha: nan": ("loha", {"hada_w2_b": torch.full((2, 32), torch.nan)}, "holds NaN"),
    "loha: part": ("loha", {"hada_w2_b": None}, "is incomplete: its LoHa has .* but no w2_b"),
    "lokr: part": ("lokr", {"lokr_w2": None}, "is incomplete: its LoKr has no w2"),
    "lokr: shape": ("lokr", {"lokr_w1": torch.ones(2, 4)}, "made for another family"),
    "lokr: large": ("lokr", {"lokr_w1": torch.ones(2000, 2000)}, "more than any layer"),
    "lokr: integers": ("lokr", {"lokr_w1": torch.ones(4, 4).int()}, "int32 .w1.; allowed: two matrices"),
    "diff: bits": ("diff", {"diff": torch.ones(32, 32, dtype=torch.bool)}, "allowed: two matrices"),
    "diff: vector": ("diff", {"diff": torch.ones(32)}, "made for another family"),
    "diff: cube": ("diff", {"diff": torch.ones((1,) * 6)}, "allowed: two matrices"),
    "dora: shape": ("dora_of_columns", {"dora_scale": torch.ones(7)}, "DoRA magnitudes of shape .7,."),
    "dora: nan": ("dora_of_columns", {"dora_scale": torch.full((1, 32), torch.nan)}, "give NaN"),
    "dora: alone": ("dora_of_columns", {"lora_up.weight": None, "lora_down.weight": None}, "and no factors"),
    "two forms": ("lora", {"diff": torch.ones(32, 32)}, "by LoRA and .diff|by .diff and LoRA"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_get_one_sentence(case, tiny_backbone, weight):
    form, change, sentence = DAMAGED[case]
    state, _ = written(form, tiny_backbone.layout, weight)
    name = module_names(tiny_backbone.layout)[0, "to_q"]
    state |= {f"{name}.{side}": tensor for side, tensor in change.items()}
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    with pytest.raises(ConceptError, match=sentence):
        lora_deltas(LoraFile(state), tiny_backbone.layout, "it", "", tiny_backbone)


@pytest.mark.parametrize(("side", "named"), [
    ("oft_blocks", "OFT"), ("boft_R", "BOFT"), ("a1.weight", "GLoRA"), ("lambda_layer", "T-LoRA"),
    ("lora_E", "AdaLoRA"), ("vera_lambda_b", "VeRA"), ("set_weight", "set_weight"), ("w_norm", "norm")])
def test_other_forms_are_refused_by_name(side, named, tiny_backbone, weight, tmp_path):
    state, _ = written("lora", tiny_backbone.layout, weight)
    name = module_names(tiny_backbone.layout)[0, "to_q"]
    state = {key: tensor for key, tensor in state.items() if not key.startswith(name)}
    save_file(state | {f"{name}.{side}": torch.ones(2, 2)}, tmp_path / "some.safetensors")
    with pytest.raises(ConceptError, match=rf"changes text cross-attention by {named} \("):
        lora_deltas(read_lora(tmp_path / "some.safetensors"), tiny_backbone.layout, "it")
