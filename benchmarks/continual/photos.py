"""Prompt suites from a folder of photos such as that of CIFC, the ten concepts of CIDM's benchmark.

The folder holds `tasks.json`: {"tasks": [{"images", "captions", "class_noun", "kind", "tokens"}, ...]}, in
learning order. `images` and `captions` are folders inside it (captions are optional), `kind` is object or
style, and `tokens` such as ["<dog1>", "<dog2>"] name the learned words. A task may also have "name" and
"prompts". Their defaults are the folder's name and a file of `evaluation_prompts`: one prompt per line, with
<TOK> for the concept. The file is untrusted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...core.bank.concepts import KINDS
from ...core.bank.prompts import PLACEHOLDER
from ...core.bank.tokens import check_name
from ...core.data.assignment import Assignment
from ...core.data.folder import read_folder
from ...core.data.framing import Framing, frame
from ...core.errors import ConceptError
from ...core.evaluation.protocol import Encoder
from ...core.hosts.diffusers import DiffusersBackbone
from ...core.sampling.settings import SampleSettings
from ...core.training.config import TrainingConfig
from .judges import ENCODER, EncoderJudge
from .prompt_suite import PromptSuite, groups_and_pairs, unrelated_prompts

# CIDM's negative prompt
NEGATIVE = ("longbody, lowres, bad anatomy, bad hands, extra digit, fewer digits, cropped, worst quality, "
            "low quality")
FIRST_SEED = 2024      # CIDM's evaluation puts it in front of every prompt
SIDE = 512      # side of the reference pictures, as in the benchmark
TOKEN, MAX_BYTES, MAX_TASKS = "<TOK>", 1_000_000, 1000
PETS = ("dog", "cat")      # classes with their own prompts; other objects use those of toys
COMBINED = ("a photo of {} in the forest", "a photo of {} on the street", "a photo of {} on a beach",
            "a photo of {} in front of a house")
PICTURES, NOUN_PICTURES = 100, 40      # pictures per concept: default, and maximum for class nouns
GROUP_PICTURES, PAIR_PICTURES = 12, 48


def training(steps: int, resolution: int, seed: int) -> TrainingConfig:
    """The papers' training configuration (CIDM: 800 steps of single pictures, learning rates decay to 0).

    Learning rates come from the methods.
    """
    return TrainingConfig(steps=steps, batch_size=1, resolution=resolution, seed=seed)


def sampling(resolution: int) -> SampleSettings:
    """CIDM's sampling settings: 50 steps, guidance 7.5, one negative prompt."""
    return SampleSettings(steps=50, cfg=7.5, size=(resolution, resolution), negative=NEGATIVE, batch=8)


def _read_json(file: Path) -> object:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConceptError(f"'{file}' is larger than {MAX_BYTES} bytes; it must hold the list of tasks")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConceptError(f"'{file}' cannot be read as JSON ({type(error).__name__}); "
                           "it must hold the list of tasks") from error


def _inside(root: Path, given: object, what: str) -> Path:
    """A path from tasks.json. It must be inside the folder of that file."""
    if not isinstance(given, str) or not given or "\0" in given:
        raise ConceptError(f"{what} is {given!r}; allowed: a path inside '{root}'")
    path = (root / given).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ConceptError(f"{what} is {given!r}, which leads out of '{root}'; allowed: a path inside it")
    return path


def _are_different_words(values: list) -> bool:
    return all(isinstance(value, str) for value in values) and len(set(values)) == len(values)


