"""A small diffusion transformer with joint attention of text and picture, in the form of Flux.2.

Its weights have the names and shapes of ComfyUI's `Flux` with the options of Flux.2 Klein, so that ComfyUI's
class can run them. Double blocks have weights of their own for text and picture, single blocks share theirs.
Both attend in one softmax. No map has a bias, queries and keys are normalised per head, and one modulation by
the time serves all blocks of a kind.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .transformer import EPSILON, PATCH, attend

TIME_WIDTH, TIME_FACTOR = 256, 1000.0      # ComfyUI's
AXES = 4      # of positions: time, row, column, place in the text


def rotary_table(head_width: int, words: int, rows: int, columns: int, theta: float) -> tuple[Tensor, Tensor]:
    """Angles of the rotary positions (Su et al. 2021) of a text and a grid of patches.

    Every axis has a quarter of the head. A word is at its place in the text, a patch at its row and column.

    Args:
        head_width: Channels of one attention head.
        words: Rows of the text.
        rows, columns: Of the grid.
        theta: Base of the wavelengths.

    Returns:
        Cosines and sines, each `[words + rows * columns, head_width / 2]`.
    """
    width = head_width // AXES
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    places = torch.zeros(words + rows * columns, AXES, dtype=torch.float64)
    places[:words, 3] = torch.arange(words)
    places[words:, 1] = torch.arange(rows).repeat_interleave(columns)
    places[words:, 2] = torch.arange(columns).repeat(rows)
    angles = (places[:, :, None] * frequencies).flatten(1).float()
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates neighbouring channels of every head `[B, H, L, d]` by the angles of its place."""
    cosine, sine = (part.to(x.dtype) for part in table)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], -1).flatten(-2)


class Joint(NamedTuple):
    """What a joint attention reads: query, key and value `[B, H, L, d]` of text and picture, queries and keys
    normalised and without positions; the table of positions; the number of rows of the text."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: tuple[Tensor, Tensor]
    words: int

    def turned(self, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Query and key with the positions of a table."""
        return rotate(self.query, table), rotate(self.key, table)

    def plain(self, mask: Tensor | None = None) -> Tensor:
        """The attended rows, `[B, L, width]`. mask: A bias on the logits; None = all rows are read."""
        query, key = self.turned(self.table)
        return attend(query, key, self.value, mask).transpose(1, 2).flatten(2)


class Runner(Protocol):
    """Runs the projections and attentions of blocks."""

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        """The output of a projection of a block."""

    def attend(self, block: nn.Module, joint: Joint) -> Tensor:
        """The attended rows of text and picture, `[B, L, width]`."""


class Plain:
    """A runner that changes nothing."""

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def attend(self, block: nn.Module, joint: Joint) -> Tensor:
        return joint.plain()


PLAIN = Plain()


