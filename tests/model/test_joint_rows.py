"""The rows of a joint attention whose heads share keys and values."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from continual_concepts.core.attention.token_lora import TokenLora, TokenLoraProcessor
from continual_concepts.core.model.joint_rows import attend_picture
from continual_concepts.core.model.processor import AttentionProcessor
from continual_concepts.core.model.sites import one_stream_layout
from continual_concepts.core.model.slots import SLOTS, SlotDelta

SITE = one_stream_layout(1, 6, 48, 16, (("qwen3vl_4b", 6),)).sites[0]
WORDS, END, ROWS = 4, 11, 13      # first row of the picture, first of a reference picture, all


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_heads_that_share_keys_read_the_same_ones():
    """Against a layer whose keys and values are stored once for every head of the query."""
    query = draw(2, 6, ROWS, 8, seed=0)
    key, value = (draw(2, 2, ROWS, 8, seed=seed) for seed in (1, 2))
    for_all = [x[:, [0, 0, 0, 1, 1, 1]] for x in (key, value)]
    concept = TokenLoraProcessor({})
    slots = {(0, SLOTS): SlotDelta(draw(3, 48, seed=3), draw(3, 48, seed=4), 6)}
    concept.concepts = TokenLora.at({"rex": torch.tensor([[0.0, 1.0, 1.0, 0.0]] * 2)}, {"rex": slots})
    for processor in (AttentionProcessor(), concept):
        shared, separate = (attend_picture(processor, SITE, query, (query, *both), (WORDS, END))[0]
                            for both in ((key, value), for_all))
        assert torch.equal(shared, separate)
        plain = F.scaled_dot_product_attention(query, *for_all)[:, :, WORDS:END].transpose(1, 2).flatten(2)
        assert torch.allclose(shared, plain, atol=1e-5) == (processor is not concept)
