"""Regions in a joint attention against their definition, row by row."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.attention.token_lora import TokenLora, token_lora_attention
from continual_concepts.core.model.context import Context
from continual_concepts.core.model.processor import NEVER, HostAttention, JointRows, SiteCall
from continual_concepts.core.model.sites import joint_layout
from continual_concepts.core.model.slots import SLOTS, SlotDelta
from continual_concepts.core.regional.joint import JointCrops, JointRegions
from continual_concepts.core.regional.processor import Part
from continual_concepts.core.regional.regions import Region

LAYOUT = joint_layout(1, 0, 2, 8, (("t5xxl", 6),))
SITE, LATENT, CELLS, OTHERS = LAYOUT.sites[0], (4, 8), 8, 3
ROWS = torch.tensor([0, 1])      # a negative and a positive prompt


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slots(seed):
    return {(0, SLOTS): SlotDelta(draw(3, 8, seed=seed), draw(3, 8, seed=seed + 1), 2)}


def part(name: str, seed: int, length: int = 5, filled: int = 0):
    hidden = draw(2, 1, length, 6, seed=seed)
    hidden[0, :, length - filled:] = 0
    return Part(Context(hidden, None, ({}, {name: (1, 2)}), lengths=(length - filled, length)), {},
                {name: slots(seed)})


def processor(regions, parts, scene=None, rows=ROWS, **settings):
    made = JointRegions(regions, parts, LATENT, **settings)
    made.rows = rows
    made.scene_concepts = TokenLora.at({}, {}) if scene is None else scene
    return made


def attended(made, text, query, key, value, others: int = 0):
    """What the cells `[B, S, a]` get; keys and values are of text, cells and other rows."""
    count = text.shape[1]
    joint = JointRows(query, key[:, count:], value[:, count:],
                      made.joint_bias(CELLS, others, text.device))
    if joint.mask is not None and joint.mask.shape[-2] > 1:
        joint = JointRows(query, joint.key, joint.value, joint.mask[:, :, count:count + CELLS])
    plain = HostAttention(lambda q, k, v: token_lora_attention(2, q, q, k, v, (), joint)[0])
    call = SiteCall(made, SITE, query, key[:, :count], value[:, :count], joint=joint)
    return call.attend(query, key[:, :count], value[:, :count], plain)


def by_definition(share, prompts, masks, deltas, query, key, value, ignored=()):
    """The same, cell by cell: logits of text are weighted with the share of their prompt in the cell."""
    result, count = torch.zeros_like(query), len(prompts)
    for b in range(len(query)):
        for cell in range(query.shape[1]):
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                q = query[b, cell, part]
                weight = torch.exp(key[b, :, part] @ q / 2.0)
                weight[:count] *= torch.stack([share[prompt, cell] for prompt in prompts])
                for place in [place for row, place in ignored if row == b]:
                    weight[place] = 0.0
                weight = weight / weight.sum()
                out = weight @ value[b, :, part]
                for name, mask in masks.items():
                    delta = deltas[name][0, SLOTS]
                    read = torch.softmax(delta.key[:, part] @ q / 2.0, 0) @ delta.value[:, part]
                    out = out + (weight[:count] * mask[b]).sum() * read
                result[b, cell, part] = out
    return result


@pytest.mark.parametrize("filled", [0, 2])
@pytest.mark.parametrize("others", [0, OTHERS])
def test_a_cell_reads_each_text_by_its_regions_share(filled, others):
    regions = [Region("<rex>", box=(0, 0, 1, 0.5), strength=0.7), Region("<tom>", box=(0, 0.5, 1, 1))]
    scene = TokenLora.at({"rex": torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 0]])}, {"rex": slots(1)})
    made = processor(regions, [part("rex", 1, filled=filled), part("tom", 7)], scene)
    text = made.extended(draw(2, 4, 6, seed=3))
    assert text.shape == (2, 14, 6) and made.prompts == (4, 5, 5)
    query, key, value = (draw(2, rows, 8, seed=seed)
                         for rows, seed in ((CELLS, 4), (14 + CELLS + others, 5), (14 + CELLS + others, 6)))
    left = torch.tensor([0.7, 0.7, 0.0, 0.0]).repeat(2)
    share = torch.stack([1 - left - (left == 0).float(), left, (left == 0).float()])
    masks = {"rex": torch.zeros(2, 14), "tom": torch.zeros(2, 14)}
    masks["rex"][0, 2] = masks["rex"][1, 0] = 1
    masks["rex"][1, 5:7], masks["tom"][1, 10:12] = 1, 1
    expected = by_definition(share.clamp(min=0), [0] * 4 + [1] * 5 + [2] * 5, masks,
                             {"rex": slots(1), "tom": slots(7)}, query, key, value,
                             [(0, 4 + 5 - 1 - i) for i in range(filled)])
    assert torch.allclose(attended(made, text, query, key, value, others), expected, atol=1e-5)


def test_a_concept_changes_no_cell_outside_its_region():
    regions = [Region("<rex>", box=(0, 0, 1, 0.5)), Region("<tom>", box=(0, 0.5, 1, 1))]
    query, key, value = (draw(2, rows, 8, seed=rows + i) for i, rows in enumerate((CELLS, 22, 22)))
    outs = []
    for names in (("rex", "tom"), ("rex",)):
        parts = [part("rex", 1), part("tom", 7)]
        parts[1] = parts[1] if "tom" in names else Part(parts[1].context, {}, {})
        made = processor(regions, parts)
        outs.append(attended(made, made.extended(draw(2, 4, 6, seed=3)), query, key, value))
    same = (outs[0] == outs[1]).all(-1)[1].view(2, 4)
    assert same[:, :2].all() and not same[:, 2:].any()


def test_texts_do_not_read_one_another_and_see_the_cells_of_their_region():
    regions = [Region("<rex>", box=(0, 0, 1, 0.5)), Region("<tom>", box=(0, 0.5, 1, 1))]
    made = processor(regions, [part("rex", 1), part("tom", 7)])
    count = made.extended(draw(2, 4, 6, seed=3)).shape[1]
    bias = made.joint_bias(CELLS, OTHERS, torch.device("cpu"))[0, 0]
    seen = bias == 0
    prompt = torch.tensor([0] * 4 + [1] * 5 + [2] * 5)
    assert torch.equal(seen[:count, :count], prompt[:, None] == prompt)
    assert not seen[:4, count:count + CELLS].any()      # regions cover the picture
    assert seen[4, count:count + CELLS].tolist() == [True, True, False, False] * 2
    assert seen[count:, count:].all()      # cells and other rows
    assert seen[count + CELLS:, :4].all() and not seen[count + CELLS:, 4:count].any()


def test_isolation_and_phases():
    late = Region("<tom>", box=(0, 0.5, 1, 1), start=0.5)
    made = processor([Region("<rex>", box=(0, 0, 1, 0.5)), late], [part("rex", 1), part("tom", 7)],
                     isolation=0.6)

    def seen(progress):
        made.progress = progress
        count = made.extended(draw(2, 4, 6, seed=3)).shape[1]
        return (made.joint_bias(CELLS, 0, torch.device("cpu"))[0, 0] == 0)[count:]

    first, middle, last = seen(0.0), seen(0.5), seen(0.7)
    left = torch.tensor([True, True, False, False] * 2)
    assert torch.equal(first[0, -CELLS:], left) and first[2, -CELLS:].all()      # the scene sees all
    assert torch.equal(middle[2, -CELLS:], ~left) and last[:, -CELLS:].all()
    assert not first[:, 9:14].any() and middle[2, 9:14].all()


def test_a_scene_names_a_concept_and_no_region_does():
    """The concept's words are in the scene's text alone, before the rows of the region's text."""
    plain = Part(Context(draw(2, 1, 5, 6, seed=1), None, ({}, {})), {})
    scene = TokenLora.at({"tom": torch.eye(2, 4)}, {"tom": slots(5)})
    made = processor([Region("a dog", box=(0.0, 0.0, 1.0, 0.5))], [plain], scene)
    text = made.extended(draw(2, 4, 6, seed=3))
    assert torch.equal(made.concepts.masks["tom"], torch.eye(2, 9))
    query, key, value = (draw(2, rows, 8, seed=7 + i) for i, rows in enumerate((CELLS, 9 + CELLS, 9 + CELLS)))
    assert torch.isfinite(attended(made, text, query, key, value)).all()


