"""The core tests' SDXL with random weights, in ComfyUI's classes."""

from __future__ import annotations

import torch


class Latents:
    """A VAE whose latents are coarse pictures."""

    downscale_ratio = 4

    def encode(self, pixels):
        x = torch.nn.functional.avg_pool2d(pixels[..., :3].permute(0, 3, 1, 2), 4)
        return torch.cat([x, x[:, :1]], 1)

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=4.0).permute(0, 2, 3, 1)

    first_stage_model = torch.nn.Identity()


def tiny_xl_model(unet):
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    channels = unet.config.in_channels
    kind = comfy.supported_models.SDXL_instructpix2pix if channels == 8 else comfy.supported_models.SDXL

    class Config(kind):
        unet_extra_config: dict = {}

    config = Config({
        "image_size": 8, "in_channels": channels, "out_channels": 4, "model_channels": 32,
        "channel_mult": [1, 2], "num_res_blocks": [1, 1],
        "transformer_depth": [3, 3], "transformer_depth_output": [3, 3, 3, 3], "transformer_depth_middle": 3,
        "num_heads": 2,
        "num_head_channels": -1, "context_dim": 56, "use_spatial_transformer": True,
        "use_linear_in_transformer": False, "legacy": False,
        "adm_in_channels": 24 + 6 * 8, "num_classes": "sequential", "use_temporal_attention": False,
        "dtype": torch.float32})
    device = torch.device("cpu")
    model = config.get_model({}, device=device)
    model.embedder = comfy.model_base.Timestep(8)
    names, own = comfy.utils.unet_to_diffusers(config.unet_config), unet.state_dict()
    renamed = {names[name]: weight for name, weight in own.items()}
    missing, unexpected = model.diffusion_model.load_state_dict(renamed, strict=False)
    assert not missing and not unexpected
    return comfy.model_patcher.ModelPatcher(model, device, device)


def tiny_xl_clip(encoders):
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models_base

    from continual_concepts.core.demo import base

    widths = {encoder.name: encoder.width for encoder in encoders}

    def one(encoder):
        config, tokens = encoder.model.config, encoder.tokenizer
        clip = comfy.sd1_clip.SDClipModel(
            max_length=encoder.length, layer="hidden", layer_idx=0, layer_norm_hidden_state=False,
            dtype=torch.float32,
            textmodel_json_config=config.to_dict() | {"eos_token_id": tokens.eos_token_id},
            return_projected_pooled=encoder.name == "clip_g",
            special_tokens={"start": tokens.bos_token_id, "end": tokens.eos_token_id,
                            "pad": tokens.pad_token_id})
        embedding = clip.operations.Embedding(len(tokens), encoder.width, dtype=torch.float32)
        clip.transformer.set_input_embeddings(embedding)
        weights = {name if name.startswith(("text_model.", "text_projection"))
                   else f"text_model.{name}": weight
                   for name, weight in encoder.model.state_dict().items()
                   if not name.endswith("position_ids")}
        weights.setdefault("text_projection.weight", torch.eye(encoder.width))
        clip.transformer.load_state_dict(weights)
        return clip

    class Text(comfy.sdxl_clip.SDXLClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            torch.nn.Module.__init__(self)
            self.clip_l, self.clip_g = (one(encoder) for encoder in encoders)
            self.dtypes = {torch.float32}

    class Tokenizer(comfy.sdxl_clip.SDXLTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
            for name, width in widths.items():
                setattr(self, name, comfy.sd1_clip.SDTokenizer(
                    str(base.TOKENIZER), max_length=encoders[0].length,
                    embedding_directory=embedding_directory, embedding_size=width,
                    embedding_key=name, tokenizer_data={}))

    return comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(Tokenizer, Text), embedding_directory=None)
