"""ComfyUI's own class runs the transformer that pretraining trains."""

from __future__ import annotations

import sys
import types

import torch

from continual_concepts.core.demo.transformer import DiffusionTransformer

TINY = {"in_channels": 4, "model_channels": 48, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 16,
        "adaln_lora_dim": 8, "rope_ratio": 0.0125}


def test_comfyui_runs_the_transformer_with_its_own_class(comfyui, monkeypatch):
    import comfy.ops

    try:
        import torchvision  # noqa: F401
    except ImportError:  # ComfyUI needs one function of it, for padding masks
        stub = types.ModuleType("torchvision")
        stub.transforms = types.ModuleType("torchvision.transforms")
        monkeypatch.setitem(sys.modules, "torchvision", stub)
        monkeypatch.setitem(sys.modules, "torchvision.transforms", stub.transforms)
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    generator = torch.Generator().manual_seed(0)
    transformer = DiffusionTransformer(**TINY).requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    shared = {key: value for key, value in TINY.items() if key != "rope_ratio"}
    model = MiniTrainDIT(
        **shared, max_img_h=240, max_img_w=240, max_frames=128, out_channels=4, patch_spatial=2,
        patch_temporal=1, concat_padding_mask=True, pos_emb_cls="rope3d", use_adaln_lora=True,
        rope_enable_fps_modulation=False, rope_h_extrapolation_ratio=TINY["rope_ratio"],
        rope_w_extrapolation_ratio=TINY["rope_ratio"], dtype=torch.float32,
        operations=comfy.ops.disable_weight_init)
    model.load_state_dict(transformer.state_dict())
    x, text = torch.randn(2, 4, 8, 6, generator=generator), torch.randn(2, 7, 16, generator=generator)
    times = torch.tensor([30.0, 700.0])
    with torch.no_grad():
        expected = model(x[:, :, None], times, text)[:, :, 0]
    assert torch.allclose(transformer(x, times, text), expected, atol=1e-3, rtol=1e-4)
