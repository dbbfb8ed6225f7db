"""What the commands do: parse, call core, say what happened. Each returns a JSON value and lines of text."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from ..bank.bank import ConceptBank
from ..bank.concepts import Concept
from ..bank.format import open_bank, verify_bank
from ..bank.store import add_concept, change_bank, replace_concept, restore, versions
from ..bank.tokens import check_name
from ..data.framing import Framing
from ..data.photos import read_folder
from ..data.training_set import prepare
from ..errors import ConceptError
from ..evaluation.collisions import collisions_of, composition_of, header_warnings
from ..evaluation.inspection import inspect
from ..evaluation.previews import concept_prompt
from ..files import write_atomically
from ..images import thumbnail_of, to_pil
from ..interop.importing import import_concept
from ..methods.base import Task, make
from ..model.backbone import Backbone
from ..regional import Region
from ..regional.noise import NoiseSettings
from ..sampling.regions import sample_regions
from ..sampling.sampling import sample as sample_pictures
from ..sampling.settings import SampleSettings
from ..training.config import TrainingConfig
from ..training.loop import learn as learn_concept
from ..training.process_group import own_device, process_group
from ..training.trainer import StepInfo
from .export import export

Result = tuple[dict, list[str]]
EMBEDDED = {"size": 64, "cfg": 3.0, "steps": 500, "batch_size": 4, "schedule": "cosine", "warmup": 20}
EMBEDDED_RATES = {"lr": 2e-3, "token_lr": 2e-2}  # a base 200 times smaller than SD1.5 learns at higher rates


def _is_embedded(options: Namespace) -> bool:
    return options.base == "embedded"


def load_backbone(options: Namespace) -> Backbone:
    try:
        device = torch.device(own_device(options.device))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConceptError(f"device '{options.device}' cannot be used here ({str(error).splitlines()[0]})") from error
    if _is_embedded(options):
        from ..demo.base import load_base

        return load_base(device=device)
    from ..hosts.pretrained import load_pretrained

    return load_pretrained(Path(options.base), device)


def _thumbnail(backbone: Backbone, bank: ConceptBank, name: str, kind: str, size: int, cfg: float) -> bytes:
    settings = SampleSettings(steps=20, cfg=cfg, size=(size, size))
    return thumbnail_of(sample_pictures(backbone, bank, [concept_prompt(name, kind)], [0], settings)[0])


def _training(options: Namespace) -> TrainingConfig:
    defaults = (
        TrainingConfig(resolution=EMBEDDED["size"], **{k: EMBEDDED[k] for k in ("steps", "batch_size", "schedule", "warmup")})
        if _is_embedded(options)
        else TrainingConfig()
    )
    given = {f.name: getattr(options, f.name) for f in fields(TrainingConfig) if getattr(options, f.name) is not None}
    return replace(defaults, **given)


def demo(options: Namespace) -> Result:
    from .demo import run

    report = run(options.output)
    cidm, other = report["methods"]["cidm"], report["methods"]["finetune"]
    lines = [
        f"learned {', '.join(f'<{name}>' for name in report['concepts'])} in {report['seconds']:.0f} s",
        f"kept at the end: CIDM {cidm['retention']:.0%}, sequential finetuning {other['retention']:.0%}",
        f"both objects in their regions: {report['composition']['region_hits']:.0%}",
        f"look at {options.output / 'report.png'}",
    ]
    return report, lines


def _task(options: Namespace, backbone: Backbone, bank: ConceptBank, seed: int) -> Task:
    words = tuple(word.strip() for word in options.words.split(",") if word.strip())
    return Task(options.name, options.noun, backbone, bank, options.kind, words, torch.Generator().manual_seed(seed))


def learn(options: Namespace) -> Result | None:
    """Grows the bank on disk by one concept; the file is only replaced when the concept is complete. Started by torchrun, all processes
    learn it together and the first one writes and tells."""
    check_name(options.name)
    pictures = read_folder(options.images, options.captions, options.masks)
    if options.prior is not None:
        pictures += read_folder(options.prior, is_prior=True)
    rates = EMBEDDED_RATES if _is_embedded(options) else {}
    method, training = make(options.method, {**rates, **dict(options.settings)}), _training(options)
    known = open_bank(options.bank) if options.bank.exists() else None  # a damaged bank is told before anything is loaded
    with process_group(options.device) as group:
        backbone = load_backbone(options)
        bank = known or ConceptBank(backbone.layout)
        task = _task(options, backbone, bank, training.seed)
        data = prepare(backbone, pictures, options.name, options.noun, Framing(training.resolution, training.framing, training.flip))
        checkpoint = options.bank.with_name(f".{options.bank.name}.{options.name}.checkpoint")
        with tqdm(total=training.steps, desc=f"learning <{options.name}>", disable=options.json or not group.is_first) as bar:
            learned = learn_concept(task, method, data, training, lambda info: _show(bar, info), checkpoint, group=group)
        if not group.is_first:
            return None
    grown = add_concept(options.bank, learned.concept, learned.bank.shared, bank)  # before the thumbnail, which is only a nicety
    checkpoint.unlink(missing_ok=True)
    cfg = EMBEDDED["cfg"] if _is_embedded(options) else 7.5
    thumbnail = _thumbnail(backbone, learned.bank, options.name, options.kind, training.resolution, cfg)
    concept = replace(learned.concept, thumbnail=thumbnail)
    grown = replace_concept(options.bank, concept)
    return _learned_facts(options, concept, grown, learned.losses)


def _show(bar: tqdm, info: StepInfo) -> None:
    bar.update(info.step - bar.n)
    figures = {name: f"{value:.2e}" for name, value in info.monitors.items()}
    bar.set_postfix(loss=f"{info.loss:.3f}", **figures, refresh=False)


def _learned_facts(options: Namespace, concept: Concept, grown: ConceptBank, losses: tuple[float, ...]) -> Result:
    info = concept.info
    facts = {
        "bank": str(options.bank),
        "concept": concept.name,
        "placeholder": info.placeholder,
        "words": list(info.words),
        "method": options.method,
        "steps": len(losses),
        "final_loss": losses[-1],
        "seconds": info.provenance.seconds,
        "bytes": concept.nbytes(),
        "concepts": grown.names,
    }
    names = ", ".join(f"<{name}>" for name in grown.names)
    return facts, [f"learned {info.placeholder} in {facts['seconds']:.0f} s; {options.bank} holds {names}"]


def _region(text: str) -> Region:
    numbers, separator, prompt = text.partition(":")
    try:
        box = tuple(float(part) for part in numbers.split(","))
        if not separator or len(box) != 4:
            raise ValueError
    except ValueError:
        raise ConceptError(f"region {text!r} is not of the form TOP,LEFT,BOTTOM,RIGHT:PROMPT with four fractions") from None
    return Region(prompt, box=box)


def sample(options: Namespace) -> Result:
    if options.count < 1:
        raise ConceptError(f"count is {options.count}; allowed: 1 or more")
    regions = [_region(text) for text in options.region]
    bank = open_bank(options.bank) if options.bank is not None else None
    backbone = load_backbone(options)
    bank = bank or ConceptBank(backbone.layout)
    bank.check_fits(backbone.layout)
    side = options.size or (EMBEDDED["size"] if _is_embedded(options) else 512)
    cfg = options.cfg if options.cfg is not None else (EMBEDDED["cfg"] if _is_embedded(options) else 7.5)
    noise = NoiseSettings(options.region_noise, crop_denoising=options.solo)
    settings = SampleSettings(options.steps, cfg, (side, side), options.negative, options.mode, options.strength, noise)
    seeds = list(range(options.seed, options.seed + options.count))
    pictures = sample_regions(backbone, bank, options.prompt, regions, seeds, settings)
    options.output.mkdir(parents=True, exist_ok=True)
    files = []
    for seed, tensor in zip(seeds, pictures, strict=True):
        files.append(options.output / f"sample_{seed:05d}.png")
        picture = to_pil(tensor)
        write_atomically(files[-1], lambda temporary, p=picture: p.save(temporary, "PNG"))
    return {"prompt": options.prompt, "files": [str(file) for file in files]}, [f"wrote {file}" for file in files]


def _line(concept_info) -> str:
    origin, what = concept_info.provenance, f"{concept_info.class_noun:<16} {concept_info.kind:<7} {concept_info.method:<10}"
    return f"{concept_info.placeholder:<20} {what} {len(origin.images)} pictures  {origin.date}"


def _listed(known: ConceptBank) -> Result:
    """From the header alone: nothing of a concept is read."""
    infos = known.infos.values()
    collisions = collisions_of(list(infos))
    warnings = [*(one.sentence for one in collisions), *header_warnings(known)]
    facts = {"concepts": [info.to_json() for info in infos], "collisions": [asdict(one) for one in collisions], "warnings": warnings}
    return facts, [*map(_line, infos), *(f"warning: {warning}" for warning in warnings)] or ["the bank is empty"]


def _describe(known: ConceptBank, concept: Concept) -> Result:
    info, found = concept.info, inspect(known, only=concept.name)
    nearest = [found.nearest(info.name, measure) for measure in found.likeness]
    facts = {
        **info.to_json(),
        "placeholder": info.placeholder,
        "bytes": concept.nbytes(),
        "deltas": len(concept.deltas),
        "layer_copies": concept.tokens.copies,
        "cover_bytes": len(concept.thumbnail),
        "composes": composition_of(info),
        "most_like": {one.measure: {"name": one.name, "cosine": round(one.cosine, 4)} for one in nearest if one is not None},
        "collides_with": found.partners(info.name),
        "warnings": [one.sentence for one in found.collisions if info.name in (one.one, one.other)],
    }
    facts = json.loads(json.dumps(facts))
    return facts, [f"{key}: {json.dumps(value) if isinstance(value, (dict, list)) else value}" for key, value in facts.items()]


def _imported(options: Namespace) -> Result:
    known = open_bank(options.bank) if options.bank.exists() else None
    backbone = load_backbone(options)
    bank = known or ConceptBank(backbone.layout)
    bank.check_fits(backbone.layout)
    result = import_concept(options.name, options.noun, options.kind, bank.layout, backbone.text, options.lora, options.embedding,
                            options.trigger)
    add_concept(options.bank, result.concept, {}, bank)
    return {"concept": options.name, "bank": str(options.bank), "notes": list(result.notes)}, [
        *result.notes, f"{options.bank} holds <{options.name}>"]


def bank(options: Namespace) -> Result:
    if options.action == "import":
        return _imported(options)
    if options.action == "restore":
        return _restored(options)
    if options.action == "verify":
        lines = verify_bank(options.bank)
        return {"bank": str(options.bank), "concepts": len(lines), "sound": True}, [
            *lines,
            f"{options.bank}: {len(lines)} concepts, all sound",
        ]
    known = open_bank(options.bank)
    if options.action == "list":
        return _listed(known)
    if options.action == "show":
        return _describe(known, known[options.name])
    if options.action == "export":
        return export(known, options, load_backbone)
    if options.action == "merge":
        changed, target, done = change_bank(options.output, lambda _: known.merge(open_bank(options.other))), options.output, "merged"
    elif options.action == "remove":
        changed = change_bank(options.bank, lambda now: now.remove(options.name))
        target, done = options.bank, f"removed <{options.name}>"
    else:
        changed = change_bank(options.bank, lambda now: now.rename(options.name, options.new))
        target, done = options.bank, f"renamed <{options.name}> to <{options.new}>"
    return _changed(changed, target, done)


def _changed(changed: ConceptBank, target: Path, done: str) -> Result:
    names = ", ".join(f"<{n}>" for n in changed.names) or "no concepts"
    return {"bank": str(target), "concepts": changed.names}, [f"{done}; {target} holds {names}"]


def _restored(options: Namespace) -> Result:
    """Without a number: what there is."""
    if options.number is not None:
        return _changed(restore(options.bank, options.number), options.bank, f"brought back version {options.number}")
    found = [{"version": v.number, "changed": datetime.fromtimestamp(v.changed).isoformat(" ", "seconds"), "concepts": _names(v.path)}
             for v in versions(options.bank)]
    lines = [f"{v['version']}: {v['changed']}, {', '.join(v['concepts']) or 'nothing readable'}" for v in found]
    return {"bank": str(options.bank), "versions": found}, lines or ["there are no earlier versions"]


def _names(path: Path) -> list[str]:
    try:
        return open_bank(path).names
    except ConceptError:
        return []
