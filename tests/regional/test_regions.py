"""Regions: masks, region attention, region noise estimation, and whole pictures with concepts in boxes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continual_concepts.core import sampling
from continual_concepts.core.bank import ConceptBank
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.hosts.backbone import SiteProgram
from continual_concepts.core.hosts.diffusers import multi_head
from continual_concepts.core.regional.attention import Reading, Stack, region_attention
from continual_concepts.core.regional.cover import cover_of
from continual_concepts.core.regional.noise import NoiseSettings, region_noise, scene_is_seen, window_of
from continual_concepts.core.regional.program import DeltaProgram, Part, RegionProgram
from continual_concepts.core.regional.regions import OVERLAPS, Region, box_mask, masks_of, pooled_of, region_mask, shares
from continual_concepts.core.sampling import SampleSettings, _encode, sample, sample_regions, starting_noise
from continual_concepts.core.sites import grid_of

FULL = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
QUICK = SampleSettings(steps=3, cfg=3.0, size=(32, 32))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("box", [(0.0, 0.0, 0.05, 0.05), (0.95, 0.4, 1.0, 0.45), (0.49, 0.49, 0.51, 0.51), FULL])
def test_small_boxes_survive_on_every_grid(box, size):
    mask = box_mask(box, size, size)
    assert mask.any() and set(mask.flatten().tolist()) <= {0.0, 1.0}
    top, left, bottom, right = box
    rows, columns = mask.nonzero().T
    assert rows.min() >= int(top * size) and rows.max() < max(bottom * size, 1 + int((top + bottom) / 2 * size))
    assert columns.min() >= int(left * size) and columns.max() < max(right * size, 1 + int((left + right) / 2 * size))


def test_boxes_take_whole_cells_despite_rounding():
    assert box_mask((0.3, 0.1, 0.6, 0.7), 10, 10).sum() == 3 * 6
    assert torch.equal(box_mask(LEFT, 4, 8) + box_mask(RIGHT, 4, 8), torch.ones(4, 8))


def test_masks_are_reduced_by_area():
    mask = torch.zeros(8, 8)
    mask[:, :3] = 1
    assert torch.equal(region_mask(Region("x", mask=mask), 2, 4)[0], torch.tensor([1.0, 0.5, 0.0, 0.0]))
    assert torch.equal(masks_of([Region("x", LEFT, strength=0.5)], 2, 2), torch.tensor([[[0.5, 0.0]] * 2]))


GRIDS = [((8, 8), (8, 8)), ((8, 8), (2, 2)), ((9, 13), (5, 7)), ((9, 13), (3, 4)), ((96, 64), (12, 8))]


@pytest.mark.parametrize(("latent", "grid"), GRIDS)
def test_grids_follow_from_the_number_of_cells(latent, grid):
    assert grid_of(grid[0] * grid[1], *latent) == grid


@pytest.mark.parametrize("cells", [0, 5, 1000])
def test_impossible_grids_are_refused(cells):
    with pytest.raises(ConceptError):
        grid_of(cells, 8, 8)


def test_shares_sum_to_one():
    masks = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    regions, scene = shares(masks)
    assert torch.allclose(regions.sum(0) + scene, torch.ones(5, 5))
    regions, scene = shares(torch.ones(3, 2, 2))
    assert torch.allclose(regions, torch.full((3, 2, 2), 1 / 3)) and not scene.any()


@pytest.mark.parametrize("fields", [
    {}, {"box": FULL, "mask": torch.ones(2, 2)}, {"box": (0.5, 0, 0.5, 1)}, {"box": (0, 0, 1, 1.1)}, {"box": FULL, "strength": 2},
    {"box": FULL, "start": 0.5, "end": 0.4}, {"box": (float("nan"), 0, 1, 1)},
])
def test_bad_regions_are_refused(fields):
    with pytest.raises(ConceptError, match="region 'a dog'"):
        Region("a dog", **fields)


def attend(query, key, value):
    return multi_head(query, key, value, 2)


@pytest.fixture
def qkv():
    query, base = random(2, 16, 8), random(2, 16, 8, seed=1)
    return query, base, [random(2, 5, 8, seed=2), random(2, 5, 8, seed=3)], [random(2, 5, 8, seed=4), random(2, 5, 8, seed=5)]


def plain_regions(query, base, keys, values, masks):
    """Region attention with the scene's weights everywhere."""
    cover = cover_of(*shares(masks))
    stacks = [Stack([Reading(keys[u], values[u]) for u in group.members]) for group in cover.groups]
    out, more = region_attention(query, query, base, stacks, cover, torch.arange(len(query)), 2, attend)
    assert more is None
    return out


