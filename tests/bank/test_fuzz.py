"""Damaged files and texts: each is read or refused with one sentence, quickly and in little memory.

A few hundred damaged inputs per reader here, 20,000 each with `make verify`. Every one is made from a sound
input and a seed.
"""

from __future__ import annotations

import json
import math
import random
import resource
import struct
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import METADATA_KEY, open_bank, save_bank, verify_bank
from continual_concepts.core.bank.prompts import Vocabulary, caption_with_placeholder
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.interop.embedding_file import read_embedding
from continual_concepts.core.interop.importing import import_concept
from continual_concepts.core.interop.kohya import kohya_state
from continual_concepts.core.interop.lora_file import read_lora
from continual_concepts.core.interop.peft_config import HEADER
from continual_concepts.core.regional.drawing import parse_regions
from continual_concepts.core.training import checkpoint
from continual_concepts.tests.lora_files import peft, written

LONGEST, LARGEST = 5.0, 300 << 20      # seconds and bytes that one input may take
VALUES = [None, True, -1, 0, 1.5, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x", "../../etc",
          "a\0b", "\ud800", "é" * 300,
          [], {}, [[]], {"a": {}}, [0] * 50, "F32", [2, 3], [0, 24], [-1, 5], "concept/0/to_q.up", "<rex>",
          1e308]


def deep(levels: int):
    found = []
    for _ in range(levels):
        found = [found]
    return found


