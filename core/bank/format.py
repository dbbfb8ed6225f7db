"""The bank file, format 1 or 2: one `.safetensors` file with a JSON header.

The metadata key `continual_concepts` holds `{"version", "layout", "concepts": [...], "shared": [method,
...]}`.

A concept's record:
- `info`: name, class noun, method, words, kind, provenance and `composition`, how the concept acts together
  with others: `{"kind": "route" | "bound" | "sum" | "average", "merged": number or null}`, see `composition`.
  Files of the first version have no `composition`; the method then determines it. Readers of the first
  version ignore the field. `licence` and `author`, if they are stated; earlier versions ignore them. A share
  file of 0.2.0 states them in its metadata only, see `terms`.
- `deltas`: form and scale of its deltas, see `deltas.pack`. A file whose deltas include slots has format 2,
  every other one format 1, so that versions without slots refuse the former and read the latter.
- `encoders`: names of the text encoders that its words have vectors for.
- `stand_in`: the placeholder noun, if the words have one.

Tensors:
- `concept/<i>/token.<encoder>`, `concept/<i>/<projection>.<part>` (see `deltas.pack`);
- `concept/<i>/cover`: the thumbnail, bytes of a JPEG or PNG file;
- `shared/<method>/<name>`.

Opening a bank reads only the header. Tensors are read when first used. Files are untrusted: readers reject
anything invalid with a one-sentence error.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConceptError
from ..files import write_atomically
from ..model.deltas import pack, unpack
from ..model.sites import SiteLayout
from ..model.slots import SLOTS
from .bank import ConceptBank, Entry, _Cached
from .concepts import Concept, ConceptInfo
from .terms import Terms
from .tokens import TokenGroup

METADATA_KEY = "continual_concepts"
LONGEST_PLACEHOLDER_NOUN = 200
VERSION, WITHOUT_SLOTS = 2, 1
SUFFIX = ".safetensors"
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
          "U8": torch.uint8, "I8": torch.int8,
          "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_DAMAGE = (ConceptError, KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError,
           RuntimeError, OSError, SafetensorError)


def save_bank(bank: ConceptBank, path: Path | str, before: Callable[[], object] = lambda: None,
              further: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes the bank atomically. It may overwrite the file that it was opened from.

    Args:
        before: See `files.write_atomically`.
        further: Metadata for other readers, by key.

    Raises:
        ConceptError: The bank holds something that `open_bank` rejects (NaN, infinity, other types), or
            writing fails.
    """
    tensors: dict[str, Tensor] = {}
    records = []
    for i, concept in enumerate(bank):
        packed, notes = pack(concept.deltas, bank.layout)
        packed |= {f"token.{encoder}": vectors.detach().clone()
                   for encoder, vectors in concept.tokens.vectors.items()}
        _check_numbers(packed, f"concept '{concept.name}': ")
        if concept.thumbnail:
            packed["cover"] = torch.frombuffer(bytearray(concept.thumbnail), dtype=torch.uint8)
        tensors |= {f"concept/{i}/{name}": tensor.contiguous().cpu() for name, tensor in packed.items()}
        record = {"info": concept.info.to_json(), "deltas": notes, "encoders": sorted(concept.tokens.vectors)}
        if concept.tokens.placeholder_noun:
            record["stand_in"] = concept.tokens.placeholder_noun
        records.append(record)
    for method, state in bank.shared.items():
        if not all(torch.isfinite(tensor).all() for tensor in state.values()):
            raise ConceptError(f"the shared state of method '{method}' holds NaN or infinity")
        tensors |= {f"shared/{method}/{name}": tensor.detach().clone().contiguous().cpu()
                    for name, tensor in state.items()}
    version = VERSION if any(SLOTS in record["deltas"] for record in records) else WITHOUT_SLOTS
    header = {"version": version, "layout": bank.layout.to_json(), "concepts": records,
              "shared": sorted(bank.shared)}
    metadata = {**further, METADATA_KEY: json.dumps(header, sort_keys=True)}
    write_atomically(Path(path), lambda temporary: save_file(tensors, str(temporary), metadata), before)


