"""The embedded bases as MODEL, CLIP, VAE and CLIP_VISION, for trying all nodes without a download.

All sizes come from the header of the base's file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ..demo import base, judges
from ..demo.bases import EMBEDDED, TOKENIZER, file_of, read_sizes
from ..demo.encoder import MetricEncoder
from ..demo.joint_transformer import AXES
from ..demo.networks import Autoencoder
from ..demo.transformer import PATCH
from ..demo.vocabulary import CONTEXT_LENGTH
from ..errors import ConceptError
from .families.flux import HAS_PATCHES


def _operations(groups: int) -> type:
    """ComfyUI's layers with a number of groups per norm of our own; ComfyUI's UNet asks for 32."""

    class Operations(comfy.ops.manual_cast):
        class GroupNorm(comfy.ops.manual_cast.GroupNorm):
            def __init__(self, num_groups, num_channels, *args, **kwargs) -> None:
                super().__init__(groups, num_channels, *args, **kwargs)

    return Operations


class _Config(comfy.supported_models_base.BASE):
    unet_extra_config: dict = {}

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self):
        return False        # ComfyUI treats a model with more than four channels as an inpainting model


class _Multiplier:
    """A level's width over the first level's, where that is no whole number.

    ComfyUI computes a level's width as the first one times such a factor, and layers need whole numbers.
    """

    def __init__(self, width: int, first: int) -> None:
        self.width, self.first = width, first

    def __mul__(self, channels: int) -> int:
        return self.width * channels // self.first

    __rmul__ = __mul__


def _multiplier(width: int, first: int) -> int | _Multiplier:
    return _Multiplier(width, first) if width % first else width // first


def _unet_config(shape: dict[str, Any]) -> dict:
    """The sizes of a UNet, as in `networks.UNET`, as a ComfyUI configuration."""
    widths, layers = shape["block_out_channels"], shape["layers_per_block"]
    depth = [int(kind.startswith("CrossAttn")) for kind in shape["down_block_types"]]
    return {
        "image_size": shape["sample_size"], "in_channels": shape["in_channels"],
        "out_channels": shape["out_channels"],
        "model_channels": widths[0], "channel_mult": [_multiplier(width, widths[0]) for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [d for d in depth for _ in range(layers)],
        "transformer_depth_output": [d for d in depth for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "num_heads": shape["attention_head_dim"], "num_head_channels": -1,
        "context_dim": shape["cross_attention_dim"],
        "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False,
        "adm_in_channels": None,
        "use_temporal_attention": False, "dtype": torch.float32,
    }


class _Transformer(comfy.model_base.CosmosPredict2):
    """ComfyUI's transformer with the objective of a flow; the host's own scales the noise."""

    scale_latent_inpaint = comfy.model_base.BaseModel.scale_latent_inpaint


def _transformer_config(shape: dict[str, Any]) -> dict:
    """The sizes of a `demo.transformer.DiffusionTransformer` as a ComfyUI configuration."""
    ratio = shape["rope_ratio"]
    return {**{name: size for name, size in shape.items() if name != "rope_ratio"},
            "out_channels": shape["in_channels"], "patch_spatial": shape.get("patch_spatial", PATCH),
            "patch_temporal": 1, "max_img_h": 240, "max_img_w": 240, "max_frames": 128,
            "concat_padding_mask": True, "pos_emb_cls": "rope3d", "use_adaln_lora": True,
            "rope_enable_fps_modulation": False, "rope_h_extrapolation_ratio": ratio,
            "rope_w_extrapolation_ratio": ratio, "dtype": torch.float32}


def _joint_config(shape: dict[str, Any]) -> dict:
    """The sizes of a `demo.joint_transformer.JointTransformer` as a ComfyUI configuration of Flux.2."""
    if not HAS_PATCHES:
        raise ConceptError("the base is a transformer in the form of Flux.2, whose blocks have no attention "
                           "patches in this version of ComfyUI; update ComfyUI to 0.33 or newer")
    axis = shape["hidden_size"] // shape["num_heads"] // AXES
    return {**shape, "out_channels": shape["in_channels"], "vec_in_dim": None, "axes_dim": [axis] * AXES,
            "patch_size": shape.get("patch_size", PATCH), "qkv_bias": False, "guidance_embed": False,
            "txt_ids_dims": [AXES - 1], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
            "dtype": torch.float32}


_CONFIGS = {"unet": _unet_config, "transformer": _transformer_config, "joint": _joint_config}


def _load_model(modules: dict[str, Any], sizes: dict[str, Any]):
    """The MODEL of a base's denoiser of the given sizes."""
    kind = next(kind for kind in base.DENOISERS if kind in modules)
    shape = sizes[kind]
    config = _Config(_CONFIGS[kind](shape))
    latents, rgb = config.latent_format, _preview(modules["vae"])
    latents.latent_channels = shape["in_channels"]
    latents.latent_rgb_factors, latents.latent_rgb_factors_bias = rgb
    if kind in base.TRANSFORMER_CLASSES:
        latents.latent_dimensions = 3 if kind == "transformer" else 2      # a time axis of one frame
        config.sampling_settings = {name: sizes["schedule"][name] for name in ("shift", "multiplier")}
        host = _Transformer if kind == "transformer" else comfy.model_base.Flux
        model = host(config, comfy.model_base.ModelType.FLOW)
        weights = modules[kind].state_dict()
    else:
        config.custom_operations = _operations(shape["norm_num_groups"])
        model = config.get_model({}, device=None)
        names = comfy.utils.unet_to_diffusers(config.unet_config)
        weights = {names[name]: weight for name, weight in modules["unet"].state_dict().items()}
    missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"the embedded base does not fit this ComfyUI's denoiser: missing {missing[:3]}, "
                           f"unexpected {unexpected[:3]}")
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(),
                                            management.unet_offload_device())


