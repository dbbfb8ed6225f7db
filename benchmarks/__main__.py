"""`python -m continual_concepts.benchmarks NAME`: figures by a command, from a clone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..core.cli.parser import run
from .continual import command as continual
from .cost import command as cost
from .pretraining import command as pretraining
from .regional import command as regional


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="continual_concepts.benchmarks", description="Measure what the project claims.")
    parser.set_defaults(json=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for room in (continual, regional, cost, pretraining):
        room.add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark. Returns the exit code, see `core.cli.parser.run`."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    return run(parser.prog, options.run, options, "stopped; what is finished is kept, and the same command continues from there")


if __name__ == "__main__":
    sys.exit(main())
