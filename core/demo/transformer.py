"""A small diffusion transformer with cross-attention, in the form of Cosmos-Predict2 and Anima.

Its weights have the names and shapes of ComfyUI's `MiniTrainDIT`, so that ComfyUI's class can run them. No
map has a bias. Queries and keys are normalised per head. Self-attention alone has rotary positions. The time
modulates each block through a low-rank map. Text enters at `blocks.N.cross_attn` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6
ROPE_THETA = 10_000.0
PATCH = 2


def rotary_table(head_width: int, rows: int, columns: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Angles of the rotary positions (Su et al. 2021) on a grid of patches.

    The frequencies are in the order time, row, column. A still picture is at time 0, so its first angles
    are 0.

    Args:
        head_width: channels of one attention head.
        rows, columns: of the grid.
        ratio: ComfyUI's `rope_h_extrapolation_ratio`; below 1 it shortens the wavelengths for a small grid.

    Returns:
        Cosines and sines, each `[rows * columns, head_width / 2]`.
    """
    spatial = head_width // 6 * 2
    theta = ROPE_THETA * ratio ** (spatial / (spatial - 2))
    frequencies = theta ** -(torch.arange(0, spatial, 2, dtype=torch.float32) / spatial)
    down = torch.outer(torch.arange(rows, dtype=torch.float32), frequencies)
    right = torch.outer(torch.arange(columns, dtype=torch.float32), frequencies)
    time = torch.zeros(rows, columns, head_width // 2 - 2 * len(frequencies))
    spread = [time, down[:, None].expand(-1, columns, -1), right[None].expand(rows, -1, -1)]
    angles = torch.cat(spread, dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the two halves of every head `[B, H, N, d]` by the angles of its place."""
    cosine, sine = (part.to(x.dtype) for part in table)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of `[B, H, N, d]`. On a CPU it is faster than the fused kernel at these sizes.

    bias: Added to the logits; None = nothing.
    """
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (logits if bias is None else logits + bias).softmax(-1) @ value


class Attention(nn.Module):
    """Multi-head attention to the picture itself, or to text states where `context_width` is given."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.n_heads, self.head_dim = heads, width // heads
        self.is_selfattn = context_width is None
        source = width if context_width is None else context_width
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(source, width, bias=False)
        self.v_proj = nn.Linear(source, width, bias=False)
        self.output_proj = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim, EPSILON), nn.RMSNorm(self.head_dim, EPSILON)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention with concatenated heads: query `[B, N, width]`, key and value `[B, L, width]` to
        `[B, N, width]`.
        """
        return attend(*map(self._heads, (query, key, value))).transpose(1, 2).flatten(2)

    def projected(self, x: Tensor, source: Tensor,
                  table: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Query of x and key and value of source, each `[B, H, N, d]`, normalised and rotated."""
        query = self.q_norm(self._heads(self.q_proj(x)).float())  # RMSNorm is fused in float32 only
        key = self.k_norm(self._heads(self.k_proj(source)).float())
        value = self._heads(self.v_proj(source))
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        return query.to(value.dtype), key.to(value.dtype), value

    def forward(self, x: Tensor, context: Tensor | None = None,
                table: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: `[B, N, width]`; context: `[B, L, context_width]`; table: see `rotary_table`."""
        heads = attend(*self.projected(x, x if context is None else context, table))
        return self.output_proj(heads.transpose(1, 2).flatten(2))


# Runs an attention layer: arguments and result of `Attention.forward`, with the layer in front.
RunAttention = Callable[[Attention, Tensor, Tensor | None, tuple[Tensor, Tensor] | None], Tensor]


class FeedForward(nn.Module):
    """Two linear maps around GELU, `[B, N, width]` to the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(F.gelu(self.layer1(x)))


def _modulation(width: int, rank: int, chunks: int) -> nn.Sequential:
    down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, chunks * width, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(nn.SiLU(), down, up)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each shifted, scaled and gated by the time."""

    def __init__(self, width: int, heads: int, context_width: int, rank: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads, context_width)
        self.mlp = FeedForward(width, 4 * width)
        self.adaln_modulation_self_attn = _modulation(width, rank, 3)
        self.adaln_modulation_cross_attn = _modulation(width, rank, 3)
        self.adaln_modulation_mlp = _modulation(width, rank, 3)

    def forward(self, x: Tensor, time: Tensor, shared: Tensor, context: Tensor,
                table: tuple[Tensor, Tensor], run: RunAttention = Attention.__call__) -> Tensor:
        """x: `[B, N, width]`; time: `[B, 1, width]`; shared: `[B, 1, 3 * width]`, part of all modulations."""
        branches = (
            (self.adaln_modulation_self_attn, lambda y: run(self.self_attn, y, None, table)),
            (self.adaln_modulation_cross_attn, lambda y: run(self.cross_attn, y, context, None)),
            (self.adaln_modulation_mlp, self.mlp),
        )
        for modulation, branch in branches:
            shift, scale, gate = (modulation(time) + shared).float().chunk(3, dim=-1)
            normed = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
            x = torch.addcmul(x, gate, branch(normed * (1 + scale) + shift).float())
        return x


class _TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, waves: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(waves)))


class _FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs, bias=False)
        self.adaln_modulation = _modulation(width, rank, 2)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, time: Tensor, shared: Tensor) -> Tensor:
        shift, scale = (self.adaln_modulation(time) + shared[..., : 2 * x.shape[-1]]).float().chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift)


