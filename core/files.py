"""Atomic writing of files."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .errors import ConceptError


def write_atomically(path: Path, write: Callable[[Path], object],
                     before: Callable[[], object] = lambda: None) -> None:
    """Writes a file so that readers see either the old or the new one. If anything fails, the old one stays.

    Args:
        write: Writes to the given temporary path. The complete file is then renamed to `path`.
        before: Called when the new file is complete, before it replaces the old one.

    Raises:
        ConceptError: The folder cannot be made or the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConceptError(f"cannot make the folder '{path.parent}': {error.strerror}") from error
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        # safetensors makes files that only their owner can read. Keep the old file's permissions; new files
        # get the default.
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        before()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:      # safetensors reports a full disk as its own error
        raise ConceptError(f"cannot write '{path}': {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable where the system can open folders (not on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
