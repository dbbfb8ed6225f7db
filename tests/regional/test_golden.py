"""Agreement with the reference data in tests/fixtures, which separate implementations computed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from continual_concepts.core.attention.packed import KeysValues, PackedKeysValues
from continual_concepts.core.model.aggregation import released_weights
from continual_concepts.core.regional.attention import region_attention
from continual_concepts.core.regional.cover import cover_of
from continual_concepts.core.regional.regions import box_mask, shares


def test_released_weights(fixtures_dir):
    data = load_file(fixtures_dir / "aggregation.safetensors")
    counts = data["token_counts"].tolist()
    # between the begin token and the padding
    words = data["concept_embeddings"][:, None, 1:1 + sum(counts)]
    weights = released_weights(data["prompt_embeddings"], words, counts)
    assert torch.allclose(weights, data["weights"], atol=1e-5)


@pytest.fixture
def golden(fixtures_dir):
    return load_file(fixtures_dir / "region_attention.safetensors")


def test_boxes_cover_the_reference_cells(golden):
    for box, cells in zip(golden["boxes"].tolist(), golden["cells"].tolist(), strict=True):
        expected = torch.zeros(16, 16)
        expected[cells[0]:cells[2], cells[1]:cells[3]] = 1
        assert torch.equal(box_mask(tuple(box), 16, 16), expected)


def test_region_attention(golden):
    scale = golden["scale"].item()

    def attend(query, key, value):
        return torch.softmax(query @ key.transpose(1, 2) * scale, dim=-1) @ value

    masks = torch.stack([box_mask(tuple(box), 16, 16).flatten() for box in golden["boxes"].tolist()])
    keys, values = ([golden[f"region{i}_{what}"] for i in range(2)] for what in ("key", "value"))
    query, cover = golden["query"], cover_of(*shares(masks))
    stacks = [PackedKeysValues([KeysValues(keys[u], values[u]) for u in group.members])
              for group in cover.groups]
    out, more = region_attention(query, query, golden["base_output"], stacks, cover, torch.arange(len(query)),
                                 1, attend)
    assert more is None
    assert torch.allclose(out, golden["output"], atol=1e-5)
