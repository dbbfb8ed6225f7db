"""`python -m continual_concepts.core` is the same as `continual-concepts`."""

import sys

from .cli import program

if __name__ == "__main__":
    sys.exit(program())
