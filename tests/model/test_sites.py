"""Layouts of UNets and transformers: execution order and layer copies, the same from every host."""

from __future__ import annotations

import random

import pytest
import torch

from continual_concepts.core.attention.adapters import LowRankAdapters
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods.slots import SlotAdapters
from continual_concepts.core.model.checkpointing import recomputed
from continual_concepts.core.model.deltas import check_fits, pack, unpack
from continual_concepts.core.model.sites import (
    SiteLayout,
    joint_layout,
    one_stream_layout,
    transformer_layout,
    unet_layout,
)

WIDTHS = (("clip_l", 768),)


def names_of(groups, depth):
    """Sites in execution order: so many transformer groups going down, one in the middle, as many going
    up."""
    places = [f"down_blocks.{i}.attentions.0" for i in range(groups)] + ["mid_block.attentions.0"]
    places += [f"up_blocks.{i}.attentions.0" for i in range(groups)]
    return [f"{place}.transformer_blocks.{block}.attn2" for place in places for block in range(depth)]


@pytest.mark.parametrize("groups, depth, copies",
                         [(7, 1, list(range(15))), (3, 2, list(range(14))),
                          (3, 3, [i // 3 for i in range(21)])])
def test_up_to_sixteen_sites_have_a_layer_copy_each_and_more_share_one_per_group(groups, depth, copies):
    names = names_of(groups, depth)
    layout = unet_layout({name: (8, 320, 768) for name in names}, WIDTHS)
    assert [site.name for site in layout.sites] == names and [site.copy for site in layout.sites] == copies
    assert [site.index for site in layout.sites] == list(range(len(names))) and layout.text_widths == WIDTHS


def test_a_description_names_the_family_of_a_published_unet():
    names = [f"up_blocks.0.attentions.{i}.transformer_blocks.0.attn2" for i in range(16)]
    layout = unet_layout({name: (8, 320, 768) for name in names}, WIDTHS)
    assert layout.describe() == "16 sites with 768-wide context and 768-wide tokens, as SD1.5 has"
    fewer = unet_layout({name: (8, 320, 768) for name in names[1:]}, WIDTHS)
    blocks = transformer_layout({f"blocks.{i}.cross_attn": (8, 320, 768) for i in range(16)}, WIDTHS)
    assert not any("as SD" in other.describe() for other in (fewer, blocks))


def test_the_order_of_the_blocks_is_execution_order_whatever_the_host_lists_first():
    names = names_of(3, 1)
    blocks = [[name for name in names if name.startswith(block)]
              for block in ("down_blocks", "mid_block", "up_blocks")]
    random.Random(0).shuffle(blocks)
    shapes = {name: (i + 1, 8, 6) for i, name in enumerate(name for block in blocks for name in block)}
    layout = unet_layout(shapes, WIDTHS)
    assert [site.name for site in layout.sites] == names
    assert all((site.heads, site.width, site.context_width) == shapes[site.name] for site in layout.sites)


def test_the_blocks_of_a_transformer_run_by_number_and_share_one_layer_copy():
    shapes = {f"blocks.{n}.cross_attn": (n + 1, 8 * (n + 1), 6) for n in (10, 2, 0, 11, 1)}
    layout = transformer_layout(shapes, (("qwen3_06b", 6),))
    assert [site.name for site in layout.sites] == [f"blocks.{n}.cross_attn" for n in (0, 1, 2, 10, 11)]
    assert [site.index for site in layout.sites] == [0, 1, 2, 3, 4] and layout.copies == 1
    assert all((site.heads, site.width, site.context_width) == shapes[site.name] for site in layout.sites)
    assert SiteLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize("name", ["blocks.1.self_attn", "blocks.x.cross_attn", "mid_block.attn2",
                                  "net.blocks.1.cross_attn"])
def test_a_site_of_another_form_is_not_one_of_a_transformer(name):
    with pytest.raises(ConceptError, match=r"allowed: blocks\.N\.cross_attn"):
        transformer_layout({"blocks.0.cross_attn": (1, 8, 6), name: (1, 8, 6)}, WIDTHS)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.numbers = []

    def forward(self, x, options):
        self.numbers.append(options["number"])
        return (x * options["number"]).square()


def test_a_recomputed_block_sees_the_options_of_its_own_call():
    """A host writes the number of each block into one dictionary, before the backward pass comes to the first
    one."""
    blocks = torch.nn.Sequential(Block(), Block())
    x, options = torch.ones(3, requires_grad=True), {}
    with recomputed(blocks, ("Block",)):
        y = x
        for number, block in enumerate(blocks, 2):
            options["number"] = number
            y = block(y, options=options)
        y.sum().backward()
    # forward, and again in the backward pass
    assert [block.numbers for block in blocks] == [[2, 2], [3, 3]]
    assert torch.allclose(x.grad, torch.full((3,), 4 * 9 * 16.0))       # of (3 (2 x)^2)^2 = 144 x^4
    assert not any("forward" in block.__dict__ for block in blocks)


def test_without_kinds_no_block_is_recomputed():
    block = torch.nn.Sequential(Block())
    with recomputed(block, ()):
        block[0](torch.ones(1, requires_grad=True), options={"number": 1}).sum().backward()
    assert block[0].numbers == [1]


def test_joint_attention_has_no_modules_of_its_own_for_the_text():
    layout = joint_layout(2, 1, 24, 3072, (("t5xxl", 4096),))
    assert [site.name for site in layout.sites] == ["double_blocks.0", "double_blocks.1", "single_blocks.0"]
    assert layout.is_joint and layout.copies == 1 and not layout.takes_words
    assert SiteLayout.from_json(layout.to_json()) == layout
    with pytest.raises(ConceptError, match="'double_blocks.0' is a joint.*to_k for other programs is known"):
        layout.sites[0].path("to_k")
    with pytest.raises(ConceptError, match="where baking is not supported; allowed: learning with 'slots'"):
        layout.refuse_joint("baking is")
    unet_layout({"mid_block.attn2": (8, 320, 768)}, WIDTHS).refuse_joint("baking is")


def test_keys_and_values_may_be_narrower_where_heads_share_them():
    layout = one_stream_layout(2, 48, 6144, 1536, (("qwen3vl_4b", 2560),))
    assert [site.name for site in layout.sites] == ["blocks.0", "blocks.1"]
    assert layout.is_joint and layout.sites[0].of_transformer and not layout.takes_words
    assert layout.sites[1].shape("to_k") == layout.sites[1].shape("to_v") == (1536, 6144)
    assert layout.sites[1].shape("to_q") == layout.sites[1].shape("to_out") == (6144, 6144)
    assert SiteLayout.from_json(layout.to_json()) == layout
    adapters = LowRankAdapters(layout, 2, 1.0, torch.Generator().manual_seed(0), "cpu")
    slots = SlotAdapters(layout, 3, torch.Generator().manual_seed(0), "cpu")
    check_fits({**adapters.stored(torch.float32), **slots.stored(torch.float32)}, layout, "the concept")
    assert slots.key[0].shape == (3, 6144)      # they are read by all heads of the query
    packed = pack(slots.stored(torch.float32), layout)
    assert unpack(*packed, layout).keys() == slots.deltas().keys()
    damaged = layout.to_json()
    damaged["sites"][0]["key_width"] = 0
    with pytest.raises(ConceptError, match="heads and widths be 1 or more"):
        SiteLayout.from_json(damaged)


def test_layouts_without_narrower_keys_are_written_and_hashed_as_before():
    """Banks of earlier versions name these fingerprints, and earlier versions read what is written."""
    layout = joint_layout(1, 1, 24, 3072, (("t5xxl", 4096),))
    assert layout.fingerprint == "4f192b5c16e97166"
    assert set(layout.to_json()["sites"][0]) == {"index", "name", "copy", "heads", "width", "context_width"}
    alike = one_stream_layout(1, 24, 3072, 3072, (("t5xxl", 4096),))
    assert alike.sites[0].key_width is None and "key_width" not in alike.to_json()["sites"][0]
    narrower = one_stream_layout(1, 24, 3072, 768, (("t5xxl", 4096),))
    assert narrower.fingerprint != alike.fingerprint
