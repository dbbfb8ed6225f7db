"""Checkpoints: safetensors with the nested structure as JSON. Resuming is exact. Loading executes no code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ConceptError, WriteError
from ..files import beside, distinct, shortened, write_atomically, write_elsewhere

KEY = "continual_concepts_checkpoint"
_TENSOR, _TUPLE, _DICT = "__tensor__", "__tuple__", "__items__"


def _flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Returns the JSON of a nested value. Adds its tensors to `tensors` under consecutive numbers."""
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: key}
    if isinstance(value, dict):      # keys may be integers (optimiser state), which JSON objects cannot hold
        return {_DICT: [[key, _flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_flatten(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_flatten(item, tensors) for item in value]
    return value


def _restore(value: Any, read) -> Any:
    if isinstance(value, list):
        return [_restore(item, read) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return read(value[_TENSOR])
    if _TUPLE in value:
        return tuple(_restore(item, read) for item in value[_TUPLE])
    return {key: _restore(item, read) for key, item in value[_DICT]}


def _writer(state: dict[str, Any]) -> Callable[[Path], None]:
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_flatten(state, tensors))
    return lambda path: save_file(tensors, str(path), {KEY: structure})


def file_beside(bank: Path, name: str) -> Path:
    """The checkpoint of a run that adds a concept to a bank file: a hidden file beside it."""
    return beside(bank, f".{shortened(distinct(name), 100)}.checkpoint")


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically, so that the previous one survives a crash."""
    write_atomically(Path(path), _writer(state))


def save_somewhere(path: Path, state: dict[str, Any]) -> None:
    """Writes the checkpoint of an interrupted run. Raises WriteError if it had to be written elsewhere."""
    write = _writer(state)
    try:
        write_atomically(Path(path), write)
    except WriteError as error:
        other = write_elsewhere(Path(path), write)
        if other is None:
            raise
        raise WriteError(f"{error}; the interrupted run is kept in '{other}'; move it to '{path}' and run "
                         "again to resume") from error


def identity(path: Path) -> dict:
    """Reads the identity of a checkpoint's run (record.run_identity) from the header; empty for other files.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            structure = json.loads((file.metadata() or {})[KEY])
        return _restore(dict(structure[_DICT])["identity"], None)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
        return {}


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint. Raises ConceptError for a file that `save` did not write."""
    try:
        with safe_open(str(path), framework="pt") as file:
            structure = json.loads((file.metadata() or {})[KEY])
            # copies: views into a file have odd addresses, where sums may be rounded differently
            return _restore(structure, lambda key: file.get_tensor(key).clone())
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        reason = type(error).__name__
        raise ConceptError(f"'{path}' is not a checkpoint of a learning run ({reason}); delete it to start "
                           "again") from error
