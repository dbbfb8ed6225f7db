"""Attention guidance: its losses by brute force, what it may change, and what it does to the maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.attention.maps import coarse
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.prompts import Vocabulary
from continual_concepts.core.conditioning.encoding import encode_prompts, text_positions
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.processor import AttentionProcessor
from continual_concepts.core.model.sites import Site
from continual_concepts.core.sampling import attention_guidance as module
from continual_concepts.core.sampling.attention_guidance import (
    AttentionGuidance,
    MapRecorder,
    Subject,
    guidance_losses,
    noun_masks,
    word_maps,
)
from continual_concepts.core.sampling.sampling import encode, sample
from continual_concepts.core.sampling.settings import SampleSettings

QUICK = SampleSettings(steps=4, cfg=3.0, size=(32, 32))
TWO, ONE = "<rex> and <mimi>", "a <rex> here"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def bank(tiny_backbone, make_concept):
    bank = ConceptBank(tiny_backbone.layout)
    for i, (name, method) in enumerate((("rex", "cidm"), ("mimi", "cidm"))):
        bank = bank.add(make_concept(tiny_backbone.layout, name, i, size=0.2, method=method))
    return bank


@pytest.fixture
def subject():
    return Subject(((2, 3), (5, 6)), (1, 2, 3, 4, 5, 6))


def test_the_losses_are_their_formulas(subject):
    """Cell by cell, from the words' maps."""
    maps, grid = random(16, 9).softmax(1), (4, 4)
    words = word_maps(maps, subject.text, grid)
    found = guidance_losses(maps, subject, grid)
    dal = sum(1 - max(words[n].tolist()) for n in (2, 3, 5, 6)) / 4
    dot = sum(a * b for a, b in zip(words[3].tolist(), words[6].tolist(), strict=True))
    clul = dot / float(words[3].norm() * words[6].norm())
    oaa = 0.0
    for identifier, noun, other in ((2, 3, 6), (5, 6, 3)):
        outside = [words[identifier, s] for s in range(16)
                   if not (words[noun, s] > 0.5 * words[noun].max() and words[noun, s] >= words[other, s])]
        oaa += float(sum(outside)) / float(words[identifier].sum()) / 2
    assert [value.item() for value in found.values()] == pytest.approx([dal, clul, oaa], abs=1e-5)


def test_maps_are_shares_among_the_prompts_own_tokens():
    maps = random(16, 9).softmax(1)
    words = word_maps(maps, (1, 2, 5), (4, 4))
    # The blur's weights add up to nearly 1
    assert torch.allclose(words.sum(0), torch.ones(16), atol=1e-2)
    assert not words[[0, 3, 4, 6, 7, 8]].any()
    scaled = maps * torch.where(torch.arange(9) == 0, 7.0, 1.0)      # what begin takes is of no account
    assert torch.allclose(word_maps(scaled, (1, 2, 5), (4, 4)), words, atol=1e-6)


def test_perfect_maps_have_no_loss(subject):
    """Two concepts on two halves, each cell with all of its attention on its concept. What is left of the
    loss is that two words share a half."""
    maps = torch.zeros(64, 9)
    for cells, (identifier, noun) in ((range(32), (2, 3)), (range(32, 64), (5, 6))):
        maps[list(cells)[:16] if identifier == 2 else list(cells)[16:], identifier] = 0.5
        maps[list(cells)[:16] if identifier == 2 else list(cells)[16:], noun] = 0.5
    maps[:, 4] += 1 - maps.sum(1)
    found = guidance_losses(maps, subject, (8, 8))
    assert found["CLUL"] < 1e-3 and found["DAL"] == pytest.approx(0.5, abs=0.02) and found["OAA"] < 0.2
    together = maps.clone()
    together[:, [5, 6]] = maps[:, [2, 3]]
    worse = guidance_losses(together, subject, (8, 8))
    assert worse["CLUL"] > 0.99


def test_masks_share_no_cell():
    nouns = random(3, 64).abs()
    masks = noun_masks(nouns)
    assert masks.sum(0).max() <= 1 and masks.any(1).sum() >= 1 and set(masks.unique().tolist()) == {0.0, 1.0}


