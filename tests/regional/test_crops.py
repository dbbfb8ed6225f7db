"""Crops: what they hold, their sides, and which of them share a batch."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from continual_concepts.core.regional.crops import Crop, batches_of, crop_of


@given(data=st.data())
def test_a_crop_holds_its_mask(data):
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = torch.zeros(height, width)
    mask[top:data.draw(st.integers(top + 1, height)), left:data.draw(st.integers(left + 1, width))] = 1
    crop, x = crop_of(mask), torch.rand(2, 3, height, width)
    pasted = crop.paste(crop.cut(x), (height, width))
    assert crop.cut(mask).sum() == mask.sum() and torch.equal(pasted * mask, x * mask)
    assert pasted.count_nonzero() <= 6 * crop.size[0] * crop.size[1]
    for first, last, side in ((crop.top, crop.bottom, height), (crop.left, crop.right, width)):
        assert 0 <= first < last <= side and ((last - first) % 8 == 0 or last - first == side)


def test_crops_of_one_size_share_a_batch_as_far_as_the_frame_goes():
    crops = [Crop(0, 0, *size) for size in ((8, 8), (8, 16), (8, 8), (8, 8), (8, 8), (16, 16))]
    assert batches_of(crops, 16 * 16) == [[0, 2, 3, 4], [1], [5]]
    assert batches_of(crops, 8 * 16) == [[0, 2], [1], [3, 4], [5]]
    assert batches_of(crops, 1) == [[i] for i in range(6)] and batches_of([], 9) == []
