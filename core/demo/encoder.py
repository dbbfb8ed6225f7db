"""The metric encoder for drawn scenes. Its features identify individual, drawing style and caption.

It replaces DINO and CLIP, which are made for photos. It only works for drawn scenes of 64×64 pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .bases import whole

DEFAULT = {
    "channels": [24, 48, 96],
    "looks": 8,
    "hidden": 96,
    "object_width": 64,
    "style_width": 32,
    "text_width": 64,
    "token_width": 44,
    "context": 77,
}


class StoredModule(nn.Module):
    """A module built from one dict of JSON values and stored in one safetensors file, in fp16."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = dict(config)

    def save(self, path: str | Path) -> None:
        # Inference does not need the step counters of the batch norms.
        tensors = {name: value.detach().half().contiguous() for name, value in self.state_dict().items()
                   if value.is_floating_point()}
        save_file(tensors, str(path), metadata={"config": json.dumps(self.config)})

    @classmethod
    def load(cls, path: str | Path):
        """Loads the stored module in eval mode with frozen parameters."""
        with whole(path), safe_open(str(path), "pt") as file:
            module = cls(json.loads(file.metadata()["config"]))
            module.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
        return module.eval().requires_grad_(False)


def convolution(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
                         nn.ReLU(inplace=True))


class Mixer(nn.Module):
    """Residual depthwise 5×5 and pointwise convolution: a large receptive field with few parameters, `[B, C,
    H, W]`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 5, 1, 2, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class AttentionPool(nn.Module):
    """Pools `[B, C, H, W]` to `[B, 2C + 2 maps]` with learned attention maps.

    The result holds the mean of each channel group weighted by its map, the maximum of each channel, and the
    centre of each map. A plain mean would mix the colours of object and background.
    """

    def __init__(self, channels: int, maps: int) -> None:
        super().__init__()
        self.attention = nn.Conv2d(channels, maps, 1)
        self.value = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attention(x).flatten(2).float().softmax(-1)  # [B, K, HW]
        values = self.value(x).flatten(2).unflatten(1, (weights.shape[1], -1)).float()  # [B, K, C/K, HW]
        pooled = torch.einsum("bkn,bkcn->bkc", weights, values).flatten(1)
        rows, columns = (torch.linspace(-1, 1, n, device=x.device) for n in x.shape[2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)  # [2, HW]
        return torch.cat([pooled, x.float().amax((2, 3)), (weights @ grid.T).flatten(1)], dim=1)


class TextTower(nn.Module):
    """Caption ids `[B, 77]` to `[B, D]`.

    The convolution links each colour word to its noun; the attention layer links phrases.
    """

    def __init__(self, vocabulary: int, end: int, context: int, width: int, outputs: int) -> None:
        super().__init__()
        self.end = end
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.neighbours = nn.Conv1d(width, width, 3, padding=1)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, activation="gelu",
                                                batch_first=True, norm_first=True)
        self.output = nn.Linear(2 * width, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        ended = ids == self.end
        # up to and including the first end token, which is also the padding
        real = (ended.cumsum(1) - ended.long()) == 0
        length = int(real.sum(1).max())
        ids, real = ids[:, :length], real[:, :length]
        x = (self.token(ids) + self.position[:length]) * real[..., None]
        x = x + F.gelu(self.neighbours(x.transpose(1, 2)).transpose(1, 2))
        x = self.layer(x, src_key_padding_mask=~real).float()
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return self.output(torch.cat([mean, x.masked_fill(~real[..., None], -1e4).amax(1)], dim=1))


def head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, hidden), nn.GELU(),
                         nn.Linear(hidden, outputs))


class MetricEncoder(StoredModule):
    """Features of pictures `[B, 3, 64, 64]` in -1..1, all of unit length, so that a dot product is a cosine.

    `config` holds at least `vocabulary` (number of tokens) and `end` (id of the end token); the rest falls
    back to DEFAULT.
    """

    def __init__(self, config: dict) -> None:
        super().__init__({**DEFAULT, **config})
        c = self.config
        first, second, third = c["channels"]
        self.stem, self.middle = convolution(3, first), convolution(first, second)
        self.deep = nn.Sequential(convolution(second, third), Mixer(third), Mixer(third))
        self.pool = AttentionPool(third, c["looks"])
        self.pooled_width, self.texture_width = 2 * third + 2 * c["looks"], 2 * (first + second) + third
        self.object_head = head(self.pooled_width, c["hidden"], c["object_width"])
        self.style_head = head(self.texture_width, c["hidden"] // 2, c["style_width"])
        self.picture_head = head(self.pooled_width, c["hidden"], c["text_width"])
        self.text_tower = TextTower(c["vocabulary"], c["end"], c["context"], c["token_width"],
                                    c["text_width"])

    def pooled_and_texture(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled content `[B, pooled_width]` and texture statistics `[B, texture_width]`, for the heads."""
        fine = self.stem(images)
        middle = self.middle(fine)
        deep = self.deep(middle)
        # Mean and spread of shallow channels describe the drawing style independently of the content (Gatys
        # et al., 2016).
        parts = [moment for x in (fine.float(), middle.float())
                 for moment in (x.mean((2, 3)), x.flatten(2).std(-1))]
        return self.pool(deep), torch.cat([*parts, deep.float().mean((2, 3))], dim=1)

    def object_features(self, images: Tensor) -> Tensor:
        """Features of the individual, `[B, object_width]`.

        They do not depend on background and pose.
        """
        return F.normalize(self.object_head(self.pooled_and_texture(images)[0]).float(), dim=1)

    def style_features(self, images: Tensor) -> Tensor:
        """Features of the drawing style, `[B, style_width]`."""
        return F.normalize(self.style_head(self.pooled_and_texture(images)[1]).float(), dim=1)

    def image_text_features(self, images: Tensor) -> Tensor:
        """Features of the content, `[B, text_width]`, for comparing with `text_features`."""
        return F.normalize(self.picture_head(self.pooled_and_texture(images)[0]).float(), dim=1)

    def text_features(self, token_ids: Tensor) -> Tensor:
        """Features `[B, text_width]` of captions `[B, 77]` from the base's tokenizer."""
        return F.normalize(self.text_tower(token_ids).float(), dim=1)