def changed(value, dice: random.Random):
    """JSON with one random change: another value, or a part removed, repeated or renamed."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key, found = dice.choice(list(value)), dict(value)
        how = dice.random()
        if how < 0.1:
            del found[key]
        elif how < 0.15:
            found[str(dice.choice(VALUES))] = found[key]
        else:
            found[key] = changed(value[key], dice)
        return found
    if isinstance(value, list) and value and dice.random() < 0.85:
        place, how = dice.randrange(len(value)), dice.random()
        if how < 0.1:
            return value[:place] + value[place + 1:]
        if how < 0.2:
            return value[:place] + [value[place]] * dice.choice((2, 100)) + value[place:]
        return [*value[:place], changed(value[place], dice), *value[place + 1:]]
    return deep(dice.choice((3, 5000))) if dice.random() < 0.02 else dice.choice(VALUES)


def as_json(value) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 100_000


def parts_of(data: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + size]), data[8 + size:]


def joined(header, tensors: bytes) -> bytes:
    text = as_json(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + tensors


def damaged(data: bytes, dice: random.Random, key: str | None) -> bytes:
    """A damaged safetensors file: in its bytes, its header, or the JSON under `key` of its metadata."""
    how = dice.random()
    if how < 0.25:
        found = bytearray(data)
        for _ in range(dice.choice((1, 1, 4, 40))):
            found[dice.randrange(len(found))] = dice.randrange(256)
        return bytes(found)
    if how < 0.35:
        cut = dice.randrange(len(data))
        return data[:cut] if dice.random() < 0.7 else data[:cut] + bytes(dice.randrange(64)) + data[cut:]
    header, tensors = parts_of(data)
    if how < 0.6 or key is None:
        return joined(changed(header, dice), tensors)
    inner = json.loads(header["__metadata__"][key])
    for _ in range(dice.choice((1, 1, 2, 5))):
        inner = changed(inner, dice)
    return joined(header | {"__metadata__": {key: as_json(inner)}}, tensors)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def survives(read, inputs) -> tuple[int, int]:
    """Counts refused and read inputs. Other errors, short messages, much time or memory fail."""
    refused = read_well = 0
    before = peak()
    for number, make in enumerate(inputs):
        began = time.perf_counter()
        try:
            read(make())
            read_well += 1
        except ConceptError as error:
            refused += 1
            assert 10 < len(str(error)) < 3000, f"input {number}: {str(error)[:100]}"
        except Exception as error:      # noqa: BLE001 - that there is none is what is tested
            pytest.fail(f"input {number}: {type(error).__name__}: {error}")
        assert time.perf_counter() - began < LONGEST, f"input {number}"
    assert peak() - before < LARGEST
    return refused, read_well


@pytest.fixture(scope="module")
def bank(layout, make_concept):
    bank = ConceptBank(layout).add(make_concept(layout, "rex", 1, thumbnail=b"\xff\xd8\xff"))
    bank = bank.add(make_concept(layout, "mimi", 2))
    return bank.add(make_concept(layout, "ink", 3), {"cidm": {"0-to_q": torch.ones(2, 3)}})


def of_file(data: bytes, path, key: str | None, count: int, seed: int):
    """Damaged copies of a file, each written to `path`."""
    def make(number: int):
        path.write_bytes(damaged(data, random.Random(f"{seed} {number}"), key))
        return path

    return (lambda number=number: make(number) for number in range(count))


def test_banks(bank, tmp_path, trials):
    path = tmp_path / "bank.safetensors"
    save_bank(bank, path)

    def read(file) -> None:
        verify_bank(file)
        opened = open_bank(file)
        save_bank(opened, tmp_path / "again.safetensors")      # what can be read can be written

    refused, read_well = survives(read,
                                  of_file(path.read_bytes(), path, METADATA_KEY, trials(400, 20_000), 1))
    assert refused > read_well > 0


def test_loras(bank, layout, tmp_path, trials):
    path = tmp_path / "some.safetensors"
    words = {"bundle_emb.rex.clip_l": torch.ones(2, 3), "bundle_emb.rex.clip_g": torch.ones(2, 2)}
    state = kohya_state(layout, bank["rex"].deltas) | words
    save_file(state, path, {"ss_network_dim": "2"})

    def read(file) -> None:
        found = import_concept("some", "dog", "object", layout, lora=file)
        bank.add(found.concept)

    refused, read_well = survives(read, of_file(path.read_bytes(), path, None, trials(400, 20_000), 2))
    assert refused > 0 < read_well and read_lora      # an odd tensor more is left out, so some are read


def test_loras_of_other_forms(layout, tmp_path, trials):
    path = tmp_path / "some.safetensors"
    config = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": 4}, "unet.peft_type": "LORA"}

    def zeros(site: int, projection: str) -> torch.Tensor:
        return torch.zeros(layout.sites[site].shape(projection))

    encoders = [SimpleNamespace(name=name, ids=len, vectors=lambda ids, width=width: torch.ones(1, width))
                for name, width in layout.text_widths]

    def read(file) -> None:
        import_concept("some", "dog", "object", layout, encoders, file, trigger="dog")

    for seed, state in enumerate((written("loha", layout, zeros)[0], written("diff", layout, zeros)[0],
                                  peft(layout, zeros, "unet.")[0])):
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        save_file(tensors, path, {HEADER: json.dumps(config)})
        inputs = of_file(path.read_bytes(), path, HEADER, trials(150, 10_000), 20 + seed)
        refused, read_well = survives(read, inputs)
        assert refused > 0 < read_well


def test_embeddings(layout, tmp_path, trials):
    path = tmp_path / "some.safetensors"
    save_file({"clip_l": torch.ones(2, 3), "clip_g": torch.ones(2, 2)}, path)
    refused, read_well = survives(lambda file: import_concept("some", "", "object", layout, embedding=file)
                                  and read_embedding(file),
                                  of_file(path.read_bytes(), path, None, trials(400, 20_000), 3))
    assert refused > 0 < read_well


def test_checkpoints(tmp_path, trials):
    path = tmp_path / "run.checkpoint"
    state = {"identity": {"concept": "rex"}, "modules": {"a": torch.ones(2)}, "optimizer": {0: (1, [2.0])},
             "losses": [1.0, 2.0]}
    checkpoint.save(path, state)
    key = next(iter(parts_of(path.read_bytes())[0]["__metadata__"]))

    def read(file) -> None:
        assert isinstance(checkpoint.identity(file), dict | list | str | int | float | type(None))
        checkpoint.load(file)

    refused, read_well = survives(read, of_file(path.read_bytes(), path, key, trials(400, 20_000), 4))
    assert refused > 0 < read_well


def texts(sound: list[str], count: int, seed: int):
    alphabet = "<>{}[]\\/\"'`~!@#$%^&*()-_=+,.:;?| \n\t\0\u200b\u202e\ud800abcXYZ019éß中🐕"

    def make(number: int) -> str:
        dice = random.Random(f"{seed} {number}")
        text = dice.choice(sound)
        for _ in range(dice.choice((1, 3, 30))):
            cut = dice.randrange(len(text) + 1)
            inserted = "".join(dice.choice(alphabet) for _ in range(dice.choice((1, 1, 5))))
            text = text[:cut] + inserted + text[cut + dice.randrange(3):]
        return text * dice.choice((1, 1, 1, 50))

    return (lambda number=number: make(number) for number in range(count))


def test_prompts_and_captions(bank, trials):
    vocabulary = Vocabulary(bank.infos.values())

    def read(text: str) -> None:
        caption_with_placeholder(text, "rex", text[:12])
        weighted = vocabulary.parse(text).weighted
        texts = [piece for piece, _ in weighted if isinstance(piece, str)]
        assert all(texts) and sum(map(len, texts)) <= len(text)
        assert all(math.isfinite(weight) for _, weight in weighted)

    sound = ["a photo of <rex> on a beach", "<mimi> and <ink-1>", "(<rex>:1.2), a [dog]",
             "embedding:rex <lora:x:1>", ""]
    refused, read_well = survives(read, texts(sound, trials(2000, 20_000), 5))
    assert refused > 0 < read_well


def test_drawings(trials):
    sound = [{"prompt": "<rex>", "box": [0.0, 0.0, 0.5, 1.0], "name": "dog", "color": "#aabbcc",
              "strength": 1, "on": True},
             {"prompt": "a cat", "box": [0.5, 0.0, 1.0, 1.0], "negative": "x", "start": 0.0, "end": 1.0,
              "feather": 0.1}]

    def make(number: int) -> str:
        dice = random.Random(f"6 {number}")
        text = as_json(changed(sound, dice))
        return text if dice.random() < 0.8 else text[:dice.randrange(len(text) + 1)]

    refused, read_well = survives(parse_regions,
                                  (lambda number=number: make(number)
                                   for number in range(trials(2000, 20_000))))
    assert refused > 0 < read_well


def test_the_harness_sees_what_is_wrong():
    """Or none of the above could fail."""
    def crash(value):
        raise KeyError(value)

    def short(value):
        raise ConceptError("no")

    for reader in (crash, short):
        with pytest.raises((pytest.fail.Exception, AssertionError)):
            survives(reader, [lambda: 1])
