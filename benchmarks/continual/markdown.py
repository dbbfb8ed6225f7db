"""The benchmark's result as Markdown: sections that the command writes into documents between markers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...core.data.report import counted
from ...core.errors import ConceptError
from ...core.files import write_atomically
from .bootstrap import BETTER, FEW, SAME, WORSE
from .judges import ENCODER
from .plan import PUBLISHED
from .tables import ALONE, COMBINED, CONFUSED, FORGOTTEN, LOST, PAIRS

MARKER = re.compile(r"<!-- continual:(\w+) -->\n.*?<!-- /continual:\1 -->", re.DOTALL)
CEILING, FLOOR = "*real pictures*", "*class nouns*"
NO_METHOD = "No whole method has been run, only ablations."
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


def _titled(result: Mapping, name: str) -> str:
    return f"**{name}**" if name == result["default"] else name


def _lines(result: Mapping, columns: Sequence[Column], names: Sequence[str], levels: bool = True) -> str:
    rows = [(_titled(result, name), result["methods"][name]) for name in names]
    if levels:
        rows = [(CEILING, result["ceiling"]), *rows, (FLOOR, result["floor"])]
    return _table(columns, rows)


def _table(columns: Sequence[Column], rows: Sequence[tuple[str, Row]]) -> str:
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
RUNS: Column = ("runs", lambda row: str(len(row["runs"])) if "runs" in row else "")


def _against_default(result: Mapping, judge: str = ENCODER) -> Column:
    """Verdicts over the runs that a method shares with the default; their number where one has more."""
    default = result["methods"].get(result["default"])
    missing = "the default has not been run" if default is None else "no common runs"

    def shown(row: Row) -> str:
        own = row if judge == ENCODER else row["judges"].get(judge, {})
        if row is default or "runs" not in row:      # floor and ceiling have no runs
            return ""
        if not own.get("against_default"):
            return missing
        common, said = next(iter(own["against_default"].values()))["runs"], verdicts(own)
        return said if {len(row["runs"]), len(default["runs"])} == {common} \
            else f"{said} ({counted(common, 'common run')})"
    return "against the default", shown


def _counts(result: Mapping, names: Sequence[str]) -> list[int]:
    """How many runs the named methods have, each number once, the largest first."""
    return sorted({len(result["methods"][name]["runs"]) for name in names}, reverse=True)


def _counted_runs(result: Mapping, names: Sequence[str], each: str = "") -> str:
    """`7 runs`, `7 or 3 runs`, or `3 runs, not the same for all`. each: ` per method`, or nothing."""
    counts, first = _counts(result, names), result["methods"][names[0]]["runs"]
    said = " or ".join([*map(str, counts[:-1]), counted(counts[-1], "run")])
    are_same = len(counts) > 1 or all(result["methods"][name]["runs"] == first for name in names)
    return f"{said}{each}" if are_same else f"{said}{each}, not the same for all"


def _runs_column(result: Mapping, names: Sequence[str]) -> tuple[Column, ...]:
    """The number of runs, if methods differ in it: then their figures are not of the same runs."""
    return (RUNS,) if len(_counts(result, names)) > 1 else ()


def _score(figure: str) -> Callable[[Row], str]:
    return lambda row: number(row.get(figure, {}).get("cosine"))


def _spread(which: str) -> Callable[[Row], str]:
    return lambda row: number((row.get(ALONE, {}).get("spread") or {}).get(which))


PAPERS: tuple[Column, ...] = (
    RUNS, ("cosine alone", _score(ALONE)), ("cosine combined", _score(COMBINED)),
    _plain("TA", "text_alignment"), _plain("TFR", "tfr"), _plain("retained, worst", "retained_worst"),
    _plain("A_MMD", "a_mmd", 1e3), _plain("F_MMD", "f_mmd", 1e3),
    ("bleed alone", lambda row: number(row["bleed"]["alone_excess"])),
    ("bleed combined", lambda row: number(row["bleed"]["together_excess"])),
    ("std over seeds", _spread("seeds")), ("std over orders", _spread("orders")))


def _other_judge(result: Mapping, judge: str, names: Sequence[str]) -> tuple[Column, ...]:
    def of(row: Row) -> Row:
        return row["judges"].get(judge, {})

    figures = [(name, lambda row, name=name: _interval(of(row).get(name)))
               for name in (ALONE, COMBINED, PAIRS, CONFUSED)]
    return (*_runs_column(result, names), *figures, _against_default(result, judge))


def _numbered(noun: str, values: set[int]) -> str:
    """`seed 21`, or `seeds 21, 22`."""
    return f"{noun}{'s' if len(values) > 1 else ''} {', '.join(map(str, sorted(values)))}"


def performed(result: Mapping) -> str:
    """`10 tasks; seed 21; orders 21, 22; 2 runs per method.` Seeds and orders of ablations do not count."""
    tasks, names = counted(result["tasks"], "task"), _methods(result)
    if not names:
        return f"{tasks}. {NO_METHOD}"
    runs = [run for name in names for run in result["methods"][name]["runs"]]
    seeds, orders = {seed for _, seed in runs}, {order for order, _ in runs}
    return (f"{tasks}; {_numbered('seed', seeds)}; {_numbered('order', orders)}; "
            f"{_counted_runs(result, names, ' per method')}.")


def intervals_of(result: Mapping) -> str:
    """`95 % intervals over runs and concepts`; those of a single run are over concepts alone."""
    counts = _counts(result, _methods(result))
    over = "concepts" if counts == [1] else "runs and concepts"
    single = ", of a single run over concepts" if 1 in counts[1:] else ""
    return f"{round(100 * result['intervals']['level'])} % intervals over {over}{single}"


def setting(result: Mapping) -> str:
    """How many runs there are, with which seeds and orders, and what the brackets are."""
    if not _methods(result):
        return performed(result)
    return f"{performed(result)} In brackets: {intervals_of(result)}."


def _settings(result: Mapping) -> str:
    if not _methods(result):
        return NO_METHOD
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
        claim = f"* {better} better than {worse} in *{figure}*"
        if "verdict" not in entry:
            sentences.append(f"{claim}: {'cannot be compared' if entry['runs'] else 'no common runs'}.")
            continue
        holds = {BETTER: "holds", WORSE: "**does not hold**, the reverse is true", SAME: "no difference",
                 FEW: "too few runs"}[entry["verdict"]]
        between = f"{number(entry['difference'])} [{number(entry['low'])}, {number(entry['high'])}]"
        sentences.append(f"{claim}: {holds} ({between}, {counted(entry['runs'], 'common run')}).")
    return "\n".join(sentences)


FORGETTING: tuple[Column, ...] = (
    RUNS, _figure(ALONE), _figure(COMBINED), _figure(CONFUSED),
    _plain("retained", "retained"), _plain("TFR", "tfr"), _plain("F_MMD", "f_mmd", 1e3),
    _plain("base change", "base_change"),
    ("against the whole method", lambda row: row.get("said", "")))


def _ablation(result: Mapping, name: str) -> tuple[str, Row | None, Row]:
    """The name of the whole method, its figures and those of the ablation, over the runs of both.

    Without such runs the whole method has no figures here, and the ablation has those of all its runs.
    """
    row, whole = result["methods"][name], name.partition("+")[0]
    both = row.get("same_runs", {})      # results of earlier versions have none
    said = verdicts(row, (ALONE, COMBINED, CONFUSED, FORGOTTEN, LOST), "against_whole")
    missing = "no common runs" if whole in result["methods"] else "the whole method has not been run"
    return whole, both.get("whole"), {**both.get("ablation", row), "said": said or missing}


def _ablations(result: Mapping) -> str:
    """Methods with one change or more, each below the method as it is in the same runs."""
    changed = sorted(name for name in result["methods"] if "+" in name)
    if not changed:
        return "No method has been run with a piece left out."
    groups: dict[tuple, list[tuple[str, Row]]] = {}      # by method, and the runs that it shares
    for name in changed:
        whole, as_it_is, row = _ablation(result, name)
        if as_it_is is None:
            groups.setdefault((whole, ()), []).append((name, row))
        else:
            first = [(_titled(result, whole), as_it_is)]
            groups.setdefault((whole, tuple(map(tuple, as_it_is["runs"]))), first).append((name, row))
    return _table(FORGETTING, [row for _, rows in sorted(groups.items()) for row in rows])


def _bleed(result: Mapping) -> str:
    """The default's matrix beside that of real pictures: rows were asked for, columns are compared with."""
    concepts, default = result["concepts"], result["methods"].get(result["default"])
    if default is None:
        return f"The default, `{result['default']}`, has not been run."
    real = result["ceiling"]["bleed"]["alone"]
    lines = [f"| asked for | {' | '.join(concepts)} |", "|---" * (len(concepts) + 1) + "|"]
    for i, name in enumerate(concepts):
        entries = [f"{number(value, digits=0)} ({number(real[i][j], digits=0)})"
                   for j, value in enumerate(default["bleed"]["alone"][i])]
        lines.append(f"| {name} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _compared(result: Mapping, figure: str) -> Column:
    """A mean in whole percent, with its verdict in words unless the method is worse than the default."""
    default = result["methods"].get(result["default"])

    def shown(row: Row) -> str:
        mean = number(row.get(figure, {}).get("mean"), digits=0)
        if row is default or not mean:
            return mean
        verdict = row.get("against_default", {}).get(figure, {}).get("verdict", "not compared")
        return mean if verdict == WORSE else f"{mean} ({verdict})"
    return figure, shown


def _readme(result: Mapping, names: Sequence[str]) -> str:
    """A short table of the named methods, without intervals. Its page has room for few words."""
    if not names:
        return "None of the methods that are compared here has been run."
    compared = [_compared(result, figure) for figure in (ALONE, COMBINED, CONFUSED)]
    columns = (*_runs_column(result, names), *compared, _plain("retained", "retained", digits=0))
    return (f"{counted(result['tasks'], 'concept')}, {_counted_runs(result, names)}, percent:\n\n"
            f"{_lines(result, columns, names, levels=False)}")


def sections(result: Mapping) -> dict[str, str]:
    """Name -> Markdown of every section that a document can have."""
    names = ranked(result)
    others = sorted({judge for row in result["methods"].values() for judge in row["judges"]} - {ENCODER})
    main = (*_runs_column(result, names), *QUALITY, *COSTS, _against_default(result))
    return {
        "main": f"{setting(result)}\n\n{_lines(result, main, names)}",
        "papers": _lines(result, PAPERS, names),
        "judges": "\n\n".join(f"Judge `{judge}`:\n\n"
                              f"{_lines(result, _other_judge(result, judge, names), names)}"
                              for judge in others) or "There is no other judge.",
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
