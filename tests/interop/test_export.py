"""Files for other programs: contents, notes on losses, and no existing file is overwritten."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import save_bank
from continual_concepts.core.cli.parser import main
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import aggregate
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.files import write_atomically
from continual_concepts.core.interop.diffusers_lora import diffusers_state
from continual_concepts.core.interop.embedding import embedding_state, layer_loss
from continual_concepts.core.interop.export import FORMATS, export_concept
from continual_concepts.core.interop.factors import low_rank
from continual_concepts.core.interop.kohya import bundled_words, kohya_state, module_name
from continual_concepts.core.interop.metadata import modelspec
from continual_concepts.core.model.deltas import LowRankDelta, SparseDelta
from continual_concepts.tests.comparing import distance

HALF = 1.5e-3       # two factors rounded to fp16


def kohya_dense(state, name: str) -> torch.Tensor:
    up, down = state[f"{name}.lora_up.weight"].float(), state[f"{name}.lora_down.weight"].float()
    return state[f"{name}.alpha"].item() / down.shape[0] * up @ down


def metadata(path) -> dict[str, str]:
    return safe_open(str(path), framework="pt").metadata()


def sparse(a: int, b: int, count: int, seed: int = 0) -> SparseDelta:
    g = torch.Generator().manual_seed(seed)
    return SparseDelta((a, b), torch.randperm(a * b, generator=g)[:count].int(),
                       torch.randn(count, generator=g))


@pytest.fixture
def thumbnail() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def bank(layout, make_concept, thumbnail) -> ConceptBank:
    single = make_concept(layout, "mimi", seed=1, layerwise=False)
    return ConceptBank(layout).add(make_concept(layout, thumbnail=thumbnail)).add(single)


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_both_lora_layouts_hold_the_concepts_deltas(layout, bank, strength):
    deltas = bank["rex"].deltas
    kohya, diffusers = kohya_state(layout, deltas, strength), diffusers_state(layout, deltas, strength)
    assert len(kohya) == 3 * len(deltas) and len(diffusers) == 2 * len(deltas)
    for (index, projection), delta in deltas.items():
        inner = f"attn2_{projection}" + ("_0" if projection == "to_out" else "")
        name = f"lora_unet_down_blocks_{index}_{inner}"
        assert module_name(layout, (index, projection)) == name
        assert distance(kohya_dense(kohya, name), strength * delta.dense()) < HALF
        theirs = f"unet.down_blocks.{index}.attn2.{projection}" + (".0" if projection == "to_out" else "")
        product = diffusers[f"{theirs}.lora_B.weight"].float() @ diffusers[f"{theirs}.lora_A.weight"].float()
        assert distance(product, strength * delta.dense()) < HALF


def test_numbers_outside_fp16_stay_in_fp32(layout, make_concept):
    for size in (1e-6, 1e4):
        deltas = make_concept(layout, size=size).deltas
        state = kohya_state(layout,
                            {key: replace(delta, up=delta.up * size) for key, delta in deltas.items()})
        name = module_name(layout, (0, "to_k"))
        assert state[f"{name}.lora_up.weight"].dtype == torch.float32
        assert distance(kohya_dense(state, name), size * deltas[0, "to_k"].dense()) < HALF


def test_an_aggregate_is_exported_like_a_concept(tiny_backbone, make_concept):
    layout = tiny_backbone.layout
    bank = ConceptBank(layout).add(make_concept(layout, "rex")).add(make_concept(layout, "mimi", seed=1))
    deltas = aggregate(tiny_backbone, bank, bank.parse("<rex> and <mimi>"), "equal").deltas
    state = kohya_state(layout, low_rank(deltas, "the aggregate").deltas)
    for key, delta in deltas.items():
        assert distance(kohya_dense(state, module_name(layout, key)), delta.dense()) < HALF


def test_sparse_deltas_become_low_rank_with_a_measured_error_or_are_refused():
    factored = LowRankDelta(torch.ones(4, 1), torch.ones(1, 4))
    deltas = {(0, "to_k"): sparse(12, 10, 30), (1, "to_k"): sparse(12, 10, 20, 1), (2, "to_q"): factored}
    exact = low_rank(deltas, "the concept", rank=10)
    assert exact.error < 1e-6 and exact.deltas[2, "to_q"] is factored
    with pytest.raises(ConceptError, match=r"rank 2 loses 0\.\d+ .* which rank \d keeps") as refusal:
        low_rank(deltas, "the concept", rank=2)
    needed = int(str(refusal.value).split("rank ")[-1].split()[0])
    held = low_rank(deltas, "the concept", rank=needed)
    pairs = [(held.deltas[key].dense(), deltas[key].dense()) for key in ((0, "to_k"), (1, "to_k"))]
    missing = sum(float((a - b).square().sum())
                  for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    assert held.error == pytest.approx(missing**0.5, rel=1e-3) and held.error <= 0.05
    with pytest.raises(ConceptError):
        low_rank(deltas, "the concept", rank=needed - 1)


def test_what_cannot_be_a_lora_is_refused(layout, make_concept):
    with pytest.raises(ConceptError, match="changes no weights"):
        low_rank({}, "concept 'rex'")
    with pytest.raises(ConceptError, match="changes no weights"):
        low_rank({(0, "to_k"): sparse(4, 4, 0)}, "concept 'rex'")
    with pytest.raises(ConceptError, match="rank is 0"):
        low_rank({(0, "to_k"): sparse(4, 4, 4)}, "concept 'rex'", rank=0)
    broken = {(0, "to_k"): LowRankDelta(torch.full((4, 1), torch.nan), torch.ones(1, 5))}
    with pytest.raises(ConceptError, match="NaN"):
        kohya_state(layout, broken)


def test_embeddings_hold_the_mean_copy_and_tell_the_loss(layout, bank):
    rex, mimi = bank["rex"].tokens, bank["mimi"].tokens
    state = embedding_state(rex)
    assert list(state) == ["clip_l", "clip_g"] and state["clip_l"].shape == (2, 3)
    assert torch.allclose(state["clip_g"], rex.mean_copy().vectors["clip_g"][0])
    one = replace(rex, vectors={"clip_l": rex.vectors["clip_l"]})
    assert list(embedding_state(one)) == ["emb_params"]
    assert list(bundled_words("rex", one)) == ["bundle_emb.rex.string_to_param.*"]
    assert list(bundled_words("rex", rex)) == ["bundle_emb.rex.clip_l", "bundle_emb.rex.clip_g"]
    spread = torch.cat([(v - v.mean(0)).flatten() for v in rex.vectors.values()]).norm()
    whole = torch.cat([v.flatten() for v in rex.vectors.values()]).norm()
    assert layer_loss(rex) == pytest.approx(float(spread / whole), rel=1e-5)
    assert layer_loss(mimi) == 0


def test_export_writes_every_format_with_metadata(bank, thumbnail, tmp_path):
    exported = export_concept(bank, "rex", tmp_path, FORMATS)
    assert [file.stem for file in exported.files] == ["rex_lora", "rex_bundle", "rex_diffusers_lora", "rex"]
    assert sorted(tmp_path.iterdir()) == sorted(exported.files)
    data = [metadata(file) for file in exported.files]
    for facts in data:
        assert facts["modelspec.title"] == facts["modelspec.trigger_phrase"] == "rex"
        assert facts["modelspec.date"] == "2025-01-01T00:00:00+00:00"
        encoded = facts["modelspec.thumbnail"].removeprefix("data:image/jpeg;base64,")
        assert base64.b64decode(encoded) == thumbnail
        assert base64.b64decode(json.loads(facts["ssmd_cover_images"])[0]) == thumbnail
    assert data[0]["modelspec.architecture"].endswith("/lora")
    assert data[3]["modelspec.architecture"].endswith("/textual-inversion")
    assert (data[0]["ss_network_dim"], data[0]["ss_network_alpha"], data[0]["ss_steps"]) == ("2", "1.0", "3")
    assert json.loads(data[0]["ss_tag_frequency"]) == {"rex": {"rex": 2}}
    lora, bundle = (load_file(file).keys() for file in exported.files[:2])
    assert bundle - lora == {"bundle_emb.rex.clip_l", "bundle_emb.rex.clip_g"}
    assert any("3 layer copies" in note and f"{layer_loss(bank['rex'].tokens):.3f}" in note
               for note in exported.notes)
    assert not any("layer copies" in note for note in export_concept(bank, "mimi", tmp_path).notes)


def test_families_have_their_known_names(layout, bank):
    for sites, context, expected in ((16, 768, "stable-diffusion-v1"),
                                     (70, 2048, "stable-diffusion-xl-v1-base")):
        wide = replace(layout,
                       sites=tuple(replace(layout.sites[0], index=i, context_width=context)
                                   for i in range(sites)))
        assert modelspec(bank["rex"], wide, "lora", "")["modelspec.architecture"] == f"{expected}/lora"


@pytest.mark.parametrize("settings",
                         [{"training": 3, "method": ["lr"]}, {"training": {"resolution": {}, "seed": None}},
                          {}])
def test_strange_provenance_gives_fewer_metadata_not_an_error(layout, bank, tmp_path, settings):
    rex = bank["rex"]
    origin = replace(rex.info.provenance, settings=settings, date="yesterday", images=())
    odd = ConceptBank(layout).add(replace(rex, info=replace(rex.info, provenance=origin),
                                          thumbnail=b"<script>"))
    exported = export_concept(odd, "rex", tmp_path)
    facts = metadata(exported.files[0])
    assert all(isinstance(value, str) for value in facts.values()) and "modelspec.date" not in facts
    assert "modelspec.thumbnail" not in facts and any("thumbnail" in note for note in exported.notes)


def test_nothing_is_overwritten_and_files_of_one_call_share_a_counter(bank, tmp_path):
    (tmp_path / "rex.safetensors").write_bytes(b"somebody's")
    (tmp_path / "rex_lora_00002.safetensors").symlink_to(tmp_path / "elsewhere")
    exported = export_concept(bank, "rex", tmp_path / "." / "deeper" / "..")
    assert [file.name for file in exported.files] == ["rex_lora_00003.safetensors", "rex_00003.safetensors"]
    assert (tmp_path / "rex.safetensors").read_bytes() == b"somebody's"
    assert not (tmp_path / "elsewhere").exists()
    assert any("embedding:rex_00003" in note for note in exported.notes)


def test_the_same_concept_gives_the_same_contents(bank, tmp_path):
    one, two = (export_concept(bank, "rex", tmp_path / folder).files for folder in ("a", "b"))
    for a, b in zip(one, two, strict=True):
        x, y = load_file(a), load_file(b)
        assert metadata(a) == metadata(b)
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def test_bad_requests_leave_no_file(bank, layout, make_concept, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    for arguments, sentence in ((("../rex", folder), "no concept"),
                                (("rex", folder, ("onnx",)), "allowed: kohya"),
                                (("rex", folder, ()), "not given"),
                                (("rex", folder, ("kohya",), 0), "strength is 0"),
                                (("rex", folder, ("kohya",), float("nan")), "strength is nan")):
        with pytest.raises(ConceptError, match=sentence):
            export_concept(bank, *arguments)
    assert not folder.exists()
    sparse_one = replace(make_concept(layout), deltas={(2, "to_q"): sparse(8, 8, 60)})
    with pytest.raises(ConceptError, match="concept 'rex' has sparse deltas"):
        export_concept(ConceptBank(layout).add(sparse_one), "rex", folder, rank=1)
    assert not folder.exists()

    def full(path, write):
        raise ConceptError("the disk is full")

    monkeypatch.setattr("continual_concepts.core.interop.writing.write_atomically", full)
    with pytest.raises(ConceptError, match="full"):
        export_concept(bank, "rex", folder)
    (tmp_path / "file").write_bytes(b"")
    assert not list(folder.iterdir())
    with pytest.raises(ConceptError, match="cannot write concept 'rex'"):
        export_concept(bank, "rex", tmp_path / "file")


def test_names_that_windows_keeps_and_long_ones(layout, make_concept, tmp_path):
    long = "\U0001d504" * 62       # 248 bytes, 260 with the ending
    bank = ConceptBank(layout).add(make_concept(layout, "NUL")).add(make_concept(layout, long))
    assert export_concept(bank, "NUL", tmp_path, ["embedding"]).files[0].name == "NUL_concept.safetensors"
    with pytest.raises(ConceptError, match="cannot write"):
        export_concept(bank, long, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_methods_that_add_up_say_so(bank, layout, make_concept, tmp_path):
    alone = ConceptBank(layout).add(make_concept(layout, method="finetune"))
    both = alone.add(make_concept(layout, "mimi", method="finetune"))
    assert any("adds up" in note for note in export_concept(both, "rex", tmp_path).notes)
    assert not any("adds up" in note for note in export_concept(alone, "rex", tmp_path).notes)
    assert not any("adds up" in note for note in export_concept(bank, "rex", tmp_path).notes)
    averaged = both.replace(make_concept(layout, "rex", method="lora_c")).replace(
        make_concept(layout, "mimi", method="lora_c"))
    assert any("averages the predictions for its 2 concepts" in note
               for note in export_concept(averaged, "rex", tmp_path).notes)


def test_it_says_whether_other_programs_draw_the_same(bank, layout, make_concept, tmp_path):
    def told(concept, formats=("kohya", "embedding"), strength=1.0) -> list[str]:
        notes = export_concept(ConceptBank(layout).add(concept), "rex", tmp_path, formats, strength).notes
        same = "other programs draw <rex> from these files as the bank does, up to rounding" in notes
        differs = [note for note in notes if note.startswith("differs in other programs: ")]
        assert same != bool(differs)
        return differs

    exact = make_concept(layout, layerwise=False)
    assert not told(exact) and not told(exact, ("bundle",))
    assert "the learned words are not in these files" in told(exact, ("kohya",))[0]
    assert "in the weights is not in this file" in told(exact, ("embedding",))[0]
    assert "0.5 times the strength" in told(exact, strength=0.5)[0]
    assert "layer copies" in told(make_concept(layout))[0]
    bound = make_concept(layout, layerwise=False, method="bound")
    apart = replace(bound, tokens=replace(bound.tokens, placeholder_noun="dog"))
    assert len(told(bound)) == 1 and "with 'dog' in place of the learned words" in told(apart)[1]


def test_the_command(bank, tmp_path, capsys):
    file, out = tmp_path / "bank.safetensors", tmp_path / "out"
    save_bank(bank, file)
    command = ["bank", "export", str(file), "rex", "--output", str(out)]
    assert main(command) == 0
    assert sorted(path.name for path in out.iterdir()) == ["rex.safetensors", "rex_lora.safetensors"]
    assert main(["--json", *command, "--format", "diffusers", "--format", "embedding", "--strength",
                 "0.5"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed[printed.index("{"):])
    assert "wrote " in printed and report["files"][0].endswith("rex_diffusers_lora_00002.safetensors")
    assert main(["bank", "export", str(file), "tom", "--output",
                 str(out)]) == 1 and "no concept 'tom'" in capsys.readouterr().err


@pytest.fixture(params=["tiny_backbone", "tiny_sdxl"])
def host(request):
    return request.getfixturevalue(request.param)


def plain_unet(host):
    """The backbone's UNet as diffusers runs it, without our attention processors."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(host.unet.config)
    unet.load_state_dict(host.unet.state_dict())
    return unet.eval()