def _words(given: object, where: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not _are_different_words(given):
        raise ConceptError(f"tokens of {where} are {given!r}; "
                           "allowed: a list of different words such as \"<dog1>\"")
    return tuple(check_name(word.removeprefix("<").removesuffix(">"), f"token of {where}") for word in given)


def _entries(root: Path) -> list[dict]:
    """Reads the tasks of tasks.json and checks name, class_noun, kind, words and images.

    Other paths are checked on use.
    """
    content = _read_json(root / "tasks.json")
    entries = content.get("tasks") if isinstance(content, dict) else None
    entries = entries if isinstance(entries, list) else []
    if not 1 <= len(entries) <= MAX_TASKS or not all(isinstance(entry, dict) for entry in entries):
        raise ConceptError(f"'{root / 'tasks.json'}' must hold an object with the key tasks: "
                           f"a list of 1 to {MAX_TASKS} tasks, each an object")
    result = []
    for i, entry in enumerate(entries):
        where = f"task {i + 1}"
        noun, kind = entry.get("class_noun"), entry.get("kind", "object")
        if not isinstance(noun, str) or not noun.strip() or len(noun) > 64 or PLACEHOLDER.search(noun):
            raise ConceptError(f"class_noun of {where} is {noun!r}; allowed: "
                               "ordinary words, at most 64 letters")
        if kind not in KINDS:
            raise ConceptError(f"kind of {where} is {kind!r}; allowed: {', '.join(KINDS)}")
        images = _inside(root, entry.get("images"), f"images of {where}")
        words = _words(entry.get("tokens", []), where)
        result.append({**entry, "class_noun": " ".join(noun.split()), "kind": kind, "words": words,
                       "name": entry.get("name", images.name), "images": images})
    return _named(result)


def _named(entries: list[dict]) -> list[dict]:
    """Makes names unique and different from all words: `dog2` beside a word dog2 becomes `dog_2`."""
    words = [word for entry in entries for word in entry["words"]]
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise ConceptError(f"two tasks have the token '<{twice}>'; tokens must differ")
    taken = set(words)
    for i, entry in enumerate(entries):
        name = check_name(entry["name"], f"name of task {i + 1}")
        if name in words:
            stem = name.rstrip("0123456789")
            number = name.removeprefix(stem)
            name = f"{stem}_{number or 1}"
        if name in taken:
            raise ConceptError(f"name of task {i + 1} is {name!r}, which another task has; "
                               "names and tokens must differ")
        taken.add(name)
        entry["name"] = name
    return entries


def adjectives(captions: Sequence[str], class_noun: str) -> str:
    """The words directly before the class noun in every caption, without articles.

    For the duck toy these are "yellow rubber". Evaluation prompts also contain them, because they are part of
    the concept's description.
    """
    noun = rf"\b{re.escape(class_noun)}\b"
    before = [re.split(noun, caption, maxsplit=1, flags=re.IGNORECASE) for caption in captions]
    if not before or any(len(parts) < 2 for parts in before):
        return ""
    words = [parts[0].lower().split() for parts in before]
    count = 0
    while all(len(row) > count for row in words) and len({row[-1 - count] for row in words}) == 1:
        count += 1
    common = words[0][len(words[0]) - count:]
    return " ".join(word for i, word in enumerate(common) if not (i == 0 and word in ("a", "an", "the")))


def _prompts(root: Path, entry: Mapping, described: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Evaluation prompts with the placeholder, and the same with the class noun."""
    usual = "style" if entry["kind"] == "style" else "pet" if entry["class_noun"] in PETS else "plushy"
    file = _inside(root, entry.get("prompts", f"evaluation_prompts/test_{usual}.txt"),
                   f"prompts of '{entry['name']}'")
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        raise ConceptError(f"the prompts '{file}' of '{entry['name']}' are no text file of at most "
                           f"{MAX_BYTES} bytes")
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if TOKEN not in line or PLACEHOLDER.search(line.replace(TOKEN, ""))]
    if wrong or not lines:
        raise ConceptError(f"the prompts '{file}' must each name {TOKEN} and no other placeholder; "
                           + (f"one is {wrong[0][:80]!r}" if wrong else "there are none"))
    concept, noun = (f"{described} {word}".strip() for word in (f"<{entry['name']}>", entry["class_noun"]))
    with_concept, with_noun = (tuple(line.replace(TOKEN, word) for line in lines) for word in (concept, noun))
    return with_concept, with_noun


def assignment_of(root: Path, entry: Mapping) -> Assignment:
    """Loads the pictures of a checked task of tasks.json.

    References are centre squares of 512 pixels. No pictures are held out, because a concept has only 4 to 7.
    """
    captions = entry.get("captions")
    captions = None if captions is None else _inside(root, captions, f"captions of '{entry['name']}'")
    pictures = tuple(replace(p, caption=p.caption.splitlines()[0].strip() if p.caption else "")
                     for p in read_folder(entry["images"], captions).pictures)
    if len(pictures) < 2:
        raise ConceptError(f"'{entry['images']}' holds {len(pictures)} picture; "
                           "measuring a concept takes two or more")
    references = torch.stack([frame(picture, Framing(SIDE, flip=False)).pixels for picture in pictures])
    described = adjectives([picture.caption for picture in pictures], entry["class_noun"])
    prompts, noun_prompts = _prompts(root, entry, described)
    return Assignment(entry["name"], entry["class_noun"], entry["kind"], pictures, references, references[:0],
                      prompts, noun_prompts, entry["words"])


def read_tasks(folder: Path | str, count: int | None = None) -> tuple[Assignment, ...]:
    """Reads the first `count` tasks of a folder. A ConceptError names the invalid file or task."""
    root = Path(folder)
    if not root.is_dir():
        raise ConceptError(f"the data folder '{root}' does not exist; "
                           "it must hold tasks.json and the files it names")
    entries = _entries(root)
    if count is not None and count > len(entries):
        raise ConceptError(f"tasks is {count}, but '{root / 'tasks.json'}' holds {len(entries)}; allowed: "
                           f"1 to {len(entries)}")
    return tuple(assignment_of(root, entry) for entry in entries[:count])


def seeds_of(count: int, prompts: int) -> tuple[int, ...]:
    """Seeds of `count` pictures that cycle through the prompts: one seed per cycle."""
    return tuple(FIRST_SEED + i // prompts for i in range(count))


def _seeds(tasks: Sequence[Assignment], pictures: int) -> tuple[int, ...]:
    return seeds_of(pictures, min(len(task.prompts) for task in tasks))


def suite_of(backbone: DiffusersBackbone, tasks: Sequence[Assignment], encoder: Encoder, pictures: int,
             settings: SampleSettings, origin: Mapping) -> PromptSuite:
    """The prompt suite of a sequence. Its only judge is the encoder, and no real picture shows two concepts.

    Args:
        backbone: The base.
        tasks: Tasks in learning order.
        encoder: Measures similarity.
        pictures: Pictures per concept and evaluation; 1000 in the paper.
        settings: Sampling settings.
        origin: See PromptSuite.
    """
    groups, pairs = groups_and_pairs(tasks)
    group_seeds, pair_seeds = (tuple(FIRST_SEED + i for i in range(min(pictures, most)))
                               for most in (GROUP_PICTURES, PAIR_PICTURES))
    return PromptSuite(tuple(tasks), groups, pairs, COMBINED, unrelated_prompts(tasks), encoder,
                       {ENCODER: EncoderJudge(encoder, tasks)}, settings, _seeds(tasks, pictures),
                       group_seeds, pair_seeds, backbone.parameter_count,
                       noun_seeds=_seeds(tasks, min(pictures, NOUN_PICTURES)), origin=origin)