def _tokenizer_class(width: int) -> type:
    """A class of ComfyUI's SD1 tokenizer with the embedded bases' words. width: of a token vector."""

    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
            super().__init__(str(TOKENIZER), max_length=CONTEXT_LENGTH,
                             embedding_directory=embedding_directory,
                             embedding_size=width, tokenizer_data=tokenizer_data or {})

    class TextTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Tokenizer)

    return TextTokenizer


def _text_class(encoder: torch.nn.Module, shape: dict[str, Any], tokenizer) -> type:
    """A class of ComfyUI's SD1 text encoder with an embedded base's sizes and weights."""
    start, end, width = tokenizer.bos_token_id, tokenizer.eos_token_id, shape["hidden_size"]
    weights = {("" if name.startswith("text_model.") else "text_model.") + name: w
               for name, w in encoder.state_dict().items()
               if not name.endswith("position_ids")}
    weights["text_projection.weight"] = torch.eye(width)

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            config = {**shape, "eos_token_id": end}
            super().__init__(device, CONTEXT_LENGTH, textmodel_json_config=config, dtype=torch.float32,
                             special_tokens={"start": start, "end": end, "pad": end},
                             return_projected_pooled=False,
                             model_options={})
            words = self.operations.Embedding(len(tokenizer), width, device=device, dtype=torch.float32)
            self.transformer.set_input_embeddings(words)
            self.transformer.load_state_dict(weights)
            self.freeze()

    class Text(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            super().__init__(device=device, dtype=torch.float32, clip_model=Encoder, model_options={})

    return Text


class DemoVAE(comfy.sd.VAE):
    """An embedded base's autoencoder with ComfyUI's VAE interface.

    It turns IMAGE `[B, H, W, 3]` in 0..1 into latents `[B, C, H/m, W/m]`, m being the side of its patches.
    Latents of a transformer have a time axis behind the channels; every frame is decoded to a picture.
    """

    # ComfyUI's constructor recognises autoencoders by weight names and does not know these.
    def __init__(self, autoencoder: Autoencoder) -> None:
        self.first_stage_model = autoencoder.eval()
        self.device, self.output_device = management.vae_device(), management.intermediate_device()
        self.patcher = comfy.model_patcher.ModelPatcher(autoencoder, self.device,
                                                        management.vae_offload_device())
        self.vae_dtype, self.latent_channels = torch.float32, autoencoder.config.latent_channels
        self.downscale_ratio = self.upscale_ratio = autoencoder.patch
        self.output_channels, self.latent_dim = 3, 2
        self.size, self.disable_offload, self.extra_1d_channel = None, False, None
        self.crop_input, self.not_video = None, True

    def throw_exception_if_invalid(self) -> None:
        """Does nothing, because this VAE is always valid."""

    @torch.no_grad()
    def encode(self, pixel_samples: Tensor) -> Tensor:
        management.load_models_gpu([self.patcher])
        height, width = (side - side % self.first_stage_model.patch for side in pixel_samples.shape[1:3])
        x = pixel_samples[:, :height, :width, :3].permute(0, 3, 1, 2).to(self.device, torch.float32) * 2 - 1
        return self.first_stage_model.encode(x).latent_dist.mean.to(self.output_device)

    @torch.no_grad()
    def decode(self, samples_in: Tensor, vae_options=None) -> Tensor:
        management.load_models_gpu([self.patcher])
        if samples_in.ndim == 5:
            samples_in = samples_in.movedim(2, 1).flatten(0, 1)
        x = self.first_stage_model.decode(samples_in.to(self.device, torch.float32)).sample
        return ((x + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).to(self.output_device)

    def encode_tiled(self, pixel_samples: Tensor, *args, **kwargs) -> Tensor:
        return self.encode(pixel_samples)

    def decode_tiled(self, samples: Tensor, *args, **kwargs) -> Tensor:
        return self.decode(samples)


class DemoVision:
    """The embedded metric encoder as a CLIP_VISION, with the methods that nodes use.

    One half of a picture's vector describes the content, the other half the drawing style.
    """

    def __init__(self) -> None:
        self.encoder = MetricEncoder.load(judges.ASSETS / "metrics.safetensors")

    @torch.no_grad()
    def encode_image(self, image: Tensor, crop=True) -> comfy.clip_vision.Output:
        """IMAGE `[B, H, W, 3]` in 0..1; its `image_embeds` are unit vectors `[B, D]`."""
        side = judges.SIDE
        x = comfy.utils.common_upscale(image.movedim(-1, 1)[:, :3].cpu().float(), side, side, "area",
                                       "center" if crop else "disabled")
        parts = self.encoder.object_features(x * 2 - 1), self.encoder.style_features(x * 2 - 1)
        output = comfy.clip_vision.Output()
        output.image_embeds = torch.cat(parts, dim=1) / math.sqrt(2)
        return output


def _preview(vae: Autoencoder) -> tuple[list, list]:
    """Colours of the latent channels and a bias for latent previews, from the linear part of the decoder."""
    # pixel_shuffle orders [colour, row, column]
    weight = vae.linear.weight.detach().view(3, vae.patch**2, -1).mean(1)
    assert vae.linear.bias is not None
    return weight.T.tolist(), vae.linear.bias.detach().view(3, -1).mean(1).tolist()


def load_demo(embedding_directory=None, name: str = EMBEDDED) -> tuple:
    """Loads MODEL, CLIP and VAE of an embedded base. `DemoVision` is its CLIP_VISION.

    Args:
        embedding_directory: Where textual inversions are.
        name: One of `bases.NAMES`.

    Raises:
        ConceptError: The name is unknown.
    """
    return load_demo_file(file_of(name), embedding_directory)


def load_demo_file(path: Path, embedding_directory=None) -> tuple:
    """`load_demo` of a base file, whose denoiser is a UNet or a transformer."""
    sizes, modules = read_sizes(path), base.load_modules(path)
    model = _load_model(modules, sizes)
    text_class = _text_class(modules["text_encoder"], sizes["text_encoder"], modules["tokenizer"])
    target = comfy.supported_models_base.ClipTarget(_tokenizer_class(sizes["text_encoder"]["hidden_size"]),
                                                    text_class)
    return model, comfy.sd.CLIP(target, embedding_directory=embedding_directory), DemoVAE(modules["vae"])
