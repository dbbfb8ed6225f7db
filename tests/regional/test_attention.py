"""Region attention: every region is attended by a model of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.attention.packed import KeysValues, PackedKeysValues
from continual_concepts.core.hosts.diffusers import multi_head
from continual_concepts.core.model.processor import HostAttention, SiteCall
from continual_concepts.core.regional.attention import isolated_attention, region_attention
from continual_concepts.core.regional.cover import cover_of
from continual_concepts.core.regional.processor import Part, RegionProcessor
from continual_concepts.core.regional.regions import OVERLAPS, Region, box_mask, masks_of, shares
from continual_concepts.core.sampling.regions import sample_regions
from continual_concepts.core.sampling.sampling import encode
from continual_concepts.core.sampling.settings import SampleSettings

FULL = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
QUICK = SampleSettings(steps=3, cfg=3.0, size=(32, 32))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend(query, key, value):
    return multi_head(query, key, value, 2)


@pytest.fixture
def qkv():
    query, base = random(2, 16, 8), random(2, 16, 8, seed=1)
    keys, values = ([random(2, 5, 8, seed=seed) for seed in seeds] for seeds in ((2, 3), (4, 5)))
    return query, base, keys, values


def plain_regions(query, base, keys, values, masks):
    """Region attention with the scene's weights everywhere."""
    cover = cover_of(*shares(masks))
    stacks = [PackedKeysValues([KeysValues(keys[u], values[u]) for u in group.members])
              for group in cover.groups]
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
    masks = torch.stack([box_mask((0, 0, 0.75, 0.75), 4, 4).flatten(),
                         box_mask((0.25, 0.25, 1, 1), 4, 4).flatten()])
    before = base.clone()
    out = plain_regions(query, base, keys, values, masks)
    first, second = (attend(query, k, v) for k, v in zip(keys, values, strict=True))
    only, other = masks[0].bool(), masks[1].bool()
    for where, expected in [(only & other, (first + second) / 2), (only & ~other, first),
                            (other & ~only, second), (~only & ~other, base)]:
        assert where.any() and torch.allclose(out[:, where], expected[:, where], atol=1e-6)
    assert torch.equal(base, before)


def test_a_weak_region_blends_with_the_scene(qkv):
    query, base, keys, values = qkv
    out = plain_regions(query, base, keys[:1], values[:1], torch.full((1, 16), 0.25))
    assert torch.allclose(out, 0.75 * base + 0.25 * attend(query, keys[0], values[0]), atol=1e-6)


@pytest.fixture
def bank(region_bank):
    return region_bank


def processor_of(backbone, bank, regions, scene=None):
    context = encode(backbone, bank, ["", "a dog"])
    parts = [Part(context, bank[name].deltas) for name in ("rex", "mimi")[:len(regions)]]
    return RegionProcessor(backbone, Part(context, scene or {}), regions, parts, torch.tensor([0, 1]),
                           (8, 8)), parts


LAYOUTS = {
    "halves": [Region("a", LEFT), Region("b", RIGHT)],
    "overlap": [Region("a", (0, 0, 0.75, 0.75)), Region("b", (0.25, 0.25, 1, 1), strength=0.5)],
    "one size after another": [Region("a", FULL), Region("b", (0.0, 0.0, 0.26, 0.26)),
                               Region("a", (0.5, 0.5, 0.76, 1.0), feather=0.2)],
}


def by_definition(backbone, site, bank, scene, regions, contexts, x, overlap):
    """to_out's output where every part of the picture is attended by its own model, one after another, and
    the results are mixed."""
    side = int(x.shape[1]**0.5)
    own, rest = shares(masks_of(regions, side, side), overlap)
    total = torch.zeros(2, x.shape[1], site.width)
    for share, name, context in zip([*own, rest], [*(r.prompt for r in regions), None], [*contexts, scene],
                                    strict=True):
        with backbone.folded(bank[{"a": "rex", "b": "mimi"}[name]].deltas if name else bank["tuned"].deltas):
            q = backbone.project(site, "to_q", x)
            k, v = (backbone.project(site, p, context.at(site)) for p in ("to_k", "to_v"))
            attended = multi_head(q, k, v, site.heads)
            out = torch.nn.functional.linear(attended, backbone.weight(site, "to_out"))
            total += share.flatten().view(1, -1, 1) * out
    return total + backbone._linear(site, "to_out").bias


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_region_is_attended_by_a_model_of_its_own(tiny_backbone, bank, site_output, layout, overlap):
    regions, backbone = LAYOUTS[layout], tiny_backbone
    contexts = [encode(backbone, bank, ["", f"a {color} thing"])
                for color in ("red", "green", "blue")[:len(regions)]]
    scene = encode(backbone, bank, ["", "a dog"])
    parts = [Part(c, bank[{"a": "rex", "b": "mimi"}[r.prompt]].deltas)
             for r, c in zip(regions, contexts, strict=True)]
    processor = RegionProcessor(backbone, Part(scene, bank["tuned"].deltas), regions, parts,
                                torch.tensor([0, 1]), (8, 8), overlap)
    for site, cells in ((backbone.layout.sites[0], 64), (backbone.layout.sites[2], 16)):
        x = random(2, cells, site.width)
        found = site_output(backbone, processor, site, x, scene.at(site))
        assert torch.allclose(found,
                              by_definition(backbone, site, bank, scene, regions, contexts, x, overlap),
                              atol=1e-4)


