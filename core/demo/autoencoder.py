"""The autoencoder of the 128-pixel bases: a linear code of patches, refined by small networks."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn import functional as F

FOLD = 4  # side of the pixel blocks that the encoder's network starts from


class Residual(nn.Module):
    """Two 3x3 convolutions beside an identity, `[B, C, H, W]` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def zero_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution whose output is zero before training (Zhang et al. 2023)."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution


def _encoder_net(latent_channels: int, widths: tuple[int, int], blocks: int) -> nn.Sequential:
    fine, coarse = widths
    return nn.Sequential(
        nn.PixelUnshuffle(FOLD),
        nn.Conv2d(3 * FOLD * FOLD, fine, 3, padding=1),
        *(Residual(fine) for _ in range(blocks)),
        nn.Conv2d(fine, coarse, 4, stride=2, padding=1),
        *(Residual(coarse) for _ in range(blocks)),
        nn.SiLU(),
        zero_convolution(coarse, latent_channels),
    )


def _decoder_net(latent_channels: int, widths: tuple[int, int, int],
                 blocks: tuple[int, int, int]) -> nn.Sequential:
    coarse, middle, fine = widths
    return nn.Sequential(
        nn.Conv2d(latent_channels, coarse, 3, padding=1),
        *(Residual(coarse) for _ in range(blocks[0])),
        nn.Conv2d(coarse, 4 * middle, 3, padding=1),
        nn.PixelShuffle(2),
        *(Residual(middle) for _ in range(blocks[1])),
        nn.Conv2d(middle, 4 * fine, 3, padding=1),
        nn.PixelShuffle(2),
        *(Residual(fine) for _ in range(blocks[2])),
        nn.SiLU(),
        zero_convolution(fine, 12),
        nn.PixelShuffle(2),
    )


class SceneAutoencoder(nn.Module):
    """Pictures `[B, 3, H, W]` in -1..1 to latents `[B, C, H/8, W/8]` and back.

    Both ways are a linear map of 8x8 patches plus a correction by a small network. The linear code holds the
    leading principal directions. Its latents are a thumbnail with detail channels, which a small diffusion
    model learns sooner than a learned code. It has the interface of diffusers' AutoencoderKL as far as a
    backbone uses it.
    """

    def __init__(self, latent_channels: int, encoder_widths: tuple[int, int], encoder_blocks: int,
                 decoder_widths: tuple[int, int, int], decoder_blocks: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = 2 * FOLD
        self.encoder = nn.Conv2d(3, latent_channels, self.patch, stride=self.patch)
        self.refine = _encoder_net(latent_channels, encoder_widths, encoder_blocks)
        self.linear = nn.Conv2d(latent_channels, 3 * self.patch**2, 1)
        self.detail = _decoder_net(latent_channels, decoder_widths, decoder_blocks)
        levels = (decoder_widths[0],) * self.patch.bit_length()  # one more than halvings, as diffusers counts
        self.config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0, latent_channels=latent_channels,
                                      block_out_channels=levels)

    def encode(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=self.encoder(images) + self.refine(images)))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        plain = F.pixel_shuffle(self.linear(latents), self.patch)
        return SimpleNamespace(sample=plain + self.detail(latents))
