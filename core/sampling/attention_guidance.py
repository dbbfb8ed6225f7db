"""Attention guidance: gradients on the latent make sure that every concept of a prompt gets attention. It
needs no regions.

L2DM (Sun et al., arXiv 2309.04430, Fig. 2) has two parts at inference: the concept attention artist (losses
L_DAL and L_CLUL) and the orthogonal attention artist (L_OAA). They are computed on cross-attention maps. The
latent follows `z_t' = z_t - s_t grad` before the usual step.

The paper's formulas were not readable, so we follow the Attend-and-Excite family (Chefer et al., SIGGRAPH
2023), which uses maps at a quarter of the latent's sides, slightly blurred. Guidance acts in the first
quarter of the steps, where the layout is decided (that family: the first half). On the embedded base, a
longer guidance gave fewer pictures with both concepts.

The losses:

    L_DAL  = mean over the concepts' words of 1 - max over cells of the word's attention
    L_CLUL = mean over pairs of concepts of the cosine of their nouns' maps
    L_OAA  = mean over concepts of the share of the identifier's attention outside its noun's mask

The noun is a concept's last word, the identifier its first. A mask holds the cells where the noun's map is
above half its maximum and above the other nouns' maps. Attention is normalised over the prompt's own tokens,
without begin, end and padding. The step s_t is relative: it moves the latent by `strength * STEP * loss` per
element (root mean square), so that one strength fits any base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.maps import attention_maps, coarse, finest
from ..model.context import Context
from ..model.processor import AttentionProcessor, HostAttention, SiteCall
from ..model.sites import Site, grid_of

STEP = 0.05      # change of the latent per step at strength 1 and loss 1, for latents of about unit variance
BLUR = (0.107, 0.787, 0.107)      # blur of the maps along each side: a Gaussian of half a cell
UNTIL = 0.25     # share of the steps in which guidance acts


@dataclass(frozen=True)
class Subject:
    """Token positions of a prompt's words.

    Args:
        concepts: For each concept in the prompt, the token positions of the concept's words, in order.
        text: Positions of all tokens of the prompt, without begin, end and padding.
    """

    concepts: tuple[tuple[int, ...], ...]
    text: tuple[int, ...]


def word_maps(maps: Tensor, text: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Attention maps of tokens, blurred.

    Args:
        maps: Attention `[S, N]` of S cells to N tokens.
        text: Positions of the tokens over which attention is normalised.
        grid: Rows and columns of the S cells.

    Returns:
        `[N, S]`; 0 for tokens outside `text`.
    """
    is_text = maps.new_zeros(maps.shape[1]).index_fill(0, torch.tensor(text, device=maps.device), 1.0)
    divided = maps * is_text / (maps * is_text).sum(1, keepdim=True).clamp(min=1e-8)
    line = maps.new_tensor(BLUR)
    pictures = F.pad(divided.T.reshape(-1, 1, *grid), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(pictures, torch.outer(line, line).view(1, 1, 3, 3)).flatten(1)


def guidance_losses(maps: Tensor, subject: Subject, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The three losses of a prompt that names at least two concepts, each 0 to 1.

    Args:
        maps: Attention `[S, N]` of S cells to all tokens, with gradient.
        grid: Rows and columns of the S cells.
    """
    attention = word_maps(maps, subject.text, grid)
    words = attention[[position for concept in subject.concepts for position in concept]]
    nouns, identifiers = (attention[[concept[i] for concept in subject.concepts]] for i in (-1, 0))
    outside = _outside(identifiers, noun_masks(nouns.detach()))
    return {"DAL": (1 - words.amax(1)).mean(), "CLUL": _overlap(nouns), "OAA": outside}


def _overlap(nouns: Tensor) -> Tensor:
    unit = F.normalize(nouns, dim=1)
    first, second = torch.triu_indices(len(nouns), len(nouns), 1).to(nouns.device)
    return (unit[first] * unit[second]).sum(1).mean()


def noun_masks(nouns: Tensor) -> Tensor:
    """Mask of each noun, `[U, S]` of 0 and 1: the cells where its map `[U, S]` is above half its maximum and
    highest of all nouns.
    """
    return ((nouns > 0.5 * nouns.amax(1, keepdim=True)) & (nouns == nouns.amax(0, keepdim=True))).to(nouns)


def _outside(identifiers: Tensor, masks: Tensor) -> Tensor:
    return (1 - (identifiers * masks).sum(1) / identifiers.sum(1).clamp(min=1e-8)).mean()


class _Recorded(Exception):      # noqa: N818 - not an error
    """Raised when all maps are recorded, to skip the rest of the UNet."""


class MapRecorder(AttentionProcessor):
    """Wraps another processor and records the maps of one grid, with gradient.

    The grid is the finest one with at most `most` cells. The first forward pass finds the sites with this
    grid; later passes end at the last of them.

    Args:
        inner: The wrapped processor.
        latent: Height and width of the latents.
        most: Cells; 0 = see `attention.maps.finest`.
    """

    def __init__(self, inner: AttentionProcessor, latent: tuple[int, int], most: int = 0) -> None:
        self.inner, self.latent, self.most = inner, latent, most or finest(latent)
        self.maps: dict[int, list[Tensor]] = {}
        self.last = self._latest = -1      # last site of that grid; last site recorded so far

    def prepare(self, context: Context) -> None:
        self.inner.prepare(context)
        self.maps = {}

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        return self.inner.project(site, projection, x, y)

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        site, asking = call.site, coarse(call.site, query, self.latent, self.most)
        cells = 0 if asking is None else asking.shape[1]
        if asking is not None and cells >= max(self.maps, default=0):
            if cells not in self.maps:
                self.maps = {cells: []}      # a finer grid replaces coarser ones
            self.maps[cells].append(attention_maps(asking.float(), key.float(), site.heads))
            if site.index == self.last:
                raise _Recorded
            self._latest = site.index
        return self.inner.attend(call, query, key, value, attention)

    def mean(self) -> Tensor | None:
        """The mean over sites `[B, S, N]`; None when no site is coarse enough."""
        if not self.maps:
            return None
        self.last = self._latest
        return torch.stack(next(iter(self.maps.values()))).mean(0)


ForwardPass = Callable[[Tensor, MapRecorder], object]      # one forward pass of the positive prompts


class AttentionGuidance:
    """Moves latents so that every concept of a prompt gets attention. Use one instance per sampling.

    Args:
        subjects: One per latent of the batch. Latents with fewer than two concepts are not moved.
        strength: Factor on the step; 0 = off.
    """

    def __init__(self, subjects: Sequence[Subject], strength: float) -> None:
        self.subjects, self.strength = list(subjects), strength
        self._recorder: MapRecorder | None = None

    def acts(self, progress: float) -> bool:
        """Whether guidance acts at this share of the steps."""
        return self.strength > 0 and progress < UNTIL and any(map(self._is_guided, self.subjects))

    @staticmethod
    def _is_guided(subject: Subject) -> bool:
        return len(subject.concepts) > 1

    def _loss(self, maps: Tensor, subject: Subject, grid: tuple[int, int]) -> Tensor:
        if not self._is_guided(subject):
            return 0.0 * maps.sum()
        return _sum(guidance_losses(maps, subject, grid).values())

    @torch.inference_mode(False)
    def moved(self, latents: Tensor, evaluate: ForwardPass,
              inner: AttentionProcessor | None = None) -> Tensor:
        """Returns the latents after one step of guidance.

        Args:
            latents: `[B, C, h, w]` of unit variance, scaled for the UNet.
            evaluate: Runs the UNet with the latents and a processor.
            inner: The attention processor to wrap; None for none.
        """
        height, width = latents.shape[-2:]
        if self._recorder is None:
            self._recorder = MapRecorder(inner or AttentionProcessor(), (height, width))
        with torch.enable_grad():
            z = latents.detach().clone().requires_grad_()
            with suppress(_Recorded):
                evaluate(z, self._recorder)
            maps = self._recorder.mean()
            if maps is None:
                return latents
            grid = grid_of(maps.shape[1], height, width)
            losses = [self._loss(of_one, subject, grid)
                      for of_one, subject in zip(maps, self.subjects, strict=True)]
            gradient, = torch.autograd.grad(_sum(losses), z)
        self._recorder.maps = {}      # and with them the autograd graph
        size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
        loss = torch.stack([loss.detach() for loss in losses]).view(-1, 1, 1, 1)
        return latents - self.strength * STEP * (loss * gradient / size.clamp(min=1e-12)).to(latents)


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, losses)