def _read_header(path: Path) -> tuple[dict, list[str], Terms]:
    """The header, the names of the tensors, and the terms in the metadata."""
    if os.path.isdir(path):
        raise ConceptError(f"the bank '{path}' is a folder; give the path of a file")
    if not os.path.isfile(path):
        raise ConceptError(f"there is no bank file '{path}'")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata, keys = file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ConceptError(f"'{path}' is not a readable .safetensors file ({error})") from error
    if METADATA_KEY not in metadata:
        raise ConceptError(f"'{path}' is a .safetensors file but not a concept bank: its metadata has no "
                           f"'{METADATA_KEY}'")
    try:
        header = json.loads(metadata[METADATA_KEY])
        version = header["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConceptError(f"the bank '{path}' has damaged metadata ({type(error).__name__})") from error
    if version not in (WITHOUT_SLOTS, VERSION):
        raise ConceptError(f"the bank '{path}' has format version {reprlib.repr(version)}; this version of "
                           f"Continual Concepts reads {WITHOUT_SLOTS} and {VERSION}")
    return header, keys, Terms.from_metadata(metadata)


class _Tensors:
    """The tensors of a file whose header has been checked.

    Offsets are read once, because the header of a thousand concepts is megabytes. Tensors are copies, not
    views of the file, because the file may be replaced or truncated while they are in use.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, self._stamp(path)

    @staticmethod
    def _stamp(path: Path) -> tuple[int, int, int]:
        stat = path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    @cached_property
    def _places(self) -> dict[str, dict[str, tuple[torch.dtype, list[int], int, int]]]:
        """`concept/<i>` or `shared/<method>` -> rest of the name -> type, shape, first and last byte."""
        with self.path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
        places: dict[str, dict[str, tuple]] = {}
        for key, entry in header.items():
            if key != "__metadata__" and key.count("/") >= 2:
                group, owner, name = key.split("/", 2)
                first, last = entry["data_offsets"]
                place = _TYPES[entry["dtype"]], entry["shape"], start + first, start + last
                places.setdefault(f"{group}/{owner}", {})[name] = place
        return places

    def read(self, group: str) -> dict[str, Tensor]:
        if self._stamp(self.path) != self.stamp:
            raise ConceptError("the file changed on disk since it was opened; open it again")
        with self.path.open("rb") as file:
            return {name: _tensor(file, *place) for name, place in self._places.get(group, {}).items()}


def _tensor(file, dtype: torch.dtype, shape: list[int], first: int, last: int) -> Tensor:
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ConceptError(f"a tensor of shape {shape} has {last - first} bytes")
    file.seek(first)
    data = bytearray(file.read(last - first))
    return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.zeros(shape, dtype=dtype)


def open_bank(path: Path | str) -> ConceptBank:
    """Opens a bank by reading its header. Raises ConceptError for a missing, foreign, damaged or newer file.
    """
    path = Path(path)
    header, keys, terms = _read_header(path)
    file = _Tensors(path)
    try:
        layout = SiteLayout.from_json(header["layout"])
        infos = [ConceptInfo.from_json(record["info"]) for record in header["concepts"]]
        if len(infos) == 1:
            infos = [replace(infos[0], terms=infos[0].terms.filled(terms))]
        entries = [_entry(file, layout, i, *pair)
                   for i, pair in enumerate(zip(infos, header["concepts"], strict=True))]
        return ConceptBank(layout, tuple(entries), _shared_states(file, keys))
    except ConceptError as error:
        raise ConceptError(f"the bank '{path}' cannot be used: {error}") from error
    except _DAMAGE as error:
        raise ConceptError(f"the bank '{path}' has damaged metadata ({type(error).__name__}: "
                           f"{error})") from error


def _entry(file: _Tensors, layout: SiteLayout, i: int, info: ConceptInfo, record: dict) -> Entry:
    return Entry(info, _Cached(lambda: _read_concept(file, layout, i, info, record)))


def _read_concept(file: _Tensors, layout: SiteLayout, i: int, info: ConceptInfo, record: dict) -> Concept:
    try:
        tensors = file.read(f"concept/{i}")
        thumbnail = _thumbnail(tensors.pop("cover")) if "cover" in tensors else b""
        _check_numbers(tensors)
        vectors = {encoder: tensors[f"token.{encoder}"] for encoder in record["encoders"]}
        concept = Concept(info, TokenGroup(info.words, vectors, _placeholder_noun(record)),
                          unpack(tensors, record["deltas"], layout), thumbnail)
        concept.check_fits(layout)
        return concept
    except _DAMAGE as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ConceptError(f"concept '{info.name}' in '{file.path}' cannot be read: {reason}") from error


def _placeholder_noun(record: dict) -> str:
    text = record.get("stand_in", "")
    if not isinstance(text, str) or len(text) > LONGEST_PLACEHOLDER_NOUN:
        raise ConceptError(f"its words' placeholder noun is {str(text)[:80]!r}; allowed: a text of up to "
                           f"{LONGEST_PLACEHOLDER_NOUN} characters")
    return text


def _thumbnail(tensor: Tensor) -> bytes:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise ConceptError(f"the thumbnail is a {tensor.ndim}-dimensional {tensor.dtype} tensor; allowed: "
                           "bytes")
    return bytes(tensor.numpy())


def _check_numbers(tensors: Mapping[str, Tensor], owner: str = "") -> None:
    for name, tensor in tensors.items():
        if name.endswith(".indices"):
            if tensor.dtype != torch.int32:
                raise ConceptError(f"{owner}tensor '{name}' has type {tensor.dtype}; allowed: int32")
        elif tensor.dtype not in _FLOATS:
            raise ConceptError(f"{owner}tensor '{name}' has type {tensor.dtype}; allowed: float16, bfloat16, "
                               "float32")
        elif not torch.isfinite(tensor).all():
            raise ConceptError(f"{owner}tensor '{name}' holds NaN or infinity")


class _SharedState(Mapping):
    """A method's shared tensors, all read when the first one is used."""

    def __init__(self, file: _Tensors, method: str, names: list[str]) -> None:
        self._file, self._method, self._names = file, method, names
        self._tensors: dict[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._tensors is None:
            try:
                self._tensors = self._file.read(f"shared/{self._method}")
                if not all(torch.isfinite(tensor).all() for tensor in self._tensors.values()):
                    raise ConceptError("it holds NaN or infinity")
            except _DAMAGE as error:
                self._tensors = None
                raise ConceptError(f"the shared state of method '{self._method}' in '{self._file.path}' "
                                   f"cannot be read: {error}") from error
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _shared_states(file: _Tensors, keys: list[str]) -> dict[str, Mapping[str, Tensor]]:
    names: dict[str, list[str]] = {}
    for key in keys:
        if key.startswith("shared/"):
            _, method, name = key.split("/", 2)
            names.setdefault(method, []).append(name)
    return {method: _SharedState(file, method, of_method) for method, of_method in names.items()}


def verify_bank(path: Path | str) -> list[str]:
    """Reads a whole bank; returns one line per concept. Raises ConceptError at the first fault."""
    bank = open_bank(path)
    for state in bank.shared.values():
        dict(state)
    return [f"{concept.name}: {len(concept.deltas)} deltas, {len(concept.info.words)} words, "
            f"{concept.nbytes() / 1e6:.2f} MB"
            for concept in bank]
