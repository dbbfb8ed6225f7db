"""Records of a run: the identity that a checkpoint must match, and the provenance of the learned concept."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from ..bank.bank import ConceptBank
from ..bank.concepts import OWN, Concept, ConceptInfo, Provenance
from ..bank.terms import Terms
from ..data.training_set import TrainingData
from ..errors import ConceptError
from ..methods.base import Method, Outcome, Task, make
from . import checkpoint
from .config import TrainingConfig
from .early_stopping import has_stalled

# Of a concept's record, so that a bank's header stays small. Longer captions are not stored.
MOST_CAPTIONS, LONGEST_CAPTION = 32, 1000
# Settings that do not change what is learned, with the value that identities of runs have had from the start.
WITHOUT_EFFECT = {"checkpoint_every": 0}


@dataclass(frozen=True)
class Learned:
    """The concept, the bank that holds it, the denoising loss of every step, and the states that were to be
    kept: steps -> the concept at that step."""

    concept: Concept
    bank: ConceptBank
    losses: tuple[float, ...]
    kept: Mapping[int, Concept] = field(default_factory=dict)


def run_identity(task: Task, method: Method, data: TrainingData, config: TrainingConfig) -> dict:
    """Identity of a run as JSON values. A checkpoint belongs to a run if these agree."""
    return {"concept": task.name, "class noun": task.class_noun, "method": method.name,
            "words": list(task.worded(method.words_of_kind(task.kind)).word_names),
            "settings": method_settings(method), "training": {**asdict(config), **WITHOUT_EFFECT},
            "base": task.backbone.fingerprint, "overlay": task.backbone.overlay, "bank": task.bank.names,
            "images": list(data.digests), "captions": list(data.captions),
            **({"repeats": list(data.repeats)} if data.repeats else {}),
            **({"refined concept": task.refined[task.name].digest()} if task.refined is not None else {}),
            **({"parent": task.parent.digest()} if task.parent is not None else {})}


def run_key(identity: dict) -> str:
    """A short hash of a run's identity, for file names."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _with_defaults(settings: Mapping, method: str) -> dict[str, dict]:
    """Settings of a method and of training, as `{"method": ..., "training": ...}`. A setting missing from an
    older record had its default value."""
    defaults = {"method": method_settings(make(method)), "training": asdict(TrainingConfig())}
    return {part: {**defaults[part], **dict(settings.get(part, {}))} for part in defaults}


def setting_differences(there: Mapping, method: Method, config: TrainingConfig) -> list[str]:
    """One phrase for each setting that differs from those of a concept's record."""
    here = {"method": method_settings(method), "training": asdict(config)}
    had = json.loads(json.dumps(_with_defaults(there, method.name)))
    return [line for part in here for line in _differences(had[part], json.loads(json.dumps(here[part])))]


def check_known(info: ConceptInfo, wanted: ConceptInfo, method: Method, config: TrainingConfig,
                digests: Sequence[str], again: str) -> None:
    """Checks that a concept of the bank was learned by this method, from these photos, with these settings.

    Args:
        wanted: What would be learned now.
        digests: Digests of the photos.
        again: How to learn it again, for the message: "set x to y".

    Raises:
        ConceptError: It was learned otherwise.
    """
    there, here = ({"class noun": " ".join(concept.class_noun.split()), "kind": concept.kind,
                    "method": concept.method, "images": list(images),
                    "parent": concept.provenance.variant_of}
                   for concept, images in ((info, info.provenance.images), (wanted, digests)))
    found = _differences(there, here)
    if info.method == method.name:
        found += setting_differences(info.provenance.settings, method, config)
    if found:
        raise ConceptError(f"the bank already holds a concept '{info.name}', learned from other photos or "
                           f"settings ({'; '.join(found)}); choose another name, or {again}")


def is_complete(path: Path) -> bool:
    """Whether a checkpoint's run came to its last step. Raises ConceptError for a damaged checkpoint."""
    training = checkpoint.identity(path).get("training", {})
    return len(checkpoint.load(path).get("losses", ())) == training.get("steps")


def is_finished(path: Path, origin: Provenance) -> bool:
    """Whether a checkpoint is of the finished run that a concept comes from. origin: the concept's."""
    run = checkpoint.identity(path)
    there = {"method": run.get("settings"), "training": run.get("training")}
    if _differences(there, dict(origin.settings)) or not set(run.get("images", ())) <= set(origin.images):
        return False
    if not run:
        return False
    state, training = checkpoint.load(path), run.get("training", {})
    count = len(state.get("losses", ()))
    is_done = count == training.get("steps") or has_stalled(state.get("scores", ()),
                                                            training.get("patience", 0))
    # of kept states, an earlier one may be in the bank
    return count == origin.steps or (is_done and origin.steps in state.get("kept", {}))


