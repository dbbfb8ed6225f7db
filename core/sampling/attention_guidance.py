"""Attention artists: several concepts named by one prompt, each made to show, by gradients on the latent. No regions needed.

L2DM (Sun et al., arXiv 2309.04430, Fig. 2) has two at inference: the concept attention artist (losses L_DAL and L_CLUL) and the orthogonal
attention artist (L_OAA), computed on cross-attention maps; the latent follows `z_t' = z_t - s_t grad` before the usual step.

The paper's formulas could not be read. Ours is the reading of the Attend-and-Excite family (Chefer et al., SIGGRAPH 2023), from which come
the grid of a quarter of the latent's sides and a slight blur of the maps. They work in the first quarter of the steps (that family:
the first half), where the layout is decided; on the embedded base fewer pictures showed both concepts when they went on. The losses:
    L_DAL  = mean over the concepts' words of 1 - max over cells of the word's attention
    L_CLUL = mean over pairs of concepts of the cosine of their nouns' maps
    L_OAA  = mean over concepts of the share of the identifier's attention that lies outside its noun's mask
The noun is a concept's last word, the identifier its first. A mask holds the cells where the noun's map is above half its maximum and above
the other nouns' maps. Attention is divided among the prompt's own tokens, begin, end and padding left out. The step s_t is relative: it
moves the latent by `strength * STEP * loss` per element (root mean square), so that one strength fits any base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.maps import FINEST, attention_maps
from ..model.backbone import AttentionProcessor, Context, HostAttention, SiteCall
from ..model.sites import Site, grid_of

STEP = 0.05      # latent per step at strength 1 and loss 1, for latents of about unit variance
BLUR = (0.107, 0.787, 0.107)      # of the maps, along each side: a Gaussian of half a cell
UNTIL = 0.25     # share of the steps in which the artists work


@dataclass(frozen=True)
class Subject:
    """Where a prompt's words are: concepts: the token positions of every named concept's words, in order; text: of all its own tokens."""

    concepts: tuple[tuple[int, ...], ...]
    text: tuple[int, ...]


def word_maps(maps: Tensor, text: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """`[N, S]`: attention `[S, N]` of every cell over all tokens, divided among the tokens `text` alone, blurred; 0 for other tokens."""
    own = maps.new_zeros(maps.shape[1]).index_fill(0, torch.tensor(text, device=maps.device), 1.0)
    shared = maps * own / (maps * own).sum(1, keepdim=True).clamp(min=1e-8)
    line = maps.new_tensor(BLUR)
    drawn = F.pad(shared.T.reshape(-1, 1, *grid), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(drawn, torch.outer(line, line).view(1, 1, 3, 3)).flatten(1)


def artist_losses(maps: Tensor, subject: Subject, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The three losses of one prompt with two concepts or more, each 0 to 1.

    maps `[S, N]`: attention of every cell over all tokens, with gradient; grid: rows and columns that the S cells are.
    """
    shared = word_maps(maps, subject.text, grid)
    words = shared[[position for concept in subject.concepts for position in concept]]
    nouns, identifiers = (shared[[concept[i] for concept in subject.concepts]] for i in (-1, 0))
    return {"DAL": (1 - words.amax(1)).mean(), "CLUL": _overlap(nouns), "OAA": _outside(identifiers, noun_masks(nouns.detach()))}


def _overlap(nouns: Tensor) -> Tensor:
    unit = F.normalize(nouns, dim=1)
    first, second = torch.triu_indices(len(nouns), len(nouns), 1).to(nouns.device)
    return (unit[first] * unit[second]).sum(1).mean()


def noun_masks(nouns: Tensor) -> Tensor:
    """`[U, S]` of 0 and 1: cells where a noun's map `[U, S]` is above half its maximum and no other noun's is higher."""
    return ((nouns > 0.5 * nouns.amax(1, keepdim=True)) & (nouns == nouns.amax(0, keepdim=True))).to(nouns)


def _outside(identifiers: Tensor, masks: Tensor) -> Tensor:
    return (1 - (identifiers * masks).sum(1) / identifiers.sum(1).clamp(min=1e-8)).mean()


class _Enough(Exception):      # noqa: N818 - it is no error
    """All maps are there: what the rest of the net would do is not needed."""


class MapRecorder(AttentionProcessor):
    """Another program that keeps, with gradient, the maps of one grid: the finest of at most `most` cells. Once a whole pass has shown
    which sites have it, passes end at the last of them."""

    def __init__(self, inner: AttentionProcessor, most: int) -> None:
        self.inner, self.most = inner, most
        self.maps: dict[int, list[Tensor]] = {}
        self.last = self._seen = -1      # the last site of that grid; the last one seen

    def prepare(self, context: Context) -> None:
        self.inner.prepare(context)
        self.maps = {}

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        return self.inner.project(site, projection, x, y)

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
        site, cells = call.site, query.shape[1]
        if cells <= self.most and cells >= max(self.maps, default=0):
            if cells not in self.maps:
                self.maps = {cells: []}      # coarser ones are let go
            self.maps[cells].append(attention_maps(query.float(), key.float(), site.heads))
            if site.index == self.last:
                raise _Enough
            self._seen = site.index
        return self.inner.attend(call, query, key, value, attention)

    def mean(self) -> Tensor | None:
        """`[B, S, N]`, the mean over sites; None when no site is coarse enough."""
        if not self.maps:
            return None
        self.last = self._seen
        return torch.stack(next(iter(self.maps.values()))).mean(0)


Look = Callable[[Tensor, AttentionProcessor], object]


class Artists:
    """Moves latents so that every concept of their prompts gets attention of its own. One instance per sampling.

    subjects: one per latent of the batch; latents with fewer than two concepts stay as they are; strength: factor on the step.
    """

    def __init__(self, subjects: Sequence[Subject], strength: float) -> None:
        self.subjects, self.strength = list(subjects), strength
        self._recorder: MapRecorder | None = None

    def works(self, progress: float) -> bool:
        """Whether there is something to do at this share of the steps."""
        return self.strength > 0 and progress < UNTIL and any(len(subject.concepts) > 1 for subject in self.subjects)

    @torch.inference_mode(False)
    def moved(self, latents: Tensor, look: Look, inner: AttentionProcessor | None = None) -> Tensor:
        """Latents `[B, C, h, w]` after one step, of unit variance as the UNet reads them. look(latents, program) is one forward pass with
        the positive prompts; inner: what sites do anyway."""
        height, width = latents.shape[-2:]
        if self._recorder is None:
            self._recorder = MapRecorder(inner or AttentionProcessor(), max(FINEST, height * width // 16))
        with torch.enable_grad():
            z = latents.detach().clone().requires_grad_()
            with suppress(_Enough):
                look(z, self._recorder)
            maps = self._recorder.mean()
            if maps is None:
                return latents
            grid = grid_of(maps.shape[1], height, width)
            losses = [sum(artist_losses(m, subject, grid).values()) if len(subject.concepts) > 1 else 0.0 * m.sum()
                      for m, subject in zip(maps, self.subjects, strict=True)]
            gradient, = torch.autograd.grad(sum(losses), z)
        self._recorder.maps = {}      # and with them the graph
        size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
        loss = torch.stack([value.detach() for value in losses]).view(-1, 1, 1, 1)
        return latents - self.strength * STEP * (loss * gradient / size.clamp(min=1e-12)).to(latents)