def test_positions_of_the_text(tiny_backbone, bank):
    tokens = {name: bank[name].tokens for name in bank.names}
    context = encode_prompts(tiny_backbone, bank.vocabulary.parse_all([TWO]), tokens)
    text = text_positions(tiny_backbone, bank.vocabulary.parse(TWO))
    assert text == tuple(range(1, 6)) and set(sum(context.words[0].values(), ())) == {1, 2, 4, 5}
    long = "red " * 20
    found = text_positions(tiny_backbone, Vocabulary(()).parse(long))
    length = tiny_backbone.text[0].length
    assert len(found) == len(tiny_backbone.text[0].ids(long))
    assert not {0, length - 1, length, 2 * length - 1} & set(found)


def evaluation_of(backbone, bank, prompts, t=500):
    context = encode(backbone, bank, prompts)
    subjects = [Subject(tuple(words.values()), text_positions(backbone, bank.vocabulary.parse(prompt)))
                for words, prompt in zip(context.words, prompts, strict=True)]

    def evaluate(latents, processor):
        return backbone.predict(latents, torch.full((len(latents),), t), context, processor)

    return evaluate, subjects


def loss_of(evaluate, subjects, latents):
    recorder = MapRecorder(AttentionProcessor(), (8, 8))
    with torch.no_grad():
        evaluate(latents, recorder)
    return sum(sum(guidance_losses(m, s, (8, 8)).values())
               for m, s in zip(recorder.mean(), subjects, strict=True)).item()


def test_the_gradient_is_the_losses(any_backbone, bank):
    """Against the finite difference along the direction of the step."""
    evaluate, subjects = evaluation_of(any_backbone, bank, [TWO])
    latents = random(1, 4, 8, 8)
    step = AttentionGuidance(subjects, 1.0).moved(latents, evaluate) - latents
    direction = step / step.norm()
    sides = [loss_of(evaluate, subjects, latents + h * direction) for h in (1e-2, -1e-2)]
    slope = (sides[0] - sides[1]) / 2e-2
    start = loss_of(evaluate, subjects, latents)
    assert slope < 0 and step.square().mean().sqrt().item() == pytest.approx(module.STEP * start, rel=1e-3)
    for other in range(3):      # steepest: no other direction falls as fast
        way = random(1, 4, 8, 8, seed=10 + other)
        way = way / way.norm()
        assert loss_of(evaluate, subjects, latents + 1e-2 * way) - start > 1e-2 * slope * 0.9


def test_many_steps_bring_the_loss_down(tiny_backbone, bank):
    evaluate, subjects = evaluation_of(tiny_backbone, bank, [TWO, TWO])
    latents = random(2, 4, 8, 8)
    before, guidance = loss_of(evaluate, subjects, latents), AttentionGuidance(subjects, 1.0)
    for _ in range(10):
        latents = guidance.moved(latents, evaluate)
    assert loss_of(evaluate, subjects, latents) < before - 1e-3


def test_a_latent_does_not_depend_on_its_batch(tiny_backbone, bank):
    latents = random(3, 4, 8, 8)
    evaluate, subjects = evaluation_of(tiny_backbone, bank, [TWO, ONE, "<mimi> near <rex>"])
    together = AttentionGuidance(subjects, 1.0).moved(latents, evaluate)
    assert torch.equal(together[1], latents[1])      # one concept: nothing to keep apart
    for i, prompt in ((0, TWO), (2, "<mimi> near <rex>")):
        evaluate, subjects = evaluation_of(tiny_backbone, bank, [prompt])
        alone = AttentionGuidance(subjects, 1.0).moved(latents[i:i + 1], evaluate)
        assert torch.allclose(alone[0], together[i], atol=1e-4)


def test_later_passes_end_at_the_last_recorded_site(tiny_backbone, bank):
    """The same gradient, without the rest of the net."""
    evaluate, subjects = evaluation_of(tiny_backbone, bank, [TWO])
    seen, latents, guidance = [], random(1, 4, 8, 8), AttentionGuidance(subjects, 1.0)

    class Counting(AttentionProcessor):
        def attend(self, call, query, key, value, attention):
            seen.append(query.shape[1])
            return attention(query, key, value)

    first = guidance.moved(latents, evaluate, Counting())
    whole = list(seen)
    seen.clear()
    assert torch.equal(guidance.moved(latents, evaluate), first) and len(whole) == 7
    assert seen == whole[:len(seen)] and len(seen) < len(whole)


