"""Regions in a joint attention, where text and picture share one softmax and both change from block to block.

The text of every region stands behind the scene's as further rows, and all of them pass through all blocks in
one evaluation per step. Who reads whom is a bias on the logits:

    cell x to a row of region u's text, and back:   log share_u(x)
    text of one prompt to text of another:          never

So the attention that a cell pays to a region's text, and with it to the concept's words there, is weighted
with the region's share of this cell before the softmax. Where one region has the whole cell, the cell reads
this region's text alone. Masks of 0 and 1 for the same purpose are known from Chen et al. 2024
("Training-free Regional Prompting for Diffusion Transformers"); there they are mixed with an evaluation
without regions, which is not needed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention.token_lora import TokenLora, TokenLoraProcessor, word_mask
from ..model.deltas import Deltas
from ..model.joint_rows import fill_bias
from ..model.processor import NEVER
from ..model.sites import grid_of
from .processor import Part
from .regions import Region, region_mask, shares


class RegionTexts:
    """The texts of U regions, filled up with zeros to one length n.

    Attributes:
        states: `[U, 2, n, D]`: of each region's negative and positive prompt.
        masks: Concept -> `[U, 2, n]`, see `word_mask`.
        is_text: `[U, 2, n]`: False at rows that only fill up.
        deltas: Concept -> its deltas.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        length = max(part.context.hidden.shape[2] for part in parts)

        def stacked(rows: Sequence[Tensor]) -> Tensor:      # [2, n, ...]
            return torch.stack([pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1])) for x in rows])

        self.states = stacked([part.context.hidden[:, 0] for part in parts])
        lengths = [part.context.lengths or (part.context.hidden.shape[2],) * 2 for part in parts]
        self.is_text = torch.arange(length) < torch.tensor(lengths).unsqueeze(-1)
        self.deltas: dict[str, Deltas] = {}
        for part in parts:
            self.deltas |= part.word_bound
        self.masks = {name: stacked([word_mask(part.context, name) for part in parts])
                      for name in self.deltas}


class JointRegions(TokenLoraProcessor):
    """The attention processor for a frame with regions.

    Args:
        regions: Where and when each part acts.
        parts: One per region.
        latent: Height and width of the latent.
        overlap: As in `regions.shares`.
        isolation: Share of the first steps in which the cells of regions do not see other cells.

    Attributes:
        rows, progress, scene_concepts: As in `RegionProcessor`. The caller sets them before every call.
        scene_fills: The rows that only fill the scene's texts up, as `Context.fills` gives them, if the
            caller knows some.
    """

    def __init__(self, regions: Sequence[Region], parts: Sequence[Part], latent: tuple[int, int],
                 overlap: str = "average", isolation: float = 0.0) -> None:
        super().__init__({})
        self.regions, self.latent, self.overlap, self.isolation = list(regions), latent, overlap, isolation
        self.rows, self.progress = torch.zeros(1, dtype=torch.long), 0.0
        self.scene_concepts = TokenLora.at({}, {})
        self.scene_fills: Tensor | None = None
        self._texts = RegionTexts(parts) if parts else None
        self.masks_texts = self._texts is not None
        # what the biases depend on, besides the numbers of rows
        self._state: tuple = ()
        self._filled = torch.zeros(0, dtype=torch.bool)      # see `_fills`
        self._biases: dict[tuple[int, int], Tensor] = {}

    def read_again(self) -> None:
        """Does nothing: no keys and values are kept."""

    def extended(self, text: Tensor) -> Tensor:
        texts = self._texts
        if texts is None:
            self.concepts = self.scene_concepts
            return text
        count, length = len(texts.states), texts.states.shape[2]
        self.prompts = text.shape[1], *[length] * count
        state = (self.prompts, self.progress < self.isolation, tuple(self.rows.tolist()), text.device,
                 tuple(region.active(self.progress) for region in self.regions))
        fills = self._fills(text)
        if state != self._state or not torch.equal(fills, self._filled):
            self._state, self._filled, self._biases = state, fills, {}
        self.fills = fills if bool(fills.any()) else None
        self.concepts = _together(self.scene_concepts, texts.deltas, text.shape[1],
                                  {name: _side_by_side(mask[:, self.rows])
                                   for name, mask in texts.masks.items()}, count * length)
        return torch.cat([text, _side_by_side(texts.states[:, self.rows]).to(text)], 1)

    def joint_bias(self, cells: int, others: int, device: torch.device) -> Tensor | None:
        texts = self._texts
        if texts is None:
            return None
        if (cells, others) not in self._biases:
            bias = _bias(self.prompts, self._shares(cells), others, self.progress < self.isolation)
            if self.fills is not None:
                bias = bias.repeat(len(self.fills), 1, 1, 1)
                bias[..., :self.fills.shape[1]].masked_fill_(self.fills[:, None, None], NEVER)
            self._biases[cells, others] = bias.to(device)
        return self._biases[cells, others]

    def _fills(self, text: Tensor) -> Tensor:
        """`[B, N + U n]` on the CPU: the rows that only fill up the scene's texts `[B, N, D]` and those of
        the regions."""
        assert self._texts is not None
        scene = self.scene_fills
        scene = torch.zeros(text.shape[:2], dtype=torch.bool) if scene is None else scene.cpu()
        return torch.cat([scene, ~_side_by_side(self._texts.is_text[:, self.rows.cpu()])], 1)

    def _shares(self, cells: int) -> Tensor:
        """`[1 + U, S]`: the shares of the scene and the regions in every cell."""
        grid = grid_of(cells, *self.latent)
        masks = torch.stack([region.strength * region.active(self.progress) * region_mask(region, *grid)
                             for region in self.regions])
        own, scene = shares(masks, self.overlap)
        return torch.cat([scene.unsqueeze(0), own]).flatten(1)


