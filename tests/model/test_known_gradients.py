"""Known gradients are what autograd would compute."""

from __future__ import annotations

import torch

from continual_concepts.core.model.known_gradients import with_gradients


def test_known_gradients_reach_the_inputs_and_what_they_come_from():
    source = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    other = torch.tensor([2.0, 0.5, -1.0], requires_grad=True)
    scaled = 2 * source
    with torch.no_grad():
        value = (scaled.square() * other).sum()
        gradients = {scaled: 2 * scaled * other, other: scaled.square()}
    loss = 3 * with_gradients(value, gradients)
    expected = 3 * ((2 * source).square() * other).sum()
    assert torch.equal(loss, expected)
    for known, wanted in zip(torch.autograd.grad(loss, (source, other)),
                             torch.autograd.grad(expected, (source, other)), strict=True):
        assert torch.equal(known, wanted)


def test_without_gradient_the_value_is_left():
    factor = torch.ones(2)
    loss = with_gradients(torch.tensor(2.0), {factor: torch.ones(2)})
    assert loss.item() == 2.0 and not loss.requires_grad