class _Gated(nn.Module):
    """SiLU of the first half of the channels, times the second half."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


class _Norms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(width, EPSILON), nn.RMSNorm(width, EPSILON)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        # RMSNorm is fused in float32 only
        return self.query_norm(query.float()).to(query.dtype), self.key_norm(key.float()).to(key.dtype)


class _Attention(nn.Module):
    """The projections of one stream of a double block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.norm = _Norms(width // heads)

    def projected(self, x: Tensor, run: Runner) -> tuple[Tensor, Tensor, Tensor]:
        return _heads(run.linear(self.qkv, x), self.heads, self.norm)


def _heads(qkv: Tensor, heads: int, norm: _Norms) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[B, H, N, d]`, normalised, of a fused output `[B, N, 3 * width]`."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return *norm(query, key), value


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * hidden, bias=False), _Gated(),
                         nn.Linear(hidden, width, bias=False))


class Modulation(nn.Module):
    """Shift, scale and gate by the time, `[B, 1, width]` each, once or twice."""

    def __init__(self, width: int, double: bool) -> None:
        super().__init__()
        self.count = 6 if double else 3
        self.lin = nn.Linear(width, self.count * width, bias=False)
        nn.init.zeros_(self.lin.weight)

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(time)).float().chunk(self.count, -1)


def _shifted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift


class DoubleBlock(nn.Module):
    """Joint attention and a feed-forward of each stream."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.img_attn, self.txt_attn = _Attention(width, heads), _Attention(width, heads)
        self.img_mlp, self.txt_mlp = _mlp(width, hidden), _mlp(width, hidden)

    def forward(self, img: Tensor, txt: Tensor, of_img: tuple[Tensor, ...], of_txt: tuple[Tensor, ...],
                table: tuple[Tensor, Tensor], run: Runner = PLAIN) -> tuple[Tensor, Tensor]:
        """img `[B, N, width]` and txt `[B, M, width]`; of_img, of_txt: the modulations of the streams."""
        words = txt.shape[1]
        parts = zip(self.txt_attn.projected(_shifted(txt, *of_txt[:2]), run),
                    self.img_attn.projected(_shifted(img, *of_img[:2]), run), strict=True)
        query, key, value = (torch.cat(pair, 2) for pair in parts)
        attended = run.attend(self, Joint(query, key, value, table, words))
        return (self._out(img, attended[:, words:], self.img_attn, self.img_mlp, of_img, run),
                self._out(txt, attended[:, :words], self.txt_attn, self.txt_mlp, of_txt, run))

    @staticmethod
    def _out(x: Tensor, attended: Tensor, attention: _Attention, mlp: nn.Sequential,
             modulation: tuple[Tensor, ...], run: Runner) -> Tensor:
        _, _, gate, shift, scale, second_gate = modulation
        x = torch.addcmul(x, gate, run.linear(attention.proj, attended).float())
        return torch.addcmul(x, second_gate, mlp(_shifted(x, shift, scale)).float())


class SingleBlock(nn.Module):
    """Joint attention beside a feed-forward, with shared projections of text and picture."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.linear1 = nn.Linear(width, 3 * width + 2 * hidden, bias=False)
        self.linear2 = nn.Linear(width + hidden, width, bias=False)
        self.norm, self.mlp_act = _Norms(width // heads), _Gated()

    def forward(self, x: Tensor, words: int, modulation: tuple[Tensor, ...], table: tuple[Tensor, Tensor],
                run: Runner = PLAIN) -> Tensor:
        """x: `[B, M + N, width]`, text and picture; words: M."""
        shift, scale, gate = modulation
        fused = run.linear(self.linear1, _shifted(x, shift, scale))
        qkv, hidden = fused.split([3 * self.width, fused.shape[-1] - 3 * self.width], -1)
        attended = run.attend(self, Joint(*_heads(qkv, self.heads, self.norm), table, words))
        out = run.linear(self.linear2, torch.cat([attended, self.mlp_act(hidden)], -1))
        return torch.addcmul(x, gate, out.float())


class _TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(TIME_WIDTH, width, bias=False)
        self.out_layer = nn.Linear(width, width, bias=False)

    def forward(self, times: Tensor) -> Tensor:
        half = TIME_WIDTH // 2
        places = torch.arange(half, device=times.device, dtype=torch.float32) / half
        angles = TIME_FACTOR * times.float()[:, None] * torch.exp(-math.log(10_000) * places)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.out_layer(F.silu(self.in_layer(waves)))[:, None]


class _FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs, bias=False)
        modulation = nn.Linear(width, 2 * width, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(modulation.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(_shifted(x, *self.adaLN_modulation(time).float().chunk(2, -1)))


class JointTransformer(nn.Module):
    """Predicts a velocity `[B, C, h, w]` from latents of that shape, times and text states.

    Args:
        in_channels: Of the latents.
        hidden_size: Width of the residual streams.
        depth, depth_single_blocks: Numbers of double and single blocks.
        num_heads: Of every block.
        context_in_dim: Width of the text states.
        mlp_ratio: Hidden channels of a feed-forward over `hidden_size`.
        theta: See `rotary_table`.
        patch_size: Side of the patches of latents; each patch is one row.
    """

    def __init__(self, in_channels: int, hidden_size: int, depth: int, depth_single_blocks: int,
                 num_heads: int, context_in_dim: int, mlp_ratio: float, theta: float,
                 patch_size: int = PATCH) -> None:
        super().__init__()
        width, hidden, area = hidden_size, int(hidden_size * mlp_ratio), patch_size**2
        self.patch, self.theta, self.heads, self.width = patch_size, theta, num_heads, width
        self.img_in = nn.Linear(in_channels * area, width, bias=False)
        self.txt_in = nn.Linear(context_in_dim, width, bias=False)
        self.time_in = _TimeEmbedding(width)
        self.double_stream_modulation_img = Modulation(width, double=True)
        self.double_stream_modulation_txt = Modulation(width, double=True)
        self.single_stream_modulation = Modulation(width, double=False)
        self.double_blocks = nn.ModuleList(DoubleBlock(width, num_heads, hidden) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleBlock(width, num_heads, hidden)
                                           for _ in range(depth_single_blocks))
        self.final_layer = _FinalLayer(width, in_channels * area)

    def forward(self, x: Tensor, times: Tensor, context: Tensor, run: Runner = PLAIN) -> Tensor:
        """Predicts the velocity.

        Args:
            x: `[B, C, h, w]`. Sides that are no multiples of a patch are padded as in ComfyUI.
            times: `[B]`, the share of noise.
            context: `[B, M, D]`.
            run: Runs projections and attentions of the blocks.

        Returns:
            `[B, C, h, w]`.
        """
        height, width = x.shape[2:]
        if height % self.patch or width % self.patch:
            x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch), mode="circular")
        rows, columns, words = x.shape[2] // self.patch, x.shape[3] // self.patch, context.shape[1]
        # unfold orders a patch as channel, row, column: ComfyUI's "(c ph pw)".
        img = self.img_in(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)).float()
        txt, time = self.txt_in(context).float(), self.time_in(times)
        cosine, sine = rotary_table(self.width // self.heads, words, rows, columns, self.theta)
        table = cosine.to(x.device), sine.to(x.device)
        of_img, of_txt = self.double_stream_modulation_img(time), self.double_stream_modulation_txt(time)
        for block in self.double_blocks:
            img, txt = block(img, txt, of_img, of_txt, table, run)
        both, modulation = torch.cat([txt, img], 1), self.single_stream_modulation(time)
        for block in self.single_blocks:
            both = block(both, words, modulation, table, run)
        out = self.final_layer(both[:, words:], time).transpose(1, 2)
        return F.fold(out, x.shape[2:], self.patch, stride=self.patch)[..., :height, :width]