class JointCrops(TokenLoraProcessor):
    """Each of K regions reads its own prompt on a crop of its own. The scene's prompt is not used.

    For each half of guidance (negative, positive), a batch holds K * B crops of one size, ordered by region.

    Args:
        parts: The regions.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__({})
        self._texts, self.masks_texts = RegionTexts(parts), True
        self.scene_concepts: TokenLora | None = None
        self._places: tuple[Tensor, Tensor] = torch.zeros(0), torch.zeros(0)

    def take(self, halves: Sequence[int], rows: int) -> None:
        """Announces the next batch; arguments as for `CropProcessor.take`."""
        count = len(self._texts.states)
        region = torch.arange(count).repeat(len(halves))
        half = torch.tensor(list(halves)).repeat_interleave(count)
        pictures = rows // len(region)
        self._places = region.repeat_interleave(pictures), half.repeat_interleave(pictures)

    def extended(self, text: Tensor) -> Tensor:
        masks = {name: mask[self._places] for name, mask in self._texts.masks.items()}
        self.prompts, fills = (self._texts.states.shape[2],), ~self._texts.is_text[self._places]
        self.fills = fills if bool(fills.any()) else None
        self.concepts = TokenLora.at({name: mask for name, mask in masks.items() if bool(mask.any())},
                                     self._texts.deltas)
        return self._texts.states[self._places].to(text)

    def joint_bias(self, cells: int, others: int, device: torch.device) -> Tensor | None:
        return None if self.fills is None else fill_bias(self.fills.to(device), cells + others)


def _side_by_side(x: Tensor) -> Tensor:
    """`[U, B, n, ...]` to `[B, U n, ...]`."""
    return x.transpose(0, 1).flatten(1, 2)


def _together(scene: TokenLora, deltas: Mapping[str, Deltas], own: int, masks: Mapping[str, Tensor],
              further: int) -> TokenLora:
    """The concepts of the scene and of the regions' texts behind it.

    Args:
        scene: The scene's concepts.
        deltas: Concept -> its deltas, of the regions' concepts.
        own: Rows of the scene's text.
        masks: Concept -> `[B, further]`, of the regions' concepts.
        further: Rows of the regions' texts.
    """
    every = dict(scene.deltas) | dict(deltas)
    both = {}
    for name in every:
        at_scene, at_regions = scene.masks.get(name), masks.get(name)
        both[name] = torch.cat([_nothing(at_regions, own) if at_scene is None else at_scene,
                                _nothing(at_scene, further) if at_regions is None else at_regions], 1)
    return TokenLora.at({name: mask for name, mask in both.items() if bool(mask.any())}, every)


def _nothing(like: Tensor | None, rows: int) -> Tensor:
    """A mask `[B, rows]` of zeros for the batch of another mask."""
    assert like is not None      # a concept is in the scene's text or in those of regions
    return like.new_zeros(len(like), rows)


def _bias(prompts: Sequence[int], share: Tensor, others: int, isolates: bool) -> Tensor:
    """The bias on the logits, `[1, 1, N + S + O, N + S + O]`, for rows of text, cells, and other rows.

    Other rows, those of reference pictures, read the scene's text and are read by all.

    Args:
        prompts: The number of rows of each text, the scene's first.
        share: `[1 + U, S]`, as `JointRegions._shares` gives it.
        others: O.
        isolates: Whether cells of regions only see cells of the same region.
    """
    cells, prompt = share.shape[1], torch.arange(len(prompts)).repeat_interleave(torch.tensor(prompts))
    count = len(prompt)
    bias = torch.zeros(count + cells + others, count + cells + others)
    bias[:count, :count].masked_fill_(prompt[:, None] != prompt, NEVER)
    weight = share.log().clamp(min=NEVER)[prompt]      # [N, S]
    bias[:count, count:count + cells], bias[count:count + cells, :count] = weight, weight.T
    bias[count + cells:, :count].masked_fill_(prompt != 0, NEVER)
    if isolates:
        own, has_scene = (share[1:] > 0).float(), share[0] > 0
        sees = (own.T @ own > 0) | has_scene[:, None]
        bias[count:count + cells, count:count + cells].masked_fill_(~sees, NEVER)
    return bias[None, None]
