"""`python -m continual_concepts.benchmarks NAME`: measures this project's figures, from a clone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..core.cli.arguments import Parser
from ..core.cli.result import run
from .continual import command as continual
from .cost import command as cost
from .gpu import command as gpu
from .likeness import command as likeness
from .pretraining import command as pretraining
from .refine import command as refine
from .regional import command as regional

PROGRAM = "continual_concepts.benchmarks"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Measure the figures that this project reports.")
    parser.set_defaults(json=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for room in (continual, refine, likeness, regional, cost, gpu, pretraining):
        room.add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark. Returns the exit code, see `core.cli.result.run`."""
    options = build_parser().parse_args(arguments)
    stopped = "stopped; finished runs are saved, and the same command continues from there"
    return run(PROGRAM, options.run, options, stopped)


if __name__ == "__main__":
    sys.exit(main())
