"""Maps names to commands. A command takes the parsed options and returns a JSON value and lines of text."""

from __future__ import annotations

import os
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

from .banks import bank
from .learning import learn
from .learning_all import learn_all
from .result import Result, complain
from .sampling import sample

NAME = "continual-concepts"

__all__ = ["bank", "demo", "learn", "learn_all", "sample"]


def demo(options: Namespace) -> Result:
    """Runs the demo and prints its main figures."""
    from .demo import BANK, PHOTOS, TASKS, WAYS, run
    from .demo_ways import Plan, plan_of

    plan = plan_of(options.base)
    minutes = "about two minutes" if plan.steps <= Plan.steps else "several minutes"
    promise = f"Three ways learn two dogs and a style, and draw them. This takes {minutes} on two free cores."
    report = run(options.output, plan, begins=lambda: complain(promise))
    lines = [f"three ways learned {', '.join(f'<{name}>' for name in report['concepts'])} in "
             f"{report['seconds']:.0f} s"]
    for way, figures in report["ways"].items():
        lines.append(f"{WAYS[way].title}: first concept retained {figures['retained']:.0%}, two dogs in one "
                     f"prompt {figures['pair_closed']:.0%} of the way, boxes right "
                     f"{figures['boxes_right']:.0%}")
    lines.append(f"wrote report.png, report.json, {BANK} and {PHOTOS} to {options.output}")
    lines.append(f'draw with the bank: {_own_command()} sample "a photo of <{next(iter(TASKS))}> on a beach" '
                 f"--bank {_quoted(str(options.output / BANK))} --output pictures")
    return report, lines


def _own_command() -> str:
    """How this program was started, such as `.venv/bin/continual-concepts` by `make demo`."""
    own = Path(sys.argv[0])
    if own.name == "__main__.py":
        return f"{_quoted(sys.executable)} -m continual_concepts.core"
    return _quoted(sys.argv[0]) if own.stem == NAME else NAME


def _quoted(text: str) -> str:
    """A part of a command line. Windows knows no single quotes, and its separators need none."""
    if os.name != "nt":
        return shlex.quote(text)
    return text if re.fullmatch(r"[\w\\/:.-]+", text) else f'"{text}"'
