"""A site's call: the steps of both hosts, and what goes from one step to the next."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.attention.token_lora import TokenLoraProcessor
from continual_concepts.core.hosts.diffusers import multi_head
from continual_concepts.core.model.context import Context
from continual_concepts.core.model.deltas import LowRankDelta
from continual_concepts.core.model.processor import AttentionProcessor, HostAttention, SiteCall
from continual_concepts.core.model.sites import PROJECTIONS, Site

SITE = Site(0, "attn2", 0, 2, 8, 6)
SHAPES = {"to_q": (8, 8), "to_k": (8, 6), "to_v": (8, 6), "to_out": (8, 8)}
ATTENTION = HostAttention(lambda query, key, value: multi_head(query, key, value, SITE.heads))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}


def steps(call, attention=ATTENTION):
    """The steps of a host, one after another; the last one gives the site's output."""
    call.enter()
    yield None
    query = call.project("to_q", call.hidden @ WEIGHTS["to_q"].T)
    key = call.project("to_k", call.key_text @ WEIGHTS["to_k"].T)
    value = call.project("to_v", call.value_text @ WEIGHTS["to_v"].T)
    yield None
    attended = call.attend(query, key, value, attention)
    yield None
    yield call.finish(attended @ WEIGHTS["to_out"].T)


def output(call, attention=ATTENTION):
    return list(steps(call, attention))[-1]


class Watching(AttentionProcessor):
    def __init__(self):
        self.seen = []

    def project(self, site, projection, x, y):
        self.seen.append((projection, x))
        return y


def test_a_processor_sees_every_projection_with_its_own_input():
    processor = Watching()
    hidden, key_text, value_text = random(2, 5, 8), random(2, 3, 6, seed=1), random(2, 3, 6, seed=2)
    output(SiteCall(processor, SITE, hidden, key_text, value_text))
    assert [projection for projection, _ in processor.seen] == list(PROJECTIONS)
    inputs = [x for _, x in processor.seen]
    assert inputs[0] is hidden and inputs[1] is key_text and inputs[2] is value_text
    expected = multi_head(hidden @ WEIGHTS["to_q"].T, key_text @ WEIGHTS["to_k"].T,
                          value_text @ WEIGHTS["to_v"].T, 2)
    assert torch.equal(inputs[3], expected)


def test_without_a_text_to_read_keys_and_values_are_not_projected():
    class Blind(Watching):
        def enter(self, call):
            call.reads_text = False

    processor, text = Blind(), random(2, 3, 6, seed=1)
    output(SiteCall(processor, SITE, random(2, 5, 8), text, text))
    assert [projection for projection, _ in processor.seen] == ["to_q", "to_out"]


def test_reordered_cells_come_back_to_their_places():
    class Reversed(AttentionProcessor):
        def enter(self, call):
            call.reorder(call.hidden.flip(1), lambda *qkv: qkv[-1](*qkv[:3]), lambda y: y.flip(1))

        def attend(self, *_):
            raise AssertionError("a reordered call has its own attention")

    hidden, text = random(2, 5, 8), random(2, 3, 6, seed=1)
    plain, reordered = (output(SiteCall(processor, SITE, hidden, text, text))
                        for processor in (AttentionProcessor(), Reversed()))
    assert torch.allclose(reordered, plain, atol=1e-6)


def test_a_call_whose_attention_another_node_took_changes_nothing():
    call, y = SiteCall(Watching(), SITE, random(2, 5, 8), random(2, 3, 6),
                       random(2, 3, 6)), random(2, 5, 8, seed=3)
    assert call.finish(y) is y and not call.processor.seen


def test_calls_of_one_processor_do_not_mix():
    """Two calls of a site with a word-bound concept, step by step in turn: each gives what it gives alone."""
    deltas = {(0, name): LowRankDelta(random(a, 2, seed=10 + i), random(2, b, seed=20 + i))
              for i, (name, (a, b)) in enumerate(SHAPES.items())}
    processor = TokenLoraProcessor({"rex": deltas})
    context = Context(random(2, 1, 3, 6, seed=1), None, ({"rex": (1,)}, {}))
    processor.prepare(context)
    calls = [[SiteCall(processor, SITE, random(2, 5, 8, seed=30 + i), context.at(SITE), context.at(SITE))
              for i in range(2)]
             for _ in range(2)]
    alone = [output(call) for call in calls[0]]
    together = list(zip(*(steps(call) for call in calls[1]), strict=True))[-1]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert not torch.equal(*alone)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_what_other_nodes_add_is_the_difference_to_plain_attention(is_replaced):
    query, key, value = (random(2, 5, 8, seed=i) for i in range(3))
    replaced = HostAttention(ATTENTION.plain, (lambda *qkv: ATTENTION.plain(*qkv) + 0.5) if is_replaced
                             else None)
    added = replaced.added_by_others(query, key, value)
    if is_replaced:
        assert torch.allclose(added, torch.full_like(added, 0.5), atol=1e-6)
    else:
        assert added is None
    assert torch.equal(replaced(query, key, value), ATTENTION(query, key, value) + 0.5 * is_replaced)