@torch.no_grad()
def test_what_another_nodes_attention_adds_is_added_everywhere(tiny_backbone, bank):
    """As an image prompt adapter does: its part is there inside regions as outside, once."""
    processor, _ = processor_of(tiny_backbone, bank, [Region("a", LEFT)])
    site, query = tiny_backbone.layout.sites[2], random(2, 16, 64)

    def attend(q, k, v):
        return multi_head(q, k, v, site.heads)

    def theirs(q, k, v):
        return attend(q, k, v) + 0.5

    call = SiteCall(processor, site, query, query, query)
    expected = processor.attend(call, query, query, query, HostAttention(attend)) + 0.5
    assert torch.allclose(processor.attend(call, query, query, query, HostAttention(attend, theirs)),
                          expected, atol=1e-5)


@pytest.mark.parametrize("masks",
                         [[(0, 0, 1, 0.5), (0, 0.5, 1, 1)], [FULL], [(0, 0, 1, 0.75), (0, 0.75, 1, 1)],
                          [(0, 0, 0.5, 0.5)]])
def test_regions_do_not_see_each_other_in_self_attention(masks):
    """Every region attends to its own cells, the scene's cells to everything; regions of one size and of
    several."""
    query, key, value = (random(2, 16, 8, seed=i) for i in range(3))
    flat = torch.stack([box_mask(box, 4, 4).flatten() for box in masks])
    cover, base = cover_of(*shares(flat)), attend(query, key, value)
    out = isolated_attention(query, key, value, cover, 2, attend)
    for mask in flat.bool():
        assert torch.allclose(out[:, mask], attend(query[:, mask], key[:, mask], value[:, mask]), atol=1e-5)
    free = ~flat.bool().any(0)
    assert torch.equal(out[:, free], base[:, free])


def test_isolation_keeps_what_is_elsewhere_out_and_costs_nothing_where_there_is_one(tiny_backbone, bank):
    for regions, same in (([Region("<rex>", FULL)], True),
                          ([Region("<rex>", LEFT), Region("<mimi>", RIGHT)], False)):
        one, two = (sample_regions(tiny_backbone, bank, "a room", regions, [1], replace(QUICK, isolation=i))
                    for i in (0.0, 1.0))
        assert torch.allclose(one, two, atol=1e-4) == same


def test_self_attention_is_the_hosts_own_until_it_is_asked_for(tiny_backbone, bank, monkeypatch):
    """Isolation ends with its share of the steps; tiles of another node are left alone."""
    asked = []
    original = RegionProcessor.self_attention
    monkeypatch.setattr(RegionProcessor, "self_attention", lambda self, *rest: asked.append(self.progress)
                        or original(self, *rest))
    regions = [Region("<rex>", LEFT), Region("<mimi>", RIGHT)]
    sample_regions(tiny_backbone, bank, "a room", regions, [1], replace(QUICK, isolation=0.4))
    assert set(asked) == {0.0}
    processor, _ = processor_of(tiny_backbone, bank, regions)
    tiles = random(8, 7, 64)
    assert torch.equal(processor.self_attention(tiny_backbone.layout.sites[2], tiles, tiles, tiles, attend),
                       attend(tiles, tiles, tiles))


def test_the_order_of_regions_that_do_not_overlap_does_not_matter(tiny_backbone, bank):
    regions = [Region("<rex>", (0, 0, 0.5, 0.5)), Region("<mimi>", RIGHT), Region("a dog", (0.5, 0, 1, 0.5))]
    turned = [*regions[1:], regions[0]]
    one, two = (sample_regions(tiny_backbone, bank, "a room", r, [1], QUICK) for r in (regions, turned))
    assert torch.allclose(one, two, atol=1e-5)


def test_keys_and_values_of_regions_have_their_deltas_and_halves(tiny_backbone, bank):
    processor, parts = processor_of(tiny_backbone, bank, [Region("a", FULL)])
    site = tiny_backbone.layout.sites[1]
    with tiny_backbone.folded(bank["rex"].deltas):
        key, value = (tiny_backbone.project(site, name, parts[0].context.at(site))
                      for name in ("to_k", "to_v"))
    query, scene_key = random(2, 16, 64), random(2, 16, 64, seed=1)
    call = SiteCall(processor, site, query, scene_key, scene_key)
    out = processor.attend(call, query, scene_key, scene_key, HostAttention(attend))
    asking = query + bank["rex"].deltas[site.index, "to_q"].apply(query)
    assert torch.allclose(out, attend(asking, key, value), atol=1e-4)
    assert not torch.allclose(key[0], key[1])
