"""CLIP and DINO as metric encoders of photos, with the definitions of CIDM's evaluation code.

Weights are only loaded from folders on disk. The papers use OpenAI's CLIP ViT-B/32
(`openai/clip-vit-base-patch32` in transformers' layout) and `dino_vits16` (`facebook/dino-vits16`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConceptError
from .metrics import unit

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer, ViTModel

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_MARGIN = 256 / 224      # DINO resizes pictures to this factor times the side of the crop
BATCH = 64


def preprocess(images: Tensor, resize: int, crop: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Prepares pictures for an encoder: bicubic resize, centre crop, normalisation.

    Args:
        images: `[B, 3, H, W]` in -1..1.
        resize: Length of the shorter side in pixels.
        crop: Side of the centre square in pixels.
        mean, std: Mean and standard deviation per channel, for pixels in 0..1.

    Returns:
        `[B, 3, crop, crop]`.
    """
    height, width = images.shape[-2:]
    size = (resize, int(resize * width / height))
    if height > width:
        size = (int(resize * height / width), resize)
    # clamped like 8-bit pictures, which the papers' code resizes
    if size != (height, width):
        images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    cut = (images[..., top:top + crop, left:left + crop] + 1) / 2
    return (cut - cut.new_tensor(mean).view(3, 1, 1)) / cut.new_tensor(std).view(3, 1, 1)


def _loaded(kind: Any, folder: Path, what: str, **options: Any) -> Any:
    """Loads a transformers model or tokenizer from a folder, without network access and without files that
    could execute code.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:      # transformers raises arbitrary exceptions for damaged folders
        raise ConceptError(f"the {what} in '{folder}' cannot be loaded ({type(error).__name__}: "
                           f"{str(error).splitlines()[0]}); needed are config.json and model.safetensors"
                           + (" and a tokenizer" if what == "CLIP" else "")) from error


def _model(kind: Any, folder: Path, what: str, device: torch.device | str, **options: Any) -> Any:
    if not folder.is_dir():
        raise ConceptError(f"the {what} folder '{folder}' does not exist; it must hold a {what} model in "
                           "transformers' layout")
    model, report = _loaded(kind, folder, what, use_safetensors=True, output_loading_info=True, **options)
    if report["missing_keys"]:      # transformers would use random weights instead
        raise ConceptError(f"the folder '{folder}' lacks weights of a {what} model, "
                           f"'{min(report['missing_keys'])}' among them; it must hold a {what} model in "
                           "transformers' layout")
    return model.to(device).float().eval().requires_grad_(False)


class ClipEncoder:
    """CLIP as a metric encoder (`evaluation.protocol.Encoder`) for IA, TA, MMD and confusion.

    model: transformers' CLIPModel; tokenizer: its CLIPTokenizer; dino: a ViTModel for comparing objects. CLIP
    compares objects without it, and always compares styles, and pictures with texts. Features are float32 on
    the CPU, of unit length.
    """

    reads_texts = True

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, dino: ViTModel | None = None) -> None:
        self.model, self.tokenizer, self.dino = model, tokenizer, dino

    @classmethod
    def load(cls, folder: Path | str, dino: Path | str | None = None,
             device: torch.device | str = "cpu") -> ClipEncoder:
        """Loads folders in transformers' layout. Raises ConceptError if one is missing, damaged or holds
        another kind of model.
        """
        from transformers import CLIPModel, CLIPTokenizer, ViTModel

        model = _model(CLIPModel, Path(folder), "CLIP", device)
        tokenizer = _loaded(CLIPTokenizer, Path(folder), "CLIP")
        vision = None
        if dino is not None:
            vision = _model(ViTModel, Path(dino), "DINO", device, add_pooling_layer=False)
        return cls(model, tokenizer, vision)

    def features(self, images: Tensor, kind: str) -> Tensor:
        """Features `[B, D]` of pictures `[B, 3, H, W]` in -1..1, for comparing pictures of one kind (object
        or style).
        """
        if self.dino is not None and kind == "object":
            return _dino_features(self.dino, images)
        return self.image_text_features(images)

    @torch.no_grad()
    def image_text_features(self, images: Tensor) -> Tensor:
        """Features `[B, D]` of pictures `[B, 3, H, W]` in -1..1, in the space of `caption_features`."""
        side = self.model.config.vision_config.image_size

        def encode(chunk: Tensor) -> Tensor:
            pixels = preprocess(chunk, side, side, CLIP_MEAN, CLIP_STD)
            return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

        return _in_batches(images, encode, self.model)

    @torch.no_grad()
    def caption_features(self, captions: Sequence[str]) -> Tensor:
        """Features `[B, D]` of texts without a prefix, truncated at CLIP's length."""
        length = self.model.config.text_config.max_position_embeddings
        rows = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=length,
                              return_tensors="pt")

        def encode(ids: Tensor) -> Tensor:
            return self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)

        return _in_batches(rows.input_ids, encode, self.model)


@torch.no_grad()
def _dino_features(dino: ViTModel, images: Tensor) -> Tensor:
    """The class token after the last norm, `[B, D]`, as in `dino_vits16`."""
    side = dino.config.image_size

    def encode(chunk: Tensor) -> Tensor:
        pixels = preprocess(chunk, round(side * DINO_MARGIN), side, IMAGENET_MEAN, IMAGENET_STD)
        return dino(pixel_values=pixels).last_hidden_state[:, 0]

    return _in_batches(images, encode, dino)


def _in_batches(rows: Tensor, encode: Callable[[Tensor], Tensor], model: nn.Module) -> Tensor:
    """Encodes rows in batches on the model's device. Returns unit vectors on the CPU."""
    device = next(model.parameters()).device
    return unit(torch.cat([encode(chunk.to(device)).float().cpu() for chunk in rows.split(BATCH)]))
