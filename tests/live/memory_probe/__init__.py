"""A node for the soak test's server: how much memory its process has in use.

What a process holds (its resident size) also counts what the C library keeps for later, in pieces too small
to give back; that differs from run to run and says nothing about leaks.
"""

import ctypes
import gc


class _Info(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd",
                                                     "usmblks", "fsmblks", "uordblks",
                                                     "fordblks", "keepcost")]


def used() -> int:
    """Bytes in use, of all arenas and mappings; 0 where the C library does not say."""
    gc.collect()
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = _Info
    found = ask()
    return found.uordblks + found.hblkhd


class MemoryProbe:
    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "tests", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):  # noqa: N802
        return float("nan")

    def look(self):
        return {"ui": {"used": [used()]}}


NODE_CLASS_MAPPINGS = {"MemoryProbe": MemoryProbe}