def mixed_ranks(host, make_concept):
    """Rank 2 everywhere and rank 3 at one site, in fp16 as files hold them."""
    two, three = (make_concept(host.layout, seed=rank, rank=rank, size=0.3, dtype=torch.float16).deltas
                  for rank in (2, 3))
    return two | {key: delta for key, delta in three.items() if key[0] == 1}


def test_every_module_named_is_there_and_has_that_shape(host, make_concept):
    weights = host.unet.state_dict()
    state = diffusers_state(host.layout, mixed_ranks(host, make_concept))
    for key in (key for key in state if key.endswith("lora_A.weight")):
        weight = weights[key.removeprefix("unet.").replace("lora_A.weight", "weight")]
        down, up = state[key], state[key.replace("lora_A", "lora_B")]
        assert (up.shape[0], down.shape[1]) == tuple(weight.shape) and up.shape[1] == down.shape[0] == 3


@torch.no_grad()
def test_diffusers_loads_it_and_predicts_the_same(host, make_concept, tmp_path):
    pytest.importorskip("peft", reason="diffusers loads LoRA files through peft")
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    concept = replace(make_concept(host.layout, layerwise=False), deltas=mixed_ranks(host, make_concept))
    bank = ConceptBank(host.layout).add(concept)
    file = export_concept(bank, "rex", tmp_path, ["diffusers"]).files[0]
    kind = StableDiffusionPipeline if len(host.text) == 1 else StableDiffusionXLPipeline
    state, *rest = kind.lora_state_dict(str(file))
    unet = plain_unet(host)
    kind.load_lora_into_unet(state, network_alphas=next((r for r in rest if r), None), unet=unet)
    latents, times = torch.randn(2, 4, 8, 8,
                                 generator=torch.Generator().manual_seed(0)), torch.tensor([50, 700])
    context = encode_prompts(host, bank.vocabulary.parse_all(["a photo of <rex>"] * 2),
                             {"rex": concept.tokens})
    with host.folded(concept.deltas):
        ours = host.predict(latents, times, context)
    extra = None
    if context.pooled is not None:
        extra = {"text_embeds": context.pooled, "time_ids": host._time_ids(latents)}
    theirs = unet(latents, times, context.hidden[:, 0], added_cond_kwargs=extra, return_dict=False)[0]
    assert distance(theirs, ours) < 1e-4 < distance(host.predict(latents, times, context), ours)


def test_files_go_through_the_atomic_writer(bank, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("continual_concepts.core.interop.writing.write_atomically",
                        lambda path, write: seen.append(path) or write_atomically(path, write))
    assert list(export_concept(bank, "rex", tmp_path).files) == seen