def test_no_region_leaves_the_scene(qkv):
    query, base, _, _ = qkv
    assert torch.equal(plain_regions(query, base, *([x[0]] for x in qkv[2:]), torch.zeros(1, 16)), base)


def test_one_full_region_is_plain_attention_with_its_prompt(qkv):
    query, base, keys, values = qkv
    out = plain_regions(query, base, keys[:1], values[:1], torch.ones(1, 16))
    assert torch.allclose(out, attend(query, keys[0], values[0]), atol=1e-6)


def test_overlaps_are_averaged_and_the_rest_is_the_scenes(qkv):
    query, base, keys, values = qkv
    masks = torch.stack([box_mask((0, 0, 0.75, 0.75), 4, 4).flatten(), box_mask((0.25, 0.25, 1, 1), 4, 4).flatten()])
    before = base.clone()
    out = plain_regions(query, base, keys, values, masks)
    first, second = (attend(query, k, v) for k, v in zip(keys, values, strict=True))
    only, other = masks[0].bool(), masks[1].bool()
    for where, expected in [(only & other, (first + second) / 2), (only & ~other, first), (other & ~only, second), (~only & ~other, base)]:
        assert where.any() and torch.allclose(out[:, where], expected[:, where], atol=1e-6)
    assert torch.equal(base, before)


def test_a_weak_region_blends_with_the_scene(qkv):
    query, base, keys, values = qkv
    out = plain_regions(query, base, keys[:1], values[:1], torch.full((1, 16), 0.25))
    assert torch.allclose(out, 0.75 * base + 0.25 * attend(query, keys[0], values[0]), atol=1e-6)


@pytest.fixture
def noises():
    return random(2, 4, 6, 6), random(2, 2, 4, 6, 6, seed=1), torch.stack([box_mask(LEFT, 6, 6), box_mask((0, 0.25, 1, 1), 6, 6)])


