"""Records of a run: the identity that a checkpoint must match, and the provenance of the learned concept."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass

import torch

from ..bank.bank import ConceptBank
from ..bank.concepts import Concept, ConceptInfo, Provenance
from ..data.training_set import TrainingData
from ..errors import ConceptError
from ..methods.base import Method, Outcome, Task, make
from .config import TrainingConfig


@dataclass(frozen=True)
class Learned:
    """The concept, the bank that holds it, and the denoising loss of every step."""

    concept: Concept
    bank: ConceptBank
    losses: tuple[float, ...]


def run_identity(task: Task, method: Method, data: TrainingData, config: TrainingConfig) -> dict:
    """Identity of a run as JSON values. A checkpoint belongs to a run if these agree."""
    return {"concept": task.name, "class noun": task.class_noun, "method": method.name,
            "words": list(task.worded(method.word_count).word_names),
            "settings": method_settings(method), "training": asdict(config),
            "base": task.backbone.fingerprint, "overlay": task.backbone.overlay, "bank": task.bank.names,
            "images": list(data.digests), "captions": list(data.captions)}


def run_key(identity: dict) -> str:
    """A short hash of a run's identity, for file names."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def is_same_work(origin: Provenance, method: Method, config: TrainingConfig) -> bool:
    """Whether a concept was learned with these settings. A setting missing from its record had its default
    value.
    """
    defaults = {"method": method_settings(make(method.name)), "training": asdict(TrainingConfig())}
    wanted = {"method": method_settings(method), "training": asdict(config)}
    had = {part: {**defaults[part], **dict(origin.settings.get(part, {}))} for part in wanted}
    return json.loads(json.dumps(had)) == json.loads(json.dumps(wanted))


def brief(value: object) -> str:
    """A value for a message, truncated to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def method_settings(method: Method) -> dict:
    """The settings of a method as JSON values; empty for a method without settings."""
    config = getattr(method, "config", None)
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}


def _versions() -> dict[str, str]:
    versions = {"torch": torch.__version__.split("+")[0]}
    for name in ("continual-concepts", "diffusers", "transformers", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _refuse_nan(outcome: Outcome, name: str) -> None:
    """Raises if the learned tensors hold NaN or infinity: the last step may have diverged, which no loss
    shows.
    """
    factors = [tensor for delta in outcome.deltas.values() for tensor in delta.tensors()]
    tensors = (*outcome.tokens.vectors.values(), *factors, *outcome.shared.values())
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ConceptError(f"what concept '{name}' has learned holds NaN or infinity; lower the learning "
                           "rates (lr, token_lr); the bank is unchanged")


def conclude(task: Task, method: Method, data: TrainingData, config: TrainingConfig, losses: Sequence[float],
             seconds: float, thumbnail: bytes) -> Learned:
    """Finishes a run: the learned concept with its provenance, and the bank that holds it."""
    outcome = method.finish()
    _refuse_nan(outcome, task.name)
    settings = {"method": method_settings(method), "training": asdict(config)}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    origin = Provenance(base=task.backbone.fingerprint, images=data.digests, settings=settings,
                        versions=_versions(), date=now, steps=len(losses), seconds=round(seconds, 2))
    info = ConceptInfo(task.name, task.class_noun, method.name, task.word_names, task.kind, origin,
                       method.composition)
    concept = Concept(info, outcome.tokens, outcome.deltas, thumbnail)
    shared = {method.name: dict(outcome.shared)} if outcome.shared else {}
    return Learned(concept, task.bank.add(concept, shared), tuple(losses))
