"""Flux.1 and Chroma with random weights and reduced sizes, and their CLIPs, of ComfyUI's own classes."""

from __future__ import annotations

import torch

from .make_transformer import filled

TEXT, POOLED = 64, 32      # widths of the reduced encoders
FLUX = {"in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": TEXT,
        "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True}
CHROMA = FLUX | {
    "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 256, "hidden_dim": 64, "n_layers": 1,
    "txt_ids_dims": [], "vec_in_dim": None}


def flux_model(dtype: torch.dtype = torch.float32, distilled: bool = True, **sizes):
    """A MODEL as the node Load Diffusion Model gives it."""
    import comfy.ldm.flux.model as flux
    import comfy.ops
    import comfy.sd

    with torch.device("meta"):
        shapes = flux.Flux(**FLUX | {"guidance_embed": distilled, "txt_ids_dims": []} | sizes, dtype=dtype,
                           device="meta", operations=comfy.ops.disable_weight_init)
    return comfy.sd.load_diffusion_model_state_dict(filled(shapes, dtype), {"dtype": dtype})


def chroma_model(dtype: torch.dtype = torch.float32):
    """A MODEL of reduced sizes, which the host's loader does not read from a file."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.Chroma({"image_model": "chroma", "dtype": dtype, **CHROMA})
    device = torch.device("cpu")
    model = config.get_model({}, device=device)
    model.diffusion_model.load_state_dict(filled(model.diffusion_model, dtype))
    return comfy.model_patcher.ModelPatcher(model, device, device)


def text_encoders(pooled: bool):
    """A CLIP of the host's classes and tokenizers with reduced encoders: CLIP-L and T5 as for Flux.1, or T5
    alone as for Chroma."""
    import comfy.ops
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base
    import comfy.text_encoders.flux as flux
    import comfy.text_encoders.pixart_t5 as pixart
    import comfy.text_encoders.t5 as t5

    config = {"d_ff": 64, "d_kv": 8, "d_model": TEXT, "dense_act_fn": "gelu_pytorch_tanh",
              "is_gated_act": True, "model_type": "t5", "num_heads": 4, "num_layers": 1,
              "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32, "vocab_size": 32128,
              "eos_token_id": 1, "pad_token_id": 0}
    of_clip = {"hidden_size": POOLED, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 49408,
               "intermediate_size": 64, "hidden_act": "quick_gelu", "max_position_embeddings": 77,
               "eos_token_id": 49407, "projection_dim": POOLED}

    def encoder(device):
        return comfy.sd1_clip.SDClipModel(
            device=device, layer="last", textmodel_json_config=dict(config), dtype=torch.float32,
            special_tokens={"end": 1, "pad": 0}, model_class=t5.T5, enable_attention_masks=False,
            return_attention_masks=False, model_options={"model_name": "t5xxl"})

    class Both(flux.FluxClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            torch.nn.Module.__init__(self)
            self.clip_l = comfy.sd1_clip.SDClipModel(device=device, dtype=torch.float32,
                                                     textmodel_json_config=of_clip,
                                                     return_projected_pooled=False)
            self.t5xxl, self.dtypes = encoder(device), {torch.float32}

    class Alone(pixart.PixArtT5XXL):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            torch.nn.Module.__init__(self)
            self.clip_name = self.clip = "t5xxl"
            self.t5xxl, self.dtypes = encoder(device), {torch.float32}

    kinds = (flux.FluxTokenizer, Both) if pooled else (pixart.PixArtTokenizer, Alone)
    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(*kinds), embedding_directory=None)
    for part in ("t5xxl", *(("clip_l",) if pooled else ())):
        transformer = getattr(clip.cond_stage_model, part).transformer
        transformer.load_state_dict(filled(transformer))
    return clip


class Latents:
    """A VAE whose latents are coarse pictures in sixteen channels."""

    downscale_ratio, latent_channels = 8, 16
    first_stage_model = torch.nn.Identity()

    def encode(self, pixels):
        coarse = torch.nn.functional.avg_pool2d(pixels[..., :3].permute(0, 3, 1, 2), 8)
        return coarse.repeat(1, 6, 1, 1)[:, :16]

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=8.0).permute(0, 2, 3, 1)
