"""Maps names to commands. A command takes the parsed options and returns a JSON value and lines of text."""

from __future__ import annotations

from argparse import Namespace

from .banks import bank
from .learning import learn
from .learning_all import learn_all
from .result import Result
from .sampling import sample

__all__ = ["bank", "demo", "learn", "learn_all", "sample"]


def demo(options: Namespace) -> Result:
    """Runs the demo and prints its main figures."""
    from .demo import run

    report = run(options.output, options.base)
    cidm, finetuning = report["methods"]["cidm"], report["methods"]["finetune"]
    lines = [
        f"learned {', '.join(f'<{name}>' for name in report['concepts'])} in {report['seconds']:.0f} s",
        "retained at the end: "
        f"CIDM {cidm['retention']:.0%}, sequential finetuning {finetuning['retention']:.0%}",
        f"both objects in their regions: {report['composition']['region_hits']:.0%}",
        f"wrote {options.output / 'report.png'}",
    ]
    return report, lines
