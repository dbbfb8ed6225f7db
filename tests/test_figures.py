"""Figures in documents are those of the committed results.

Each entry of FIGURES is a piece of a document in which braces stand for figures of `benchmarks/results`. So a
document that differs from a result fails, and so does a result that was made anew without its documents.
Sections of the continual benchmark are filled by its command, see tests/benchmarks/test_committed_runs.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = {"README.md": ROOT / "README.md", **{path.name: path for path in (ROOT / "docs").glob("*.md")}}


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def per_cent(value: float) -> str:
    """A share in whole per cent, with a real minus sign."""
    return f"{100 * value:.0f}".replace("-", "−")


def of_demo() -> Iterable[tuple[str, str]]:
    ways = result("demo")["ways"]
    ours, stacked, sequence = ways["ours"], ways["stacked"], ways["sequence"]

    def cells(of: Callable[[dict], str]) -> list[str]:
        return [of(way) for way in (ours, stacked, sequence)]

    alone = cells(lambda way: " and ".join(per_cent(share) for share in way["gap_closed"][:2]) + " %")
    pair, boxes = (cells(lambda way, key=key: f"{per_cent(way[key])} %")      # type: ignore[misc]
                   for key in ("pair_closed", "boxes_right"))
    style = cells(lambda way: f"{per_cent(way['gap_closed'][2])} %")
    yield "README.md", f"| each dog alone | {alone[0]} | {alone[1]} | {alone[2]}: the first is forgotten |"
    yield "README.md", f"| both dogs in one prompt | {pair[0]} | {pair[1]}: their looks mix | {pair[2]} |"
    yield "README.md", f"| one dog in each of two boxes: right | {boxes[0]} | {boxes[1]} | {boxes[2]} |"
    yield "README.md", f"| a style | {style[0]} | {style[1]} | {style[2]} |"
    yield "README.md", f"{result('demo')['steps']} steps of four pictures, one seed"
    of_base = result("bases")["bases"]["embedded-128"]
    assert len(of_base["runs"]) == 2
    dogs = " and ".join(per_cent(of_base["gap_closed"][name]) for name in ("rex", "fido"))
    yield "README.md", "[Two seeds with more drawing steps]"
    yield "README.md", (f"gave {dogs} % for the dogs alone, {per_cent(of_base['pair_closed'])} % for both, "
                        f"and {per_cent(of_base['boxes_right'])} % of the boxes.")


def of_regions() -> Iterable[tuple[str, str]]:
    quality, cost = result("regional")["quality"], result("regional")["cost"]
    names = {"ours": "**ours** | 0.7 / 1 | word-bound",
             "feathered": "ours with soft edges | 0.7 / 1 | word-bound",
             "one_pass": "region attention alone | off | word-bound",
             "found": "`find_regions`, no boxes | off | word-bound",
             "prompt": "one prompt that names all | off | word-bound",
             "masked": "masked conditioning | off | CIDM's",
             "hooks": "LoRA hooks, K evaluations a step | off | CIDM's",
             "couple": "Attention Couple | off | CIDM's"}
    for way, name in names.items():
        cells = [f"{100 * row['hit_rate']:.0f} / {100 * row['missing']:.0f}" for row in quality[way].values()]
        border = quality[way]["4"].get("border") or 0
        shown = f"{border:.2f}" if border and way not in ("found", "prompt") else ""
        yield "regions.md", f"| {name} | {' | '.join(cells)} | {shown} |"
    four = {way: f"{100 * quality[way]['4']['hit_rate']:.0f} %" for way in quality}
    yield "nodes.md", (f"{four['ours']} of the regions show the right individual. One prompt that "
                       f"names all concepts reaches {four['prompt']}. With CIDM's concepts, LoRA hooks reach "
                       f"{four['hooks']} and Attention Couple reaches {four['couple']}.")
    regions, hooks, routed = cost["regions"], cost["hooks"], cost["routed"]["4"]["over_plain"]
    steps, peaks = (" | ".join(f"{row[key]:.2f}" for row in regions.values())
                    for key in ("over_plain", "peak_over_plain"))
    yield "regions.md", f"layer-wise words) | {steps}"
    yield "regions.md", f"the same with prompt-activated concepts | | {routed:.2f} | |"
    yield "regions.md", f"peak memory | {peaks}"
    yield "regions.md", f"LoRA hooks | {hooks['2']['over_plain']:.2f} | {hooks['4']['over_plain']:.2f} | |"
    covering = "2, 4 or 8 regions that cover the picture, word-bound or prompt-activated"
    for name, row in (("plain", cost["plain"]), ("two concepts in a prompt, no regions", cost["prompt"]["2"]),
                      *((covering, row) for row in regions.values())):
        relative = row.get("operations_over_plain")
        yield "regions.md", f"| {name} | {row['operations']} | {f'{relative:.2f}' if relative else 1} |"
    pictures = result("regional")["pictures"]
    for layout, kinds in pictures["steps"].items():
        shown = [*kinds.values(), *pictures["pictures"][layout].values()]
        yield "regions.md", f"| {layout} | {' | '.join(f'{value:.2f}' for value in shown)} |"
    quarters, narrow = pictures["pictures"]["4 quarters"], pictures["pictures"]["8 columns"]
    usual, default = "0.7 / 1", "0.4 / 0"
    yield "nodes.md", (f"takes {quarters[usual]:.2f} times as long as a plain picture with the same "
                       f"settings (0.7 and 1), and {quarters[default]:.2f} times with the node's defaults. "
                       f"With eight narrow columns it takes {narrow[usual]:.2f} and {narrow[default]:.2f} "
                       "times as long. A step with LoRA hooks in four regions takes "
                       f"{hooks['4']['over_plain']:.1f} times as long as a plain step")


def of_training() -> Iterable[tuple[str, str]]:
    whole = result("training")
    for key, name in (("bound", "`bound`"), ("bound, one copy", "`bound`, one vector per word"),
                      ("cidm", "`cidm`"), ("cidm, one copy", "`cidm`, one vector per word"),
                      ("clora", "`clora`")):
        row = whole["rows"][key]
        cells = [f"{row['forward_seconds']:.2f} + {row['text_seconds']:.2f}", f"{row['step_seconds']:.2f}",
                 f"{row['step_over_forwards']:.2f}", f"{row['faster_than_core']:.1f}",
                 f"{row['faster_than_core_without_checkpointing']:.1f}", f"{row['faster_than_peft']:.2f}",
                 f"{row['peak_gb']:.1f}"]
        yield "cost.md", f"| {name} | {' | '.join(cells)} |"
        if "hundred_over_one" in row:
            yield "cost.md", f"| {row['hundred_over_one']:.3f} | {row['peak_hundred_over_one']:.3f} |"
    core, plain = whole["core"], whole["core_without_checkpointing"]
    yield "cost.md", f"{core['step_seconds']:.1f} s a step and {core['peak_gb']:.1f} GB"
    yield "cost.md", f"{plain['step_seconds']:.1f} s and {plain['peak_gb']:.1f} GB"
    yield "nodes.md", (f"takes {whole['step_over_forwards']:.1f} times as long as its forward passes. This "
                       f"is {whole['faster_than_core']:.1f} times as fast as ComfyUI's *Train LoRA* with its "
                       f"defaults, and {whole['faster_than_core_without_checkpointing']:.1f} times as fast")
    for name, row in result("training-words")["rows"].items():
        yield "cost.md", (f"| `{name}` | {row['forward_seconds']:.1f} + {row['text_seconds']:.1f} | "
                          f"{row['step_seconds']:.1f} | {row['step_over_unet']:.2f} | "
                          f"{row['step_over_forwards']:.2f} | {row['peak_gb']:.1f} |")


def of_many_concepts() -> Iterable[tuple[str, str]]:
    sums, bank, large = result("aggregation"), result("bank"), result("large-bank")
    apply = sums["apply_seconds"]
    yield "cost.md", f"*sharp* {apply['sharp']:.2f} s"
    yield "cost.md", f"*equal* {apply['equal']:.2f} s"
    yield "cost.md", f"as published code does it, *equal* takes {sums['naive_seconds']:.1f} s"
    yield "cost.md", f"*paper* {apply['paper']:.1f} s, *released* {apply['released']:.1f} s"
    yield "cost.md", f"in the weights: {sums['sampling_over_plain']:.3f} of a plain one"
    opened = f"{bank['open_seconds']:.2f} s"
    yield "cost.md", f"opens and lists in {opened}, and one of them is read in {bank['one_seconds']:.2f} s"
    yield "cost.md", f"One concept of `bound` is {bank['concept_mb']:.2f} MB on SD1.5"
    yield "nodes.md", f"opens in {opened}; one concept of `bound` is {bank['concept_mb']:.1f} MB"
    for name, key, form in (("opening the file and listing its concepts", "open", ".4f"),
                            ("opening it and drawing a picture of two concepts, 16 steps", "sample", ".3f"),
                            ("a step of learning a further concept", "train", ".4f")):
        row, digits = large[key], ".1f" if key == "open" else ".2f"
        yield "benchmark.md", (f"| {name} | {row['small']:{form}} | {row['large']:{form}} | "
                               f"{row['ratio']:{digits}} |")
    yield "benchmark.md", f"The file of {large['concepts']} concepts has {large['bytes'][1] / 1e6:.1f} MB"


def of_single_benchmarks() -> Iterable[tuple[str, str]]:
    refined = result("refine")
    for key, name in (("before", "before"), ("refined", "**refined**"),
                      ("without_replay", "refined without replay"), ("new_only", "new only"),
                      ("at_once", "at once")):
        row = refined["summary"][key]
        yield "benchmark.md", (f"| {name} | {row['old']:.3f} | {row['new']:.3f} | {row['retained']:.3f} | "
                               f"{row['gained']:.3f} |")
    yield "photos.md", (f"kept {refined['summary']['refined']['retained']:.2f} of their likeness to the old "
                        "photos. Their likeness to the new photos was "
                        f"{refined['summary']['refined']['gained']:.2f} of what")
    names = ("rex", "mimi", "blueprint", "crimson")
    kept, gained = ({name: " and ".join(f"{part['refined'][half] / part[whole][half]:.2f}"
                                        for part in refined["parts"] if part["concept"] == name)
                     for name in names} for whole, half in (("before", "old"), ("at_once", "new")))
    yield "benchmark.md", f"*retained* is {kept['rex']} for the dog, {kept['mimi']} for the cat"
    yield "benchmark.md", (f"{kept['blueprint']} for the style `<blueprint>` and {kept['crimson']} for "
                           "`<crimson>`")
    yield "benchmark.md", f"*gained* is {gained['rex']}, {gained['mimi']}"
    yield "benchmark.md", f"{gained['blueprint']}, and {gained['crimson']}"
    yield "benchmark.md", f"already reaches {refined['summary']['before']['gained']:.2f} of"
    yield "benchmark.md", f"*retained* is {refined['summary']['without_replay']['retained']:.2f}"
    for method, row in result("compose")["methods"].items():
        style, thing = row["style_of_thing"], row["thing_wearing"]
        yield "benchmark.md", (f"| `{method}` | {style['object']:.2f} | {style['style']:.2f} | "
                               f"{thing['object']:.2f} | {thing['cap']:.2f} |")
    photos = result("photo-encoder")
    yield "benchmark.md", (f"on the {photos['photos']} photos of the ten concepts of CIFC, seven things and "
                           f"three styles, without training. All {photos['identified']} photos")
    yield "benchmark.md", f"with a probability of {photos['auc']:.3f} (AUC)"
    yield "benchmark.md", f"with the same class noun it is {photos['auc_of_one_noun']:.3f}"
    yield "benchmark.md", f"only {100 * photos['as_its_crop']['one thing']:.1f} % of the pairs of one thing"
    for file, name in (("base", "`embedded-128` (20 steps, guidance 4)"),
                       ("base-dit", "`embedded-dit` (the same)"),
                       ("base-joint", "`embedded-joint` (the same)")):
        drawn = result(file)["generated"]
        yield "embedded-base.md", f"| {name} | {drawn['class']:g} | {drawn['colour']:g} | {drawn['both']:g} |"
    for name, row in result("bases")["bases"].items():
        shares = [*row["gap_closed"].values(), row["pair_closed"], row["boxes_right"]]
        cells = [*(f"{share:.2f}" for share in shares), f"{row['retained']:g}", f"{row['base_change']:g}"]
        yield "embedded-base.md", f"| `{name}`, {row['steps']} steps | {' | '.join(cells)} |"
    neurons = result("neurons")
    shares, general = neurons["shares"], neurons["general"]
    rows, entries = "activation-row", "activation-weight"
    yield "methods.md", (f"share {100 * shares[rows][-1]:.0f} % of the rows and "
                         f"{100 * shares[entries][-1]:.0f} % of the entries; half of the prompts share "
                         f"{100 * general[rows][-1]:.0f} % and {100 * general[entries][-1]:.0f} %")
    halves = sorted(100 * general[f"gradient-{unit}"][-1] for unit in ("row", "weight"))
    yield "methods.md", f"half of them {halves[0]:.0f} to {halves[1]:.0f} %"


def of_likeness() -> Iterable[tuple[str, str]]:
    def seconds(value: float | None) -> str:
        return "not reached" if value is None else f"{value:.1f}"

    for name, row in result("likeness")["trainers"].items():
        label = {"slots": "`slots`, the default", "lora": "`lora`", "peft": "PEFT loop",
                 "ComfyUI": "ComfyUI's *Train LoRA*"}[name]
        yield "cost.md", (f"| {label} | {row['rate'] or 'as tuned'} | {seconds(row['seconds_to_level'])} | "
                          f"{seconds(row['seconds_to_own'])} | {row['final']:.2f} | {row['seconds']:.0f} |")


FIGURES = [*of_demo(), *of_likeness(), *of_regions(), *of_training(), *of_many_concepts(),
           *of_single_benchmarks()]


def words_of(name: str) -> str:
    """A document with its line breaks as spaces."""
    return " ".join(SOURCES[name].read_text(encoding="utf-8").split())


@pytest.mark.parametrize(("document", "sentence"), FIGURES,
                         ids=[f"{document}-{i}" for i, (document, _) in enumerate(FIGURES)])
def test_figures_of_documents_are_those_of_the_results(document, sentence):
    assert " ".join(sentence.split()) in words_of(document)


def test_a_figure_that_differs_is_noticed():
    sentence = next(sentence for document, sentence in FIGURES if document == "nodes.md")
    wrong = re.sub(r"\d", lambda digit: str((int(digit.group()) + 1) % 10), sentence, count=1)
    assert sentence in words_of("nodes.md") and wrong not in words_of("nodes.md")


def test_every_committed_result_is_named_by_a_document():
    """With the command that makes it."""
    texts = " ".join(map(words_of, SOURCES))
    names = {path.stem for path in RESULTS.glob("*.json")}
    assert len(names) > 10
    unnamed = [name for name in names if f"results/{name}.json" not in texts]
    assert not unnamed
