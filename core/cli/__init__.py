"""The command line `continual-concepts`."""

from .parser import main

__all__ = ["main"]
