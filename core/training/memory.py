"""On a processor, memory that one step frees stays with the process for the next one.

The C library gives large pieces back to the system as soon as they are freed, and every step gets them anew: the system clears each page
first. A step of Stable Diffusion 1.5 frees and asks for gigabytes; without this a tenth to a fifth of its time is spent in clearing.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

# glibc's numbers in malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD.
_LARGE, _FREE, _AHEAD = -3, -1, -2
_KEEPING = {_LARGE: 2**30, _FREE: 2**31 - 1, _AHEAD: 2**27}
# Where glibc's own adjustment ends in a process that has freed one large tensor.
_AFTER = {_LARGE: 2**25, _FREE: 2**26, _AHEAD: 2**17}


def _glibc() -> ctypes.CDLL | None:
    """The process's C library, where it is one that can be told."""
    if sys.platform != "linux":
        return None
    with suppress(OSError):
        library = ctypes.CDLL(None)
        if all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")):
            return library
    return None


_users, _lock = 0, threading.Lock()      # the C library is the process's: who came first begins, who goes last ends


def _enter(library: ctypes.CDLL) -> None:
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            for number, value in _KEEPING.items():
                library.mallopt(number, value)


def _leave(library: ctypes.CDLL) -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            for number, value in _AFTER.items():
                library.mallopt(number, value)
            library.malloc_trim(0)


@contextmanager
def kept_between_steps(device: torch.device) -> Iterator[None]:
    """Inside, freed memory is not given back; afterwards all of it is. Nothing on a graphics card, where torch keeps its own, and nothing
    where the C library is another than glibc. It changes no number that is computed."""
    library = _glibc() if torch.device(device).type == "cpu" else None
    if library is None:
        yield
        return
    _enter(library)
    try:
        yield
    finally:
        _leave(library)
