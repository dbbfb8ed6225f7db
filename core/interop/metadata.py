"""Metadata of exported files: all text, as safetensors wants it. Keys: kohya's `ss_*`, ModelSpec's `modelspec.*`, cover pictures.

ModelSpec: Stability-AI/ModelSpec 1.0.0. ComfyUI and A1111 show the picture in `ssmd_cover_images`, and ComfyUI takes trigger words
from `ss_tag_frequency`. Nothing here depends on the day of the export: the same concept gives the same metadata.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Mapping

from torch import Tensor

from ..concepts import Concept, ConceptInfo
from ..sites import SiteLayout

COVER_LIMIT = 1 << 20       # bytes; programs read the whole header of every file when they list a folder
_FAMILIES = {       # (sites, context width) -> ModelSpec's name of the architecture, kohya's name of the base
    (16, 768): ("stable-diffusion-v1", "sd_v1"),
    (16, 1024): ("stable-diffusion-v2-512", "sd_v2"),
    (70, 2048): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
_TRAINING = {       # our setting -> kohya's key
    "batch_size": "ss_batch_size_per_device", "accumulation": "ss_gradient_accumulation_steps", "optimizer": "ss_optimizer",
    "schedule": "ss_lr_scheduler", "warmup": "ss_lr_warmup_steps", "max_grad_norm": "ss_max_grad_norm", "seed": "ss_seed",
    "min_snr_gamma": "ss_min_snr_gamma", "noise_offset": "ss_noise_offset", "caption_dropout": "ss_caption_dropout_rate",
}


def _family(layout: SiteLayout) -> tuple[str, str]:
    unknown = f"continual-concepts-{layout.fingerprint}"
    return _FAMILIES.get((len(layout), layout.sites[0].context_width), (unknown, unknown))


def cover_type(cover: bytes) -> str | None:
    """`image/jpeg` or `image/png` by the first bytes; None for anything else, for nothing, and for more than COVER_LIMIT."""
    if len(cover) > COVER_LIMIT:
        return None
    magic = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
    return next((kind for start, kind in magic.items() if cover.startswith(start)), None)


def _date(text: str) -> datetime.datetime | None:
    try:
        date = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)


def modelspec(concept: Concept, layout: SiteLayout, kind: str, usage: str) -> dict[str, str]:
    """kind: `lora` or `textual-inversion`; usage: one sentence on how to use the file. Plus the cover where there is a sound one."""
    info = concept.info
    noun = f" ({info.class_noun})" if info.class_noun else ""
    data = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_family(layout)[0]}/{kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": info.name,
        "modelspec.description": f"The {info.kind} {info.name}{noun}, learned with Continual Concepts by the method {info.method}",
        "modelspec.trigger_phrase": info.name,
        "modelspec.usage_hint": usage,
    }
    date, picture = _date(info.provenance.date), cover_type(concept.cover)
    if date is not None:
        data["modelspec.date"] = date.isoformat(timespec="seconds")
    if picture is not None:
        encoded = base64.b64encode(concept.cover).decode("ascii")
        data |= {"modelspec.thumbnail": f"data:{picture};base64,{encoded}", "ssmd_cover_images": json.dumps([encoded])}
    return data


def kohya_metadata(info: ConceptInfo, layout: SiteLayout, state: Mapping[str, Tensor]) -> dict[str, str]:
    """`ss_*` of a state dict under kohya's names: network, base, trigger word, and the training as far as the concept knows it."""
    origin = info.provenance
    downs = {name: tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_down.weight")}
    alphas = {round(float(tensor), 6) for name, tensor in state.items() if name.endswith(".alpha")}
    ranks, pictures = set(downs.values()), max(1, len(origin.images))
    data = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": _family(layout)[1],
        "ss_output_name": info.name,
        "ss_tag_frequency": json.dumps({info.name: {info.name: pictures}}),
        "ss_training_comment": f"Continual Concepts, method {info.method}",
    }
    if origin.images:
        data["ss_num_train_images"] = str(len(origin.images))
    if origin.steps:
        data["ss_steps"] = str(origin.steps)
    if _date(origin.date) is not None:
        data["ss_training_finished_at"] = str(_date(origin.date).timestamp())
    return data | _settings(origin.settings)


def _settings(settings: Mapping) -> dict[str, str]:
    """Settings come from a bank's header: anything of an unexpected form is left out."""
    parts = {name: part if isinstance(part := settings.get(name), Mapping) else {} for name in ("training", "method")}
    plain = (str, int, float)
    data = {key: str(parts["training"][name]) for name, key in _TRAINING.items() if isinstance(parts["training"].get(name), plain)}
    if isinstance(parts["method"].get("lr"), plain):
        data["ss_learning_rate"] = str(parts["method"]["lr"])
    if isinstance(side := parts["training"].get("resolution"), int):
        data["ss_resolution"] = f"({side}, {side})"
    return data
