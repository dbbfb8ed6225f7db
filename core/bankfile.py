"""The bank's file: one `.safetensors`, format 1.

Header metadata `continual_concepts` is JSON: `{"version", "layout", "concepts": [{"info", "deltas", "encoders"}], "shared"}`.
Tensors: `concept/<i>/token.<encoder>`, `concept/<i>/<projection>.<part>` (see deltas.pack), `concept/<i>/cover` (bytes of a JPEG
or PNG), `shared/<method>/<name>`. Opening reads the header; a concept's tensors are read when it is used. Files are untrusted:
whatever does not fit is refused with one sentence.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .bank import ConceptBank, Entry, _cached
from .concepts import Concept, ConceptInfo
from .deltas import pack, unpack
from .errors import ConceptError
from .files import write_atomically
from .sites import SiteLayout
from .tokens import TokenGroup

METADATA_KEY = "continual_concepts"
VERSION = 1
SUFFIX = ".safetensors"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def save_bank(bank: ConceptBank, path: Path | str) -> None:
    """Writes the bank atomically. Every concept is read first, so a bank may be saved over the file it came from."""
    tensors: dict[str, Tensor] = {}
    records = []
    for i, concept in enumerate(bank):
        packed, notes = pack(concept.deltas, bank.layout)
        packed |= {f"token.{encoder}": vectors for encoder, vectors in concept.tokens.vectors.items()}
        if concept.cover:
            packed["cover"] = torch.frombuffer(bytearray(concept.cover), dtype=torch.uint8)
        tensors |= {f"concept/{i}/{name}": tensor.contiguous().cpu() for name, tensor in packed.items()}
        records.append({"info": concept.info.to_json(), "deltas": notes, "encoders": sorted(concept.tokens.vectors)})
    for method, state in bank.shared.items():
        tensors |= {f"shared/{method}/{name}": tensor.contiguous().cpu() for name, tensor in state.items()}
    header = {"version": VERSION, "layout": bank.layout.to_json(), "concepts": records, "shared": sorted(bank.shared)}
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True)}
    write_atomically(Path(path), lambda temporary: save_file(tensors, str(temporary), metadata))


def _read_header(path: Path) -> tuple[dict, list[str]]:
    if not path.is_file():
        raise ConceptError(f"there is no bank file '{path}'")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata, keys = file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ConceptError(f"'{path}' is not a readable .safetensors file ({error})") from error
    if METADATA_KEY not in metadata:
        raise ConceptError(f"'{path}' is a .safetensors file but not a concept bank: its metadata has no '{METADATA_KEY}'")
    try:
        header = json.loads(metadata[METADATA_KEY])
        version = header["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConceptError(f"the bank '{path}' has damaged metadata ({type(error).__name__})") from error
    if version != VERSION:
        raise ConceptError(f"the bank '{path}' has format version {version!r}; this version of Continual Concepts reads {VERSION}")
    return header, keys


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def open_bank(path: Path | str) -> ConceptBank:
    """Opens a bank by its header alone. Raises ConceptError for a missing, foreign, damaged or newer file."""
    path = Path(path)
    header, keys = _read_header(path)
    stamp = _stamp(path)
    try:
        layout = SiteLayout.from_json(header["layout"])
        entries = [_entry(path, stamp, layout, i, record) for i, record in enumerate(header["concepts"])]
        shared = _read_shared(path, keys)
        return ConceptBank(layout, tuple(entries), shared)
    except ConceptError as error:
        raise ConceptError(f"the bank '{path}' cannot be used: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConceptError(f"the bank '{path}' has damaged metadata ({type(error).__name__}: {error})") from error


def _entry(path: Path, stamp, layout: SiteLayout, i: int, record: dict) -> Entry:
    info = ConceptInfo.from_json(record["info"])
    return Entry(info, _cached(lambda: _read_concept(path, stamp, layout, i, info, record)))


def _read_concept(path: Path, stamp, layout: SiteLayout, i: int, info: ConceptInfo, record: dict) -> Concept:
    try:
        if _stamp(path) != stamp:
            raise ConceptError("the file changed on disk since it was opened; open it again")
        prefix = f"concept/{i}/"
        with safe_open(str(path), framework="pt") as file:
            tensors = {key[len(prefix):]: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        cover = bytes(tensors.pop("cover").numpy()) if "cover" in tensors else b""
        _check_numbers(tensors)
        vectors = {encoder: tensors[f"token.{encoder}"] for encoder in record["encoders"]}
        concept = Concept(info, TokenGroup(info.words, vectors), unpack(tensors, record["deltas"], layout), cover)
        concept.check_fits(layout)
        return concept
    except (ConceptError, KeyError, TypeError, ValueError, IndexError, AttributeError, OSError, SafetensorError) as error:
        raise ConceptError(f"concept '{info.name}' in '{path}' cannot be read: {error}") from error


def _check_numbers(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith(".indices"):
            if tensor.dtype != torch.int32:
                raise ConceptError(f"tensor '{name}' has type {tensor.dtype}; allowed: int32")
        elif tensor.dtype not in _FLOATS:
            raise ConceptError(f"tensor '{name}' has type {tensor.dtype}; allowed: float16, bfloat16, float32")
        elif not torch.isfinite(tensor).all():
            raise ConceptError(f"tensor '{name}' holds NaN or infinity")


def _read_shared(path: Path, keys: list[str]) -> dict[str, dict[str, Tensor]]:
    shared: dict[str, dict[str, Tensor]] = {}
    wanted = [key for key in keys if key.startswith("shared/")]
    if not wanted:
        return shared
    with safe_open(str(path), framework="pt") as file:
        for key in wanted:
            _, method, name = key.split("/", 2)
            shared.setdefault(method, {})[name] = file.get_tensor(key)
    return shared


def verify_bank(path: Path | str) -> list[str]:
    """Reads every concept of a bank; returns one line per concept. Raises ConceptError at the first fault."""
    bank = open_bank(path)
    return [f"{concept.name}: {len(concept.deltas)} deltas, {len(concept.info.words)} words, {concept.nbytes() / 1e6:.2f} MB" for concept in bank]