def check_same_run(path: Path, there: Mapping, here: Mapping) -> None:
    """Checks that a checkpoint is of this run. Raises ConceptError that names what differs.

    Args:
        path: The checkpoint.
        there, here: The identities of both runs, see `run_identity`.
    """
    there, here = ({"refined concept": "", "parent": "", **identity} for identity in (there, here))
    if there.get("method") == here["method"]:
        filled = _with_defaults({"method": there.get("settings", {}), "training": there.get("training", {})},
                                str(here["method"]))
        there |= {"settings": filled["method"], "training": filled["training"]}
    else:      # settings of another method tell nothing
        here = {name: value for name, value in here.items() if name not in ("settings", "words")}
    found = _differences(there, json.loads(json.dumps(here)))
    if found:
        raise ConceptError(f"the checkpoint '{path}' belongs to another run: {'; '.join(found)}; give the "
                           "values of that run to resume it, or delete the file to start again")


def _differences(there: Mapping, here: Mapping) -> list[str]:
    """One phrase for each value of `here` that differs from that of the same name in `there`."""
    found = []
    for name, value in here.items():
        if name in WITHOUT_EFFECT:
            continue
        had = there.get(name)
        if isinstance(value, dict) and isinstance(had, dict):
            found += _differences(had, value)
        elif had != value:
            found.append(_difference(name, had, value))
    return found


def _difference(name: str, had: object, has: object) -> str:
    if name == "images" and isinstance(had, list) and isinstance(has, list):
        common = len(set(had) & set(has))
        return f"it has {len(had)} images, now {len(has)}; {common or 'none'} of them are the same"
    if isinstance(had, list) and isinstance(has, list) and len(had) == len(has):
        i = next(i for i in range(len(has)) if had[i] != has[i])
        return f"its {name} number {i + 1} is {brief(had[i])}, now {brief(has[i])}"
    return f"its {name} is {brief(had)}, now {brief(has)}"


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


def _captions(name: str, earlier: Sequence[str], data: TrainingData) -> tuple[str, ...]:
    """Different captions of a concept's photos, with `OWN` for the concept; evenly chosen if many."""
    pairs = zip(data.captions, data.is_prior.tolist(), strict=True)
    photos = [caption.replace(f"<{name}>", OWN) for caption, is_prior in pairs if not is_prior]
    different = [text for text in dict.fromkeys((*earlier, *photos)) if len(text) <= LONGEST_CAPTION]
    count = min(len(different), MOST_CAPTIONS)
    return tuple(different[i * len(different) // count] for i in range(count))


def conclude(task: Task, method: Method, data: TrainingData, config: TrainingConfig, losses: Sequence[float],
             seconds: float, thumbnail: bytes, kept: Mapping[int, Concept] = MappingProxyType({})) -> Learned:
    """Finishes a run: the learned concept with its provenance, and the bank that holds it. kept: states of
    earlier steps."""
    outcome = method.finish()
    _refuse_nan(outcome, task.name)
    settings = {"method": method_settings(method), "training": asdict(config)}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    start = None if task.refined is None else task.refined[task.name]
    before = Provenance() if start is None else start.info.provenance
    refined = () if start is None else (*before.refined, {
        "date": before.date, "steps": before.steps, "seconds": before.seconds, "photos": len(before.images)})
    images = tuple(dict.fromkeys((*before.images, *data.digests))) if start is not None else data.digests
    origin = Provenance(base=task.backbone.fingerprint, images=images, settings=settings,
                        versions=_versions(), date=now, steps=len(losses), seconds=round(seconds, 2),
                        refined=refined, captions=_captions(task.name, before.captions, data),
                        variant_of=before.variant_of if task.parent is None else task.parent.name)
    source = start if task.parent is None else task.parent
    terms = Terms() if source is None else source.info.terms      # they hold for what is made of it, too
    info = ConceptInfo(task.name, task.class_noun, method.name, task.word_names, task.kind, origin,
                       method.composition_of_kind(task.kind), terms)
    thumbnail = thumbnail or (b"" if start is None else start.thumbnail)
    concept = Concept(info, outcome.tokens, outcome.deltas, thumbnail)
    shared = {method.name: dict(outcome.shared)} if outcome.shared else {}
    states = {step: replace(state, info=replace(info, provenance=replace(origin, steps=step)))
              for step, state in kept.items()}
    return Learned(concept, task.grown(concept, shared), tuple(losses), {**states, len(losses): concept})