def test_region_noise_by_its_formulas(noises):
    scene, regions, masks = noises
    count = masks.sum(0)
    mean = (regions * masks[:, None, None]).sum(0) / count.clamp(min=1)
    kept = torch.where(count > 0, 0.1 * scene + 0.9 * mean, scene)
    assert torch.allclose(region_noise(scene, regions, masks), kept, atol=1e-6)
    literal = 0.1 * scene + sum(0.9 * regions[u] * masks[u] for u in range(2))
    assert torch.allclose(region_noise(scene, regions, masks, outside="literal"), literal, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_region_noise_at_its_ends(noises, alpha):
    scene, regions, _ = noises
    assert torch.equal(region_noise(scene, regions[:0], torch.zeros(0, 6, 6), alpha), scene)
    assert torch.equal(region_noise(scene, regions, torch.zeros(2, 6, 6), alpha), scene)
    one = region_noise(scene, regions[:1], torch.ones(1, 6, 6), alpha)
    assert torch.allclose(one, alpha * scene + (1 - alpha) * regions[0], atol=1e-6)
    with pytest.raises(ConceptError, match="keep, literal"):
        region_noise(scene, regions, torch.zeros(2, 6, 6), alpha, "away")


@pytest.fixture(scope="module")
def bank(tiny_backbone, make_concept):
    bank = ConceptBank(tiny_backbone.layout)
    for i, name in enumerate(("rex", "mimi")):
        bank = bank.add(make_concept(tiny_backbone.layout, name, i, size=0.2))
    return bank.add(make_concept(tiny_backbone.layout, "tuned", 5, method="finetune", size=0.1))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("negative", ["", "blurry <mimi>"])
def test_one_full_region_is_its_own_picture(any_backbone, bank, cfg, negative):
    """Deltas as activations and keys from memory, against the same deltas folded into the weights."""
    settings = replace(QUICK, cfg=cfg)
    region = Region("a photo of <rex>", FULL, negative=negative)
    ours = sample_regions(any_backbone, bank, "an empty <mimi> room", [region], [1, 2], settings)
    alone = sample(any_backbone, bank, ["a photo of <rex>"] * 2, [1, 2], replace(settings, negative=negative))
    assert torch.allclose(ours, alone, atol=1e-4)
    scene = sample(any_backbone, bank, ["an empty <mimi> room"] * 2, [1, 2], settings)
    assert not torch.allclose(ours, scene, atol=1e-2)


@pytest.mark.parametrize("regions", [[], [Region("<rex>", FULL, strength=0.0)]])
def test_no_region_is_the_scene(tiny_backbone, bank, regions):
    scene = sample(tiny_backbone, bank, ["a <mimi>"], [3], QUICK)
    assert torch.allclose(sample_regions(tiny_backbone, bank, "a <mimi>", regions, [3], QUICK), scene, atol=1e-4)


@pytest.fixture
def calls(tiny_backbone, monkeypatch):
    """Batch sizes of the UNet's evaluations."""
    seen, original = [], tiny_backbone.predict
    monkeypatch.setattr(tiny_backbone, "predict", lambda latents, *rest: seen.append(len(latents)) or original(latents, *rest))
    return seen


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_one_evaluation_per_step_for_any_number_of_regions(tiny_backbone, bank, calls, count, cfg):
    sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", LEFT)] * count, [1, 2], replace(QUICK, cfg=cfg))
    assert calls == [2 if cfg == 1.0 else 4] * 3


def test_region_noise_evaluates_every_region(tiny_backbone, bank, calls):
    regions = [Region("<rex>", LEFT), Region("<mimi>", RIGHT)]
    noisy = sample_regions(tiny_backbone, bank, "a dog", regions, [1], replace(QUICK, noise=NoiseSettings(True)))
    assert len(calls) == 3 * 3
    assert not torch.allclose(noisy, sample_regions(tiny_backbone, bank, "a dog", regions, [1], QUICK), atol=1e-3)
    plain = sample_regions(tiny_backbone, bank, "a dog", regions, [1], replace(QUICK, noise=NoiseSettings(True, alpha=1.0)))
    assert torch.allclose(plain, sample_regions(tiny_backbone, bank, "a dog", regions, [1], QUICK), atol=1e-4)


def test_region_noise_by_area_looks_at_a_window_alone(tiny_backbone, bank, monkeypatch):
    sizes, original = [], tiny_backbone.predict
    monkeypatch.setattr(tiny_backbone, "predict", lambda x, *rest: sizes.append(tuple(x.shape[-2:])) or original(x, *rest))
    settings = replace(QUICK, size=(96, 64), noise=NoiseSettings(True, area="crop"), steps=2)
    corner = Region("<rex>", (0.0, 0.0, 0.2, 0.3))
    found = sample_regions(tiny_backbone, bank, "a dog", [corner], [1], settings)
    assert sizes == [(24, 16), (8, 8)] * 2 and torch.isfinite(found).all()      # latents are a quarter of the picture's sides
    whole = [sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", FULL)], [1],
                            replace(settings, noise=NoiseSettings(True, area=area))) for area in ("frame", "crop")]
    assert torch.equal(*whole)


def test_solo_steps_look_at_windows_alone_where_regions_cover_the_picture(tiny_backbone, bank, monkeypatch):
    """As many cells are evaluated as in a plain picture; with a rest for the scene, the whole frame too."""
    sizes, original = [], tiny_backbone.predict
    monkeypatch.setattr(tiny_backbone, "predict", lambda x, *rest: sizes.append(tuple(x.shape[-2:])) or original(x, *rest))
    settings = replace(QUICK, size=(64, 64), noise=NoiseSettings(solo=0.4), steps=4)      # progress 0, 1/3, 2/3, 1
    sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", LEFT), Region("<mimi>", RIGHT)], [1], settings)
    assert sizes == [(16, 8)] * 4 + [(16, 16)] * 2
    sizes.clear()
    sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", LEFT)], [1], settings)
    assert sizes == [(16, 16), (16, 8)] * 2 + [(16, 16)] * 2


