"""`python -m continual_concepts.core` is the same as `continual-concepts`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
