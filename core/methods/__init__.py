"""Methods by name. Adding one: a file here, its name in the list below, a test file."""

from . import (
    cidm,
    clora,
    cns,
    finetune,
)
from .base import METHODS, Method, Task, get, make

__all__ = ["METHODS", "Method", "Task", "cidm", "clora", "cns", "finetune", "get", "make"]