def test_a_solo_region_is_a_picture_of_its_own(tiny_backbone, bank, monkeypatch):
    """Solo to the end, two halves are what each prompt gives on the half's own noise. Latents: the decoder sees over the border."""
    monkeypatch.setattr(tiny_backbone, "decode_latents", lambda latents: latents)
    settings = replace(QUICK, size=(64, 64), noise=NoiseSettings(solo=1.0), steps=1)
    found = sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", LEFT), Region("<mimi>", RIGHT)], [1], settings)
    noise = starting_noise(tiny_backbone, [1], (64, 64))
    for name, half in (("rex", slice(0, 8)), ("mimi", slice(8, 16))):
        monkeypatch.setattr(sampling, "starting_noise", lambda *_, half=half: noise[..., half])
        alone = sample(tiny_backbone, bank, [f"<{name}>"], [1], settings)
        assert torch.allclose(found[..., half], alone, atol=1e-4)


def test_the_scene_is_seen_where_no_region_is():
    halves = torch.stack([box_mask(LEFT, 4, 4), box_mask(RIGHT, 4, 4)])
    assert not scene_is_seen(halves) and scene_is_seen(halves[:1]) and scene_is_seen(0.5 * halves)
    assert scene_is_seen(0.5 * halves, "priority")


@given(data=st.data())
def test_a_window_holds_its_mask(data):
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = torch.zeros(height, width)
    mask[top:data.draw(st.integers(top + 1, height)), left:data.draw(st.integers(left + 1, width))] = 1
    window, x = window_of(mask), torch.rand(2, 3, height, width)
    assert window.cut(mask).sum() == mask.sum() and torch.equal(window.back(window.cut(x), x) * mask, x * mask)
    for first, last, side in ((window.top, window.bottom, height), (window.left, window.right, width)):
        assert 0 <= first < last <= side and ((last - first) % 8 == 0 or last - first == side)


def test_pooled_text_is_the_mean_by_area():
    scene, own = torch.zeros(2, 4), [torch.ones(2, 4), 2 * torch.ones(2, 4)]
    assert torch.equal(pooled_of([Region("a", FULL)], scene, own[:1], (8, 8), "average"), own[0])
    half = pooled_of([Region("a", LEFT, strength=0.5), Region("b", RIGHT, start=0.5)], scene, own, (8, 8), "average")
    assert torch.allclose(half, torch.full((2, 4), 0.25 * 1 + 0.25 * 2))
    assert torch.equal(pooled_of([Region("a", LEFT, strength=0.0)], own[0], own[1:], (8, 8), "average"), own[0])


def program_of(backbone, bank, regions, scene=None):
    context = _encode(backbone, bank, ["", "a dog"])
    parts = [Part(context, bank[name].deltas) for name in ("rex", "mimi")[:len(regions)]]
    return RegionProgram(backbone, Part(context, scene or {}), regions, parts, torch.tensor([0, 1]), (8, 8)), parts


LAYOUTS = {
    "halves": [Region("a", LEFT), Region("b", RIGHT)],
    "overlap": [Region("a", (0, 0, 0.75, 0.75)), Region("b", (0.25, 0.25, 1, 1), strength=0.5)],
    "one size after another": [Region("a", FULL), Region("b", (0.0, 0.0, 0.26, 0.26)), Region("a", (0.5, 0.5, 0.76, 1.0), feather=0.2)],
}


def by_definition(backbone, site, bank, scene, regions, contexts, x, overlap):
    """to_out's output where every part of the picture is attended by its own model, one after another, and the results are mixed."""
    side = int(x.shape[1]**0.5)
    own, rest = shares(masks_of(regions, side, side), overlap)
    total = torch.zeros(2, x.shape[1], site.width)
    for share, name, context in zip([*own, rest], [*(r.prompt for r in regions), None], [*contexts, scene], strict=True):
        with backbone.folded(bank[{"a": "rex", "b": "mimi"}[name]].deltas if name else bank["tuned"].deltas):
            q = backbone.project(site, "to_q", x)
            k, v = (backbone.project(site, p, context.at(site)) for p in ("to_k", "to_v"))
            attended = multi_head(q, k, v, site.heads)
            total += share.flatten().view(1, -1, 1) * torch.nn.functional.linear(attended, backbone._weight(site, "to_out"))
    return total + backbone._linear(site, "to_out").bias


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_region_is_attended_by_a_model_of_its_own(tiny_backbone, bank, layout, overlap):
    regions, backbone = LAYOUTS[layout], tiny_backbone
    contexts = [_encode(backbone, bank, ["", f"a {color} thing"]) for color in ("red", "green", "blue")[:len(regions)]]
    scene = _encode(backbone, bank, ["", "a dog"])
    parts = [Part(c, bank[{"a": "rex", "b": "mimi"}[r.prompt]].deltas) for r, c in zip(regions, contexts, strict=True)]
    program = RegionProgram(backbone, Part(scene, bank["tuned"].deltas), regions, parts, torch.tensor([0, 1]), (8, 8), overlap)
    for site, cells in ((backbone.layout.sites[0], 64), (backbone.layout.sites[2], 16)):
        x = random(2, cells, site.width)
        found = _through(backbone, program, site, x, scene)
        assert torch.allclose(found, by_definition(backbone, site, bank, scene, regions, contexts, x, overlap), atol=1e-4)


