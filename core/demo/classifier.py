"""An independent classifier of the kind and body colour of the single thing in a drawn scene.

It shares neither weights nor training pictures with the metric encoder, so that their errors are independent.
"""

from __future__ import annotations

from torch import Tensor, nn

from .encoder import AttentionPool, Mixer, StoredModule, convolution
from .scenes import KINDS, PALETTE

COLOURS = tuple(PALETTE)
DEFAULT = {"channels": [20, 40, 64], "looks": 8, "hidden": 64}


class QualityClassifier(StoredModule):
    """Pictures `[B, 3, 64, 64]` in -1..1 to logits over KINDS `[B, 8]` and over COLOURS `[B, 10]`."""

    def __init__(self, config: dict | None = None) -> None:
        super().__init__({**DEFAULT, **(config or {})})
        first, second, third = self.config["channels"]
        self.trunk = nn.Sequential(convolution(3, first), convolution(first, second),
                                   convolution(second, third), Mixer(third))
        self.pool = AttentionPool(third, self.config["looks"])
        width, hidden = 2 * third + 2 * self.config["looks"], self.config["hidden"]
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(),
                                    nn.Linear(hidden, len(KINDS) + len(COLOURS)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.output(self.pool(self.trunk(images))).float()
        return logits[:, : len(KINDS)], logits[:, len(KINDS) :]

    def name(self, images: Tensor) -> list[tuple[str, str]]:
        """The most likely kind and body colour of each picture, as words."""
        kinds, colours = self(images)
        return [(KINDS[k], COLOURS[c])
                for k, c in zip(kinds.argmax(1).tolist(), colours.argmax(1).tolist(), strict=True)]
