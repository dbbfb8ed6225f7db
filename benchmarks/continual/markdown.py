"""The benchmark's result as Markdown: sections that the command writes into documents between markers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...core.errors import ConceptError
from ...core.files import write_atomically
from .bootstrap import BETTER, FEW, SAME, WORSE
from .judges import ENCODER
from .plan import PUBLISHED
from .tables import ALONE, COMBINED, CONFUSED, FORGOTTEN, LOST, PAIRS

MARKER = re.compile(r"<!-- continual:(\w+) -->\n.*?<!-- /continual:\1 -->", re.DOTALL)
CEILING, FLOOR = "*real pictures*", "*class nouns*"
COMPARED = (ALONE, "objects", "styles", COMBINED, PAIRS, CONFUSED)
Row = Mapping
Column = tuple[str, Callable[[Row], str]]


def ranked(result: Mapping) -> list[str]:
    """Methods by the mean of alone and combined, best first. Ablations are not among them."""
    def quality(name: str) -> float:
        row = result["methods"][name]
        means = [row[figure]["mean"] for figure in (ALONE, COMBINED) if "mean" in row.get(figure, {})]
        return sum(means) / len(means) if means else float("-inf")
    return sorted(_methods(result), key=lambda name: (-quality(name), name))


def _methods(result: Mapping) -> list[str]:
    return [name for name in result["methods"] if "+" not in name]


def number(value: float | None, factor: float = 100, digits: int = 1) -> str:
    """A figure, empty where it is unknown. Nothing is shown as -0."""
    return "" if value is None or value != value else f"{round(value * factor, digits) + 0.0:.{digits}f}"


def _interval(entry: Mapping | None, digits: int = 1) -> str:
    """`74.1 [70, 78]`, in percent; without an interval the mean alone."""
    if not entry or "mean" not in entry:
        return ""
    mean = number(entry["mean"], digits=digits)
    return f"{mean} [{number(entry['low'], digits=0)}, {number(entry['high'], digits=0)}]" if "low" in entry \
        else mean


def _part(row: Row, name: str) -> str:
    alone = row.get(ALONE, {})
    if name not in alone:
        return ""
    low, high = alone[f"{name}_interval"]
    return _interval({"mean": alone[name], "low": low, "high": high})


def verdicts(row: Row, figures: Sequence[str] = COMPARED, against: str = "against_default") -> str:
    """`worse: alone, combined; no difference: confused`, compared with the default or another method."""
    found = row.get(against, {})
    words = {word: [name for name in figures if name in found and found[name]["verdict"] == word]
             for word in (BETTER, WORSE, SAME, FEW)}
    said = [f"{word}: {', '.join(names)}" for word, names in words.items() if names]
    return "; ".join(said)


def _lines(result: Mapping, columns: Sequence[Column], names: Sequence[str], levels: bool = True) -> str:
    rows = [(f"**{name}**" if name == result["default"] else name, result["methods"][name])
            for name in names]
    if levels:
        rows = [(CEILING, result["ceiling"]), *rows, (FLOOR, result["floor"])]
    lines = [f"| method | {' | '.join(title for title, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(show(row) for _, show in columns)} |" for title, row in rows]
    return "\n".join(lines)


def _figure(name: str) -> Column:
    return name, lambda row: _interval(row.get(name))


def _plain(title: str, name: str, factor: float = 100, digits: int = 1) -> Column:
    return title, lambda row: number(row.get(name), factor, digits)


QUALITY: tuple[Column, ...] = (
    _figure(ALONE), ("objects", lambda row: _part(row, "objects")),
    ("styles", lambda row: _part(row, "styles")),
    _figure(COMBINED), _figure(PAIRS), _figure(CONFUSED))
COSTS: tuple[Column, ...] = (
    _plain("retained", "retained"), _plain("base change", "base_change"),
    _plain("kB", "bytes_per_concept", 1e-3, 0), _plain("s", "seconds_per_concept", 1, 0))
AGAINST: Column = ("against the default", verdicts)


def _score(figure: str) -> Callable[[Row], str]:
    return lambda row: number(row.get(figure, {}).get("cosine"))


def _spread(which: str) -> Callable[[Row], str]:
    return lambda row: number((row.get(ALONE, {}).get("spread") or {}).get(which))


PAPERS: tuple[Column, ...] = (
    ("runs", lambda row: str(len(row["runs"])) if "runs" in row else ""),
    ("cosine alone", _score(ALONE)), ("cosine combined", _score(COMBINED)),
    _plain("TA", "text_alignment"), _plain("TFR", "tfr"), _plain("retained, worst", "retained_worst"),
    _plain("A_MMD", "a_mmd", 1e3), _plain("F_MMD", "f_mmd", 1e3),
    ("bleed alone", lambda row: number(row["bleed"]["alone_excess"])),
    ("bleed combined", lambda row: number(row["bleed"]["together_excess"])),
    ("std over seeds", _spread("seeds")), ("std over orders", _spread("orders")))


def _other_judge(judge: str) -> tuple[Column, ...]:
    def of(row: Row) -> Row:
        return row["judges"].get(judge, {})

    figures = [(name, lambda row, name=name: _interval(of(row).get(name)))
               for name in (ALONE, COMBINED, PAIRS, CONFUSED)]
    return (*figures, ("against the default", lambda row: verdicts(of(row))))


def setting(result: Mapping) -> str:
    """One sentence: how many runs, with which seeds and orders, and what the brackets are."""
    counts = sorted({len(result["methods"][name]["runs"]) for name in _methods(result)}, reverse=True)
    level = round(100 * result["intervals"]["level"])
    return (f"{result['tasks']} tasks; seeds {', '.join(map(str, result['seeds']))}; orders "
            f"{', '.join(map(str, result['orders']))}; {' or '.join(map(str, counts))} runs per method. "
            f"In brackets: {level} % intervals over runs and concepts.")


def _settings(result: Mapping) -> str:
    lines = ["| method | steps | settings | tried |", "|---|---|---|---|"]
    for name in sorted(_methods(result)):
        tuned = result["methods"][name]["tuned"]
        pairs = ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in sorted(tuned["settings"].items()))
        lines.append(f"| {name} | {tuned['steps']} | {pairs} | {tuned['trials'] or 'not tuned'} |")
    return "\n".join(lines)


def _claims(result: Mapping) -> str:
    if not result["claims"]:
        return "No two methods of which a paper says that one is better have been run."
    sentences = []
    for entry in result["claims"]:
        better, worse, figure = entry["claim"]
        holds = {BETTER: "holds", WORSE: "**does not hold**, the reverse is true", SAME: "no difference",
                 FEW: "too few runs"}[entry["verdict"]]
        between = f"{number(entry['difference'])} [{number(entry['low'])}, {number(entry['high'])}]"
        sentences.append(f"* {better} better than {worse} in *{figure}*: {holds} ({between}, "
                         f"{entry['runs']} common runs).")
    return "\n".join(sentences)


FORGETTING: tuple[Column, ...] = (
    ("runs", lambda row: str(len(row["runs"]))), _figure(ALONE), _figure(COMBINED), _figure(CONFUSED),
    _plain("retained", "retained"), _plain("TFR", "tfr"), _plain("F_MMD", "f_mmd", 1e3),
    _plain("base change", "base_change"),
    ("against the whole method",
     lambda row: verdicts(row, (ALONE, COMBINED, CONFUSED, FORGOTTEN, LOST), "against_whole")))


def _ablations(result: Mapping) -> str:
    """Methods with one change or more, each group below the method as it is."""
    changed = sorted(name for name in result["methods"] if "+" in name)
    if not changed:
        return "No method has been run with a piece left out."
    whole = sorted({name.partition("+")[0] for name in changed} & set(result["methods"]))
    return _lines(result, FORGETTING, sorted([*changed, *whole]), levels=False)


def _bleed(result: Mapping) -> str:
    """The default's matrix beside that of real pictures: rows were asked for, columns are compared with."""
    concepts, default = result["concepts"], result["methods"].get(result["default"])
    if default is None:
        return ""
    real = result["ceiling"]["bleed"]["alone"]
    lines = [f"| asked for | {' | '.join(concepts)} |", "|---" * (len(concepts) + 1) + "|"]
    for i, name in enumerate(concepts):
        entries = [f"{number(value, digits=0)} ({number(real[i][j], digits=0)})"
                   for j, value in enumerate(default["bleed"]["alone"][i])]
        lines.append(f"| {name} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _compared(figure: str) -> Column:
    """A mean in whole percent, with its verdict in words unless the method is worse than the default."""
    def shown(row: Row) -> str:
        verdict = row.get("against_default", {}).get(figure, {}).get("verdict", WORSE)
        mean = number(row.get(figure, {}).get("mean"), digits=0)
        return mean if verdict == WORSE else f"{mean} ({verdict})"
    return figure, shown


README: tuple[Column, ...] = (_compared(ALONE), _compared(COMBINED), _compared(CONFUSED),
                              _plain("retained", "retained", digits=0))


def _readme(result: Mapping, names: Sequence[str]) -> str:
    """A short table of the named methods, without intervals. Its page has room for few words."""
    if not names:
        return "None of the methods that are compared here has been run."
    counts = sorted({len(result["methods"][name]["runs"]) for name in names})
    return (f"{result['tasks']} concepts, {' or '.join(map(str, counts))} runs, percent:\n\n"
            f"{_lines(result, README, names, levels=False)}")


def sections(result: Mapping) -> dict[str, str]:
    """Name -> Markdown of every section that a document can have."""
    names = ranked(result)
    others = sorted({judge for row in result["methods"].values() for judge in row["judges"]} - {ENCODER})
    return {
        "main": f"{setting(result)}\n\n{_lines(result, (*QUALITY, *COSTS, AGAINST), names)}",
        "papers": _lines(result, PAPERS, names),
        "judges": "\n\n".join(f"Judge `{judge}`:\n\n{_lines(result, _other_judge(judge), names)}"
                              for judge in others),
        "settings": _settings(result), "claims": _claims(result), "bleed": _bleed(result),
        "ablations": _ablations(result),
        "readme": _readme(result, [name for name in names if name in PUBLISHED or name == result["default"]]),
    }


def write_sections(path: Path, result: Mapping) -> None:
    """Replaces the text between `<!-- continual:NAME -->` and `<!-- /continual:NAME -->` in a document.

    Raises:
        ConceptError: The document has no such marker, or names a section that does not exist.
    """
    if not path.is_file():
        raise ConceptError(f"the document '{path}' does not exist")
    text, known = path.read_text(encoding="utf-8"), sections(result)
    named = MARKER.findall(text)
    unknown = [name for name in named if name not in known]
    if unknown or not named:
        raise ConceptError(f"the document '{path}' has "
                           + (f"a section '{unknown[0]}'" if unknown else "no marker <!-- continual:NAME -->")
                           + f"; sections: {', '.join(sorted(known))}")

    def filled(match: re.Match) -> str:
        name = match.group(1)
        return f"<!-- continual:{name} -->\n{known[name]}\n<!-- /continual:{name} -->"

    written = MARKER.sub(filled, text)
    write_atomically(path, lambda temporary: temporary.write_text(written, encoding="utf-8"))