def _through(backbone, program, site, x, scene):
    """What to_out gives at a site where the program runs."""
    q = program.project(site, "to_q", x, backbone.project(site, "to_q", x))
    text = scene.at(site)
    k, v = (program.project(site, p, text, backbone.project(site, p, text)) for p in ("to_k", "to_v"))
    attended = program.attend(site, q, k, v, lambda *qkv: multi_head(*qkv, site.heads))
    return program.project(site, "to_out", attended, backbone.project(site, "to_out", attended))


@torch.no_grad()
def test_what_other_peoples_attention_adds_is_added_everywhere(tiny_backbone, bank):
    """As an image prompt adapter does: its part is there inside regions as outside, once."""
    program, _ = program_of(tiny_backbone, bank, [Region("a", LEFT)])
    site, query = tiny_backbone.layout.sites[2], random(2, 16, 64)

    def attend(q, k, v):
        return multi_head(q, k, v, site.heads)

    def theirs(q, k, v):
        return attend(q, k, v) + 0.5

    theirs.plain = attend
    expected = program.attend(site, query, query, query, attend) + 0.5
    assert torch.allclose(program.attend(site, query, query, query, theirs), expected, atol=1e-5)


def test_the_order_of_regions_that_do_not_overlap_does_not_matter(tiny_backbone, bank):
    regions = [Region("<rex>", (0, 0, 0.5, 0.5)), Region("<mimi>", RIGHT), Region("a dog", (0.5, 0, 1, 0.5))]
    turned = [*regions[1:], regions[0]]
    one, two = (sample_regions(tiny_backbone, bank, "a room", r, [1], QUICK) for r in (regions, turned))
    assert torch.allclose(one, two, atol=1e-5)


def test_the_first_region_lies_on_top_and_the_nearest_keeps_its_place():
    large, small = box_mask(FULL, 8, 8), box_mask((0.25, 0.25, 0.75, 0.75), 8, 8)
    masks = torch.stack([large, small])
    own, scene = shares(masks, "priority")
    assert torch.equal(own[0], large) and not own[1].any() and not scene.any()
    own, _ = shares(masks.flip(0), "priority")
    assert torch.equal(own[0], small) and torch.equal(own[1], large - small)
    own, scene = shares(masks, "nearest")
    assert torch.equal(own[1], small) and torch.equal(own[0], large - small) and not scene.any()      # the same centre: the smaller one
    left, right = box_mask((0, 0, 1, 0.75), 8, 8), box_mask((0, 0.25, 1, 1), 8, 8)
    own, _ = shares(torch.stack([left, right]), "nearest")
    assert torch.equal(own[0], box_mask(LEFT, 8, 8)) and torch.equal(own[1], box_mask(RIGHT, 8, 8))
    with pytest.raises(ConceptError, match="average, priority, nearest"):
        shares(masks, "sum")


@pytest.mark.parametrize("overlap", OVERLAPS)
@given(data=st.data())
def test_shares_sum_to_one_and_stay_where_the_masks_are(overlap, data):
    seed, count = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 5))
    masks = torch.rand(count, 5, 7, generator=torch.Generator().manual_seed(seed))
    masks = masks * (torch.rand(count, 5, 7, generator=torch.Generator().manual_seed(seed + 1)) < 0.5)
    own, scene = shares(masks, overlap)
    assert torch.allclose(own.sum(0) + scene, torch.ones(5, 7), atol=1e-6)
    assert own.min() >= 0 and scene.min() >= 0 and not own[masks == 0].any()


