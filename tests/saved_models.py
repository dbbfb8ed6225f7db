"""Fixtures that save models of random numbers in the layouts that people have them in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_clip():
    """tiny_clip(folder): a CLIP of pictures of 32 pixels and texts of 16 tokens, with its tokenizer.

    Returns the folder.
    """
    from transformers import CLIPConfig, CLIPModel

    from continual_concepts.core.demo import vocabulary

    def save(folder: Path) -> Path:
        tokenizer = vocabulary.load(ROOT / "core" / "demo" / "assets" / "tokenizer")
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id}
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = small | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
        config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8},
                            projection_dim=24)
        with torch.random.fork_rng():
            torch.manual_seed(8)
            CLIPModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_dino():
    """tiny_dino(folder): a vision transformer in `dino_vits16`'s layout for pictures of 32 pixels.

    Returns the folder.
    """
    from transformers import ViTConfig, ViTModel

    def save(folder: Path) -> Path:
        config = ViTConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                           image_size=32, patch_size=8)
        with torch.random.fork_rng():
            torch.manual_seed(9)
            ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def other_base(tmp_path_factory) -> Path:
    """The file of an embedded base of random numbers.

    It has attention on all levels, the second one is wider by a third, and a latent has six channels for
    8x8 pixels.
    """
    from continual_concepts.core.demo import base, networks

    unet = networks.UNET | {
        "sample_size": 4, "in_channels": 6, "out_channels": 6, "block_out_channels": (24, 32, 32),
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}
    vae = {"latent_channels": 6, "encoder_widths": (8, 8), "encoder_blocks": 1, "decoder_widths": (8, 8, 8),
           "decoder_blocks": (1, 1, 1)}
    sizes = base.SIZES | {"unet": unet, "vae": vae, "picture_size": 32}
    file = tmp_path_factory.mktemp("other") / "base.safetensors"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(10)
        modules = base.build_modules(sizes)
        for parameter in modules["vae"].parameters():      # some of them start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    base.save_base(modules, file, {"steps": 1}, sizes, packed=True)
    return file


def _flow_base(folder: Path, other_base: Path, kind: str, multiplier: float, **shape) -> Path:
    """The file of a tiny transformer of random numbers, packed as the real ones."""
    from continual_concepts.core.demo import base

    sizes = {kind: {"in_channels": 6, **shape}, "vae": base.read_sizes(other_base)["vae"],
             "text_encoder": base.SIZES["text_encoder"], "picture_size": 32,
             "schedule": {"kind": "flow", "shift": 2.0, "multiplier": multiplier}}
    file = folder / "base.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(12)
        modules = base.build_modules(sizes)
        for parameter in modules[kind].parameters():      # some of them start at zero
            parameter.data += 0.1 * torch.randn_like(parameter)
    base.save_base(modules, file, {"steps": 1}, sizes, packed=True)
    return file


@pytest.fixture(scope="session")
def transformer_base(tmp_path_factory, other_base) -> Path:
    """The file of a tiny transformer with cross-attention."""
    return _flow_base(tmp_path_factory.mktemp("transformer"), other_base, "transformer", 1000.0,
                      model_channels=48, num_blocks=2, num_heads=2, crossattn_emb_channels=128,
                      adaln_lora_dim=8, rope_ratio=0.0125)


@pytest.fixture(scope="session")
def joint_base(tmp_path_factory, other_base) -> Path:
    """The same of a transformer with joint attention."""
    return _flow_base(tmp_path_factory.mktemp("joint"), other_base, "joint", 1.0, hidden_size=64, depth=2,
                      depth_single_blocks=2, num_heads=2, context_in_dim=128, mlp_ratio=2.0, theta=50.0)


@pytest.fixture(scope="session")
def tiny_base():
    """tiny_base(folder): Stable Diffusion 1's structure in diffusers' layout, pictures of 32 pixels.

    Returns the folder.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from continual_concepts.core.demo import vocabulary

    def save(folder: Path) -> Path:
        tokenizer = vocabulary.load(ROOT / "core" / "demo" / "assets" / "tokenizer")
        text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
                              num_hidden_layers=2, num_attention_heads=2,
                              bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                              pad_token_id=tokenizer.pad_token_id)
        with torch.random.fork_rng():
            torch.manual_seed(10)
            unet = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
                                        attention_head_dim=2, cross_attention_dim=32,
                                        down_block_types=("CrossAttnDownBlock2D",) * 2,
                                        up_block_types=("CrossAttnUpBlock2D",) * 2)
            vae = AutoencoderKL(block_out_channels=(32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
                                up_block_types=("UpDecoderBlock2D",) * 3)
            parts = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer,
                     "scheduler": DDPMScheduler(beta_start=0.00085, beta_end=0.012,
                                                beta_schedule="scaled_linear")}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
        return folder

    return save


@pytest.fixture
def site_output():
    """A function that runs one site with an attention processor and gives the site's output."""
    from continual_concepts.core.hosts.diffusers import multi_head
    from continual_concepts.core.model.processor import HostAttention, SiteCall

    def run(backbone, processor, site, x, text, enters=False, replaced=None):
        call = SiteCall(processor, site, x, text, text)
        if enters:
            call.enter()
        text = text if call.reads_text else text[:, :0]
        inputs = ("to_q", call.hidden), ("to_k", text), ("to_v", text)
        attention = HostAttention(lambda *qkv: multi_head(*qkv, site.heads), replaced)
        attended = call.attend(*(call.project(name, backbone.project(site, name, of)) for name, of in inputs),
                               attention)
        return call.finish(backbone.project(site, "to_out", attended))

    return run
