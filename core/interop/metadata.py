"""Metadata of exported files: kohya's `ss_*`, ModelSpec's `modelspec.*` (1.0.0) and thumbnails, all as text.

ComfyUI and A1111 show the picture in `ssmd_cover_images`; ComfyUI takes trigger words from
`ss_tag_frequency`. Metadata contain no export date, so the same concept always gives the same metadata.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..bank.concepts import Concept, ConceptInfo
from ..bank.terms import joined
from ..model.sites import SiteLayout

THUMBNAIL_LIMIT = 1 << 20       # bytes; small, because listing a folder reads whole headers
_FAMILIES = {       # (sites, context width) -> ModelSpec's name of the architecture, kohya's name of the base
    (16, 768): ("stable-diffusion-v1", "sd_v1"),
    (16, 1024): ("stable-diffusion-v2-512", "sd_v2"),
    (70, 2048): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
_TRAINING = {       # our setting -> kohya's key
    "batch_size": "ss_batch_size_per_device", "accumulation": "ss_gradient_accumulation_steps",
    "optimizer": "ss_optimizer", "schedule": "ss_lr_scheduler", "warmup": "ss_lr_warmup_steps",
    "max_grad_norm": "ss_max_grad_norm", "seed": "ss_seed", "min_snr_gamma": "ss_min_snr_gamma",
    "noise_offset": "ss_noise_offset", "caption_dropout": "ss_caption_dropout_rate",
}


def _family(layout: SiteLayout) -> tuple[str, str]:
    unknown = f"continual-concepts-{layout.fingerprint}"
    return _FAMILIES.get((len(layout), layout.sites[0].context_width), (unknown, unknown))


def thumbnail_type(thumbnail: bytes) -> str | None:
    """`image/jpeg` or `image/png`, detected by the first bytes; None for other data or above THUMBNAIL_LIMIT.
    """
    if len(thumbnail) > THUMBNAIL_LIMIT:
        return None
    magic = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
    return next((kind for start, kind in magic.items() if thumbnail.startswith(start)), None)


def _date(text: str) -> datetime.datetime | None:
    try:
        date = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)


def modelspec(concept: Concept, layout: SiteLayout, kind: str, usage: str) -> dict[str, str]:
    """ModelSpec metadata of a concept's file, with its licence, author, and the thumbnail if it is valid.

    Args:
        kind: `lora` or `textual-inversion`.
        usage: One sentence on how to use the file.
    """
    info = concept.info
    noun = f" ({info.class_noun})" if info.class_noun else ""
    description = (f"The {info.kind} {info.name}{noun}, learned with Continual Concepts by the method "
                   f"{info.method}")
    date = _date(info.provenance.date)
    dated = {} if date is None else {"modelspec.date": date.isoformat(timespec="seconds")}
    data = _described(layout, kind, info.name, description, info.name, usage)
    return data | dated | info.terms.to_metadata() | _thumbnails([concept.thumbnail])


def _described(layout: SiteLayout, kind: str, title: str, description: str, trigger: str,
               usage: str) -> dict[str, str]:
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_family(layout)[0]}/{kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": description,
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": usage,
    }


def _thumbnails(thumbnails: Sequence[bytes]) -> dict[str, str]:
    """The valid thumbnails, up to THUMBNAIL_LIMIT in total."""
    included: list[bytes] = []
    for thumbnail in thumbnails:
        fits = sum(map(len, included)) + len(thumbnail) <= THUMBNAIL_LIMIT
        if fits and thumbnail_type(thumbnail) is not None:
            included.append(thumbnail)
    if not included:
        return {}
    encoded = [base64.b64encode(thumbnail).decode("ascii") for thumbnail in included]
    return {"modelspec.thumbnail": f"data:{thumbnail_type(included[0])};base64,{encoded[0]}",
            "ssmd_cover_images": json.dumps(encoded)}


def aggregate_metadata(title: str, prompt: str, reading: str, named: Sequence[Concept], layout: SiteLayout,
                       state: Mapping[str, Tensor],
                       usage: str) -> dict[str, str]:
    """Metadata of a bank's weights for one prompt.

    Args:
        reading: Description of mode and strength.
        named: The concepts in the prompt.
    """
    description = f"What a bank of Continual Concepts gives for the prompt {prompt!r} ({reading})"
    data = _described(layout, "lora", title, description, prompt, usage)
    data |= joined({concept.name: concept.info.terms for concept in named}).to_metadata()
    data |= _thumbnails([concept.thumbnail for concept in named])
    tags = {title: {concept.name: 1 for concept in named}}
    return data | _network(title, layout, state, tags, f"Continual Concepts, {reading}")


def _network(title: str, layout: SiteLayout, state: Mapping[str, Tensor], tags: Mapping,
             comment: str) -> dict[str, str]:
    """kohya's description of a state dict; {} if it does not use kohya's names."""
    downs = {tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_down.weight")}
    alphas = {round(float(tensor), 6) for name, tensor in state.items() if name.endswith(".alpha")}
    if not downs:
        return {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(downs.pop()) if len(downs) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": _family(layout)[1],
        "ss_output_name": title,
        "ss_tag_frequency": json.dumps(tags),
        "ss_training_comment": comment,
    }


def kohya_metadata(info: ConceptInfo, layout: SiteLayout, state: Mapping[str, Tensor]) -> dict[str, str]:
    """`ss_*` metadata of a state dict with kohya's names: network, base, trigger word, known training
    settings.
    """
    origin = info.provenance
    tags = {info.name: {info.name: max(1, len(origin.images))}}
    data = _network(info.name, layout, state, tags, f"Continual Concepts, method {info.method}")
    if origin.images:
        data["ss_num_train_images"] = str(len(origin.images))
    if origin.steps:
        data["ss_steps"] = str(origin.steps)
    if (date := _date(origin.date)) is not None:
        data["ss_training_finished_at"] = str(date.timestamp())
    return data | _settings(origin.settings)


def _settings(settings: Mapping) -> dict[str, str]:
    """Training settings with kohya's names. Unexpected values from a bank's header are skipped."""
    parts = {name: part if isinstance(part := settings.get(name), Mapping) else {}
             for name in ("training", "method")}
    plain = (str, int, float)
    data = {key: str(parts["training"][name]) for name, key in _TRAINING.items()
            if isinstance(parts["training"].get(name), plain)}
    if isinstance(parts["method"].get("lr"), plain):
        data["ss_learning_rate"] = str(parts["method"]["lr"])
    if isinstance(side := parts["training"].get("resolution"), int):
        data["ss_resolution"] = f"({side}, {side})"
    return data
