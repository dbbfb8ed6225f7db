"""What `bank show` prints of a concept: plain lines, of the facts that `--json` gives as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from ..bank.concepts import OWN
from ..data.report import counted
from ..evaluation.inspection import ACTS

_MEASURES = {"covers": "thumbnail", "deltas": "deltas", "words": "words"}


def day(date: str) -> str:
    """A date of a bank's header, such as `2026-11-29 16:19 UTC`; a text that is no date as it is."""
    try:
        read = datetime.fromisoformat(date)
        return f"{read.astimezone(timezone.utc) if read.tzinfo else read:%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):      # no date, or one beyond the first or last year
        return date


def _plain(value: Any) -> str:
    """A JSON value of a setting."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "none"
    if isinstance(value, list):
        return " ".join(map(_plain, value)) or "none"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _settings(values: Mapping[str, Any] | Sequence[Any]) -> str:
    if not isinstance(values, Mapping):
        return _plain(values)
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items())


def _run(photos: int, run: Mapping[str, Any]) -> str:
    """One run of learning: photos, steps, time and date, as far as the header has them."""
    date, steps, seconds = (run.get(key) for key in ("date", "steps", "seconds"))
    parts = [f"from {counted(photos, 'photo')}"] if photos else []
    parts += [counted(steps, "step")] if isinstance(steps, int) and steps else []
    parts += [f"{seconds:.0f} s"] if isinstance(seconds, (int, float)) and seconds else []
    parts += [f"finished {day(date)}"] if isinstance(date, str) and date else []
    return ", ".join(parts)


def _origin(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the concept was learned."""
    origin = facts["provenance"]
    settings, base = origin["settings"], origin["base"]
    runs = [("learned", _run(len(origin["images"]), origin))]
    for run in origin.get("refined", ()):
        photos = run.get("photos")
        runs.append(("earlier run", _run(photos if isinstance(photos, int) else 0, run)))
    return [
        *runs,
        ("variant of", f"<{origin['variant_of']}>" if origin.get("variant_of") else ""),
        ("base", facts["made_on"] + (f"; fingerprint of its weights {base}" if base else "")),
        ("imported from", _plain(settings["files"]) if settings.get("files") else ""),
        ("settings of the method", _settings(settings.get("method", {}))),
        ("settings of learning", _settings(settings.get("training", {}))),
        ("made with", ", ".join(f"{library} {number}" for library, number in origin["versions"].items())),
        *(("caption", text.replace(OWN, facts["placeholder"])) for text in origin.get("captions", ())),
    ]


def lines_of(facts: Mapping[str, Any]) -> list[str]:
    """The lines for one concept. Whatever is empty has no line.

    Args:
        facts: All facts of the concept as JSON values; or its name and the fault of one that cannot be read.
    """
    if facts.get("fault"):
        return [f"name: {facts['name']}", f"cannot be read: {facts['fault']}"]
    method = facts["method"]
    like = (f"<{near['name']}> by {_MEASURES.get(measure, measure)}, cosine {near['cosine']:.2f}"
            for measure, near in facts["most_like"].items())
    stores = [counted(facts["deltas"], "delta"), f"{facts['bytes'] / 1000:,.1f} kB"]
    stores += [f"thumbnail of {facts['cover_bytes'] / 1000:,.1f} kB"] if facts["cover_bytes"] else []
    stores += [f"words for {facts['layer_copies']} layers"] if facts["layer_copies"] > 1 else []
    pairs = [
        ("name", facts["name"]),
        ("placeholder", facts["placeholder"]),
        ("class noun", facts["class_noun"]),
        ("kind", facts["kind"]),
        ("method", method if method == facts["composes"] else f"{method}, {ACTS[facts['composes']]}"),
        ("words", ", ".join(facts["words"])),
        *_origin(facts),
        ("licence", facts.get("licence", "")),
        ("author", facts.get("author", "")),
        ("stores", ", ".join(stores)),
        ("most like", "; ".join(like)),
        ("collides with", ", ".join(f"<{name}>" for name in facts["collides_with"])),
        *(("warning", sentence) for sentence in facts["warnings"]),
    ]
    return [f"{key}: {text}" for key, text in pairs if text]