def test_only_coarse_grids_are_recorded(tiny_backbone, bank):
    evaluate, _ = evaluation_of(tiny_backbone, bank, [TWO])
    for most, cells in ((256, 64), (64, 64), (63, 16)):
        recorder = MapRecorder(AttentionProcessor(), (8, 8), most)
        evaluate(random(1, 4, 8, 8), recorder)
        assert recorder.mean().shape[:2] == (1, cells)
    recorder = MapRecorder(AttentionProcessor(), (8, 8), 3)
    evaluate(random(1, 4, 8, 8), recorder)
    assert recorder.mean() is None


def test_nothing_happens_at_strength_zero_or_with_one_concept(tiny_backbone, bank, monkeypatch):
    plain = sample(tiny_backbone, bank, [TWO, ONE], [1, 2], QUICK)
    one = sample(tiny_backbone, bank, [ONE], [2], replace(QUICK, artists=2.0))
    monkeypatch.setattr(AttentionGuidance, "moved", None)
    assert torch.equal(sample(tiny_backbone, bank, [TWO, ONE], [1, 2], replace(QUICK, artists=0.0)), plain)
    assert torch.equal(one[0], plain[1])


@pytest.mark.parametrize("mode", ["sharp", "paper"])
def test_a_picture_of_two_changes_and_nothing_else_does(any_backbone, bank, mode):
    settings = replace(QUICK, mode=mode)
    before = [p.detach().clone() for p in any_backbone.unet.parameters()]
    plain, moved, again, last = (sample(any_backbone, bank, [TWO], [1], replace(settings, artists=s))
                                 for s in (0.0, 2.0, 2.0, 0.0))
    assert torch.equal(plain, last) and torch.equal(moved, again)
    assert not torch.allclose(plain, moved, atol=1e-3)
    assert all(torch.equal(p, b) and p.grad is None
               for p, b in zip(any_backbone.unet.parameters(), before, strict=True))


def test_it_works_under_inference_mode(tiny_backbone, bank):
    expected = sample(tiny_backbone, bank, [TWO], [1], replace(QUICK, artists=1.0))
    with torch.inference_mode():
        assert torch.allclose(sample(tiny_backbone, bank, [TWO], [1], replace(QUICK, artists=1.0)), expected,
                              atol=1e-5)


def test_two_encoders(tiny_sdxl, make_concept):
    bank = ConceptBank(tiny_sdxl.layout)
    for i, name in enumerate(("rex", "mimi")):
        bank = bank.add(make_concept(tiny_sdxl.layout, name, i, size=0.2))
    plain, moved = (sample(tiny_sdxl, bank, [TWO], [1], replace(QUICK, artists=s)) for s in (0.0, 2.0))
    assert torch.isfinite(moved).all() and not torch.allclose(plain, moved, atol=1e-3)


def test_guidance_acts_in_the_first_quarter(subject):
    guidance = AttentionGuidance([subject], 1.0)
    assert [guidance.acts(p) for p in (0.0, 0.2, 0.25, 1.0)] == [True, True, False, False]
    assert not AttentionGuidance([subject], 0.0).acts(0.0)
    assert not AttentionGuidance([Subject(((1, 2),), (1, 2))], 1.0).acts(0.0)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_bad_strengths_are_refused(strength):
    with pytest.raises(ConceptError, match="artists"):
        SampleSettings(artists=strength)


def test_the_grid_of_a_transformer_is_averaged_until_it_is_coarse():
    """All its sites have one grid, so none could be left out."""
    at_transformer, at_unet = (Site(0, name, 0, 1, 2, 2)
                               for name in ("blocks.0.cross_attn", "mid_block.attn2"))
    x = torch.arange(2 * 5 * 3 * 2.0).view(2, 15, 2)
    assert coarse(at_transformer, x, (9, 5), 15) is x and coarse(at_unet, x, (9, 5), 14) is None
    pooled = coarse(at_transformer, x, (9, 5), 14)
    assert pooled.shape == (2, 6, 2) and torch.equal(pooled[:, 0], x[:, [0, 1, 3, 4]].mean(1))
    assert torch.equal(pooled[:, 5], x[:, 14])      # 5 rows and 3 columns become 3 and 2
    assert coarse(at_transformer, x, (9, 5), 5).shape == (2, 2, 2)
