"""Metric encoders and bases of random numbers, saved as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

TOKENIZER = Path(__file__).resolve().parents[2] / "core" / "demo" / "assets" / "tokenizer"


@pytest.fixture(scope="session")
def tiny_clip():
    """tiny_clip(folder): a CLIP of pictures of 32 pixels and texts of 16 tokens, with its tokenizer; returns the folder."""
    from transformers import CLIPConfig, CLIPModel

    from continual_concepts.core.demo import vocabulary

    def save(folder: Path) -> Path:
        tokenizer = vocabulary.load(TOKENIZER)
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = small | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
        config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=24)
        with torch.random.fork_rng():
            torch.manual_seed(8)
            CLIPModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_dino():
    """tiny_dino(folder): a vision transformer in `dino_vits16`'s layout for pictures of 32 pixels; returns the folder."""
    from transformers import ViTConfig, ViTModel

    def save(folder: Path) -> Path:
        config = ViTConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
        with torch.random.fork_rng():
            torch.manual_seed(9)
            ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
        return folder

    return save
