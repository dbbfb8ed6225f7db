"""Runs and levels of the continual benchmark with figures made by hand, for tests of what reads them."""

from __future__ import annotations

NAMES, KINDS = ("rex", "fido", "mimi", "chalk"), ("object", "object", "object", "style")
GROUPS, PAIRS = (("fido", "mimi"),), (("rex", "fido"),)
JUDGES = ("encoder", "template")
FLOOR, CEILING = 0.2, 0.9


def group(names, score, confused, other=0.3):
    """The figures of a group: every concept has the same score."""
    bleed = [[score if i == j else other for j in range(len(names))] for i in range(len(names))]
    return {"concepts": list(names), "alignment": [score] * len(names), "confused": confused, "bleed": bleed}


def figures(alone, combined, confused, other=0.3, names=NAMES):
    """The figures of one judge. alone: one score per concept."""
    bleed = [[alone[i] if i == j else other for j in range(len(names))] for i in range(len(names))]
    return {"alone": list(alone), "bleed": bleed,
            "groups": [group(g, combined, 0.0, other) for g in GROUPS if set(g) <= set(names)],
            "pairs": [group(p, combined, confused, other) for p in PAIRS if set(p) <= set(names)]}


def levels(floor=FLOOR, ceiling=CEILING):
    rows = {name: {"judges": {judge: figures([value] * len(NAMES), value, confused) for judge in JUDGES}}
            for name, value, confused in (("floor", floor, 0.25), ("ceiling", ceiling, 0.0))}
    rows["floor"]["text_alignment"] = [1.5] * len(NAMES)
    return {"origin": {"base": "abc"}, "concepts": list(NAMES), "kinds": list(KINDS), **rows}


def run(method="bound", order=21, seed=21, alone=(0.7, 0.7, 0.7, 0.7), combined=0.6, confused=0.1, just=None,
        names=NAMES, **more):
    """A finished run whose judges agree."""
    own = {judge: figures(alone, combined, confused, names=names) | {"just": list(just or alone)}
           for judge in JUDGES}
    kinds = dict(zip(NAMES, KINDS, strict=True))
    return {"method": method, "tasks": len(names), "order": order, "seed": seed, "alone": False,
            "variant": "", "steps": 200, "settings": {"lr": 0.002}, "concepts": list(names),
            "kinds": [kinds[name] for name in names], "judges": own, "text_alignment": [1.4] * len(names),
            "a_mmd": 0.02, "f_mmd": 0.001, "base_change": 0.0, "pair_pictures": 4, "trained_share": 0.01,
            "seconds_per_concept": 12.0, "bytes_per_concept": 50_000.0} | more
