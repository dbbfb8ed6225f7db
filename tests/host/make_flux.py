"""Flux.1, Flux.2 Klein and Chroma with random weights and reduced sizes, and their CLIPs, of ComfyUI's own
classes."""

from __future__ import annotations

import torch

from .make_transformer import filled

TEXT, POOLED = 64, 32      # widths of the reduced encoders
FLUX = {"in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": TEXT,
        "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "txt_ids_dims": []}
CHROMA = FLUX | {
    "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 256, "hidden_dim": 64, "n_layers": 1,
    "vec_in_dim": None}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of `a` from `b`, relative to `b`."""
    return ((a - b).norm() / b.norm()).item()


def flux_model(dtype: torch.dtype = torch.float32, distilled: bool = True, **sizes):
    """A MODEL as the node Load Diffusion Model gives it."""
    import comfy.ldm.flux.model as flux
    import comfy.ops
    import comfy.sd

    with torch.device("meta"):
        shapes = flux.Flux(**FLUX | {"guidance_embed": distilled} | sizes, dtype=dtype,
                           device="meta", operations=comfy.ops.disable_weight_init)
    return comfy.sd.load_diffusion_model_state_dict(filled(shapes, dtype), {"dtype": dtype})


def klein_model(dtype: torch.dtype = torch.float32, **sizes):
    """The same of Flux.2 Klein: positions of text, no biases, one modulation for all blocks."""
    more = {"in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 3 * TEXT,
            "mlp_ratio": 3.0, "axes_dim": [32] * 4, "theta": 2000, "patch_size": 1, "qkv_bias": False,
            "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "txt_ids_dims": [3]}
    return flux_model(dtype, False, **more | sizes)


def chroma_model(dtype: torch.dtype = torch.float32):
    """A MODEL of reduced sizes, which the host's loader does not read from a file."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.Chroma({"image_model": "chroma", "dtype": dtype, **CHROMA})
    device = torch.device("cpu")
    model = config.get_model({}, device=device)
    model.diffusion_model.load_state_dict(filled(model.diffusion_model, dtype))
    return comfy.model_patcher.ModelPatcher(model, device, device)


def clip_of(tokenizer, text, name: str):
    """A CLIP of these classes. name: of its encoder, whose weights become random."""
    import comfy.sd
    import comfy.supported_models_base

    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(tokenizer, text), embedding_directory=None)
    transformer = getattr(clip.cond_stage_model, name).transformer
    transformer.load_state_dict(filled(transformer))
    return clip


def qwen():
    """A CLIP of Flux.2 Klein with a reduced encoder."""
    import comfy.sd1_clip
    import comfy.text_encoders.flux as flux
    import comfy.text_encoders.llama as llama

    sizes = {"hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
             "num_key_value_heads": 1}

    class Text(flux.Flux2TEModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            torch.nn.Module.__init__(self)
            self.clip_name = self.clip = "qwen3_4b"
            self.qwen3_4b = comfy.sd1_clip.SDClipModel(
                device=device, layer=[1, 2, 3], textmodel_json_config=dict(sizes), dtype=torch.float32,
                special_tokens={"pad": 151643}, layer_norm_hidden_state=False, model_class=llama.Qwen3_4B,
                enable_attention_masks=True, return_attention_masks=True)
            self.dtypes = {torch.float32}

    return clip_of(flux.KleinTokenizer, Text, "qwen3_4b")


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
    """A VAE whose latents are coarse pictures, repeated in all channels."""

    downscale_ratio = 8
    first_stage_model = torch.nn.Identity()

    def __init__(self, channels: int = 16) -> None:
        self.latent_channels = channels

    def encode(self, pixels):
        coarse = torch.nn.functional.avg_pool2d(pixels[..., :3].permute(0, 3, 1, 2), 8)
        return coarse.repeat(1, self.latent_channels, 1, 1)[:, :self.latent_channels]

    def decode(self, latents):
        coarse = torch.sigmoid(latents[:, :3] / 8)      # random models draw large numbers
        return torch.nn.functional.interpolate(coarse, scale_factor=8.0).permute(0, 2, 3, 1)


def studio_of(pack, model, clip):
    """Our nodes and ComfyUI's with a model, for pictures of 64 pixels."""
    from .conftest import Studio

    channels = model.model.latent_format.latent_channels
    made = Studio(pack, (model, clip, Latents(channels)), None)
    made.side = 64
    made.latent = lambda count=1: {"samples": torch.zeros(count, channels, 8, 8)}
    return made


def model_and_clip(kind: str):
    """Of a kind: flux, klein or chroma."""
    if kind == "klein":
        return klein_model(), qwen()
    return (flux_model(), text_encoders(True)) if kind == "flux" else (chroma_model(), text_encoders(False))