def test_rows_of_zeros_are_read_and_rows_that_fill_up_are_not():
    """Nodes may set a whole prompt to zero, which the model reads as ever."""
    zero = Part(Context(torch.zeros(2, 1, 5, 6), None, ({}, {}), lengths=(5, 3)), {})
    made = processor([Region("a dog", box=(0.0, 0.0, 1.0, 1.0))], [zero], rows=torch.tensor([0, 1]))
    made.scene_fills = torch.tensor([[False] * 4, [False, False, False, True]])
    made.extended(torch.zeros(2, 4, 6))
    bias = made.joint_bias(CELLS, 0, torch.device("cpu"))
    assert (bias[:, 0, 4, :9] > NEVER / 2).tolist() == [[False] * 4 + [True] * 5,
                                                       [False] * 4 + [True] * 3 + [False] * 2]
    assert (bias[:, 0, 0, :9] > NEVER / 2).tolist() == [[True] * 4 + [False] * 5, [True] * 3 + [False] * 6]


def test_crops_read_their_own_text():
    parts = [part("rex", 1, filled=2), part("tom", 7)]
    made = JointCrops(parts)
    made.take([1, 0], 8)      # two pictures
    text = made.extended(torch.zeros(8, 4, 6))
    order = [(0, 1), (0, 1), (1, 1), (1, 1), (0, 0), (0, 0), (1, 0), (1, 0)]
    assert torch.equal(text, torch.stack([parts[u].context.hidden[half, 0] for u, half in order]))
    assert made.concepts.masks["rex"].sum(1).tolist() == [2, 2, 0, 0, 0, 0, 0, 0]
    bias = made.joint_bias(CELLS, 0, torch.device("cpu"))
    assert bias.shape == (8, 1, 1, 5 + CELLS)
    assert (bias != 0).sum((1, 2, 3)).tolist() == [0, 0, 0, 0, 2, 2, 0, 0]


def test_without_regions_nothing_changes():
    made = processor([], [])
    text = draw(2, 4, 6, seed=3)
    assert made.extended(text) is text and made.joint_bias(CELLS, 0, text.device) is None