@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
def test_a_cover_gives_every_cell_its_sources(seed, count):
    """Put together by the cover, marks of regions and cells come to their own cells with their own weights."""
    masks = torch.rand(count, 20, generator=torch.Generator().manual_seed(seed))
    masks = masks * (torch.rand(count, 20, generator=torch.Generator().manual_seed(seed + 1)) < 0.4)
    own, scene = shares(masks)
    cover = cover_of(own, scene)
    marks = torch.cat([(100.0 * torch.tensor(g.members).view(-1, 1) + g.cells).flatten() for g in cover.groups] or [torch.zeros(1)])
    for cell in range(20):
        found = {float(marks[place]): float(weight) for place, weight in zip(cover.sources[cell], cover.weights[0, cell], strict=True)
                 if weight > 0}
        assert found == pytest.approx({100.0 * u + cell: float(own[u, cell]) for u in range(count) if own[u, cell] > 0})
    assert torch.equal(cover.scene[0], scene) and sorted(u for g in cover.groups for u in g.members) == [u for u in range(count)
                                                                                                       if own[u].any()]


def test_keys_and_values_of_regions_have_their_deltas_and_halves(tiny_backbone, bank):
    program, parts = program_of(tiny_backbone, bank, [Region("a", FULL)])
    site = tiny_backbone.layout.sites[1]
    with tiny_backbone.folded(bank["rex"].deltas):
        key, value = (tiny_backbone.project(site, name, parts[0].context.at(site)) for name in ("to_k", "to_v"))
    query, scene_key = random(2, 16, 64), random(2, 16, 64, seed=1)
    out = program.attend(site, query, scene_key, scene_key, attend)
    asking = query + bank["rex"].deltas[site.index, "to_q"].apply(query)
    assert torch.allclose(out, attend(asking, key, value), atol=1e-4)
    assert not torch.allclose(key[0], key[1])


def test_regions_are_on_from_start_to_end(tiny_backbone, bank):
    program, _ = program_of(tiny_backbone, bank, [Region("a", FULL, start=0.25, end=0.5)])
    site, query = tiny_backbone.layout.sites[1], random(2, 16, 64)
    base = attend(query, query, query)
    for progress, on in [(0.0, False), (0.2, False), (0.25, True), (0.5, True), (0.51, False), (1.0, False), (0.3, True)]:
        program.progress = progress
        assert torch.allclose(program.attend(site, query, query, query, attend), base) != on


def test_a_schedule_changes_the_picture(tiny_backbone, bank):
    whole, first, last = (sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", FULL, start=s, end=e)], [1], QUICK)
                          for s, e in ((0, 1), (0, 0.4), (0.6, 1)))
    assert not torch.allclose(whole, first, atol=1e-3) and not torch.allclose(first, last, atol=1e-3)


def test_a_region_acts_where_it_is(tiny_backbone, bank):
    """In the first layer alone: further on, the net spreads everything over the picture."""
    class First(SiteProgram):
        def __init__(self, inner):
            self.inner, self.out = inner, None

        def attend(self, site, query, key, value, default):
            self.out = self.inner.attend(site, query, key, value, default) if site.index == 0 else self.out
            return default(query, key, value)

    outputs = []
    for regions in ([Region("a", LEFT)], [Region("a", LEFT, strength=0.0)]):
        program = First(program_of(tiny_backbone, bank, regions)[0])
        tiny_backbone.predict(random(2, 4, 8, 8), torch.tensor([500, 500]), _encode(tiny_backbone, bank, ["", "a dog"]), program)
        outputs.append(program.out.view(2, 8, 8, -1))
    assert torch.equal(outputs[0][:, :, 4:], outputs[1][:, :, 4:])
    assert not torch.allclose(outputs[0][:, :, :4], outputs[1][:, :, :4], atol=1e-3)


def test_deltas_as_activations_equal_folded_ones(tiny_backbone, bank):
    latents, t, context = random(2, 4, 8, 8), torch.tensor([10, 900]), _encode(tiny_backbone, bank, ["a <rex>", "a dog"])
    with tiny_backbone.folded(bank["rex"].deltas):
        folded = tiny_backbone.predict(latents, t, context)
    assert torch.allclose(tiny_backbone.predict(latents, t, context, DeltaProgram(bank["rex"].deltas)), folded, atol=1e-4)