class DiffusionTransformer(nn.Module):
    """Predicts a velocity `[B, C, h, w]` from latents of that shape, times and text states.

    Args:
        in_channels: of the latents.
        model_channels: width of the residual stream.
        num_blocks, num_heads: of the transformer.
        crossattn_emb_channels: width of the text states.
        adaln_lora_dim: rank of the modulations.
        rope_ratio: see `rotary_table`.
        patch_spatial: side of the patches of latents; each patch is one token.
    """

    def __init__(self, in_channels: int, model_channels: int, num_blocks: int, num_heads: int,
                 crossattn_emb_channels: int, adaln_lora_dim: int, rope_ratio: float,
                 patch_spatial: int = PATCH) -> None:
        super().__init__()
        width, self.patch, self.rope_ratio = model_channels, patch_spatial, rope_ratio
        self.head_dim, area = width // num_heads, patch_spatial**2
        # The further input channel is ComfyUI's padding mask; it is zero for a picture without padding.
        embed = nn.Linear((in_channels + 1) * area, width, bias=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.ModuleList([nn.Identity(), embed])})
        self.t_embedder = nn.ModuleList([nn.Identity(), _TimeEmbedding(width)])
        self.t_embedding_norm = nn.RMSNorm(width, EPSILON)
        self.blocks = nn.ModuleList(Block(width, num_heads, crossattn_emb_channels, adaln_lora_dim)
                                    for _ in range(num_blocks))
        self.final_layer = _FinalLayer(width, in_channels * area, adaln_lora_dim)

    def _waves(self, times: Tensor) -> Tensor:
        half = self.t_embedding_norm.weight.shape[0] // 2
        places = torch.arange(half, device=times.device, dtype=torch.float32) / half
        angles = times.float()[:, None, None] * torch.exp(-math.log(10_000) * places)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, x: Tensor, times: Tensor, context: Tensor,
                run: RunAttention = Attention.__call__) -> Tensor:
        """Predicts the velocity.

        Args:
            x: `[B, C, h, w]`. Sides that are no multiples of a patch are padded as in ComfyUI.
            times: `[B]`, ComfyUI's `timestep(sigma)`.
            context: `[B, L, D]`.
            run: Runs every attention layer.

        Returns:
            `[B, C, h, w]`.
        """
        height, width = x.shape[2:]
        if height % self.patch or width % self.patch:
            x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch), mode="circular")
        masked = F.pad(x, (0, 0, 0, 0, 0, 1))
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        # unfold orders a patch as channel, row, column: ComfyUI's "(c r m n)".
        places = F.unfold(masked, self.patch, stride=self.patch).transpose(1, 2)
        waves = self._waves(times)
        shared, time = self.t_embedder[1](waves), self.t_embedding_norm(waves)
        cosine, sine = rotary_table(self.head_dim, rows, columns, self.rope_ratio)
        table = cosine.to(x.device), sine.to(x.device)
        hidden = self.get_submodule("x_embedder.proj.1")(places).float()
        for block in self.blocks:
            hidden = block(hidden, time, shared, context, table, run)
        out = self.final_layer(hidden, time, shared)
        # ComfyUI's "(p1 p2 t C)": channels run fastest.
        out = out.unflatten(-1, (self.patch, self.patch, -1)).permute(0, 4, 2, 3, 1).flatten(1, 3)
        return F.fold(out, x.shape[2:], self.patch, stride=self.patch)[..., :height, :width]
