"""The house: every import runs from a room to a room below it, and no file imports itself in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = (
    ("errors", "files", "images", "charts", "settings", "versions"),
    ("model",),
    ("bank", "attention", "hosts"),
    ("conditioning", "data", "regional"),
    ("neurons", "sampling", "demo"),
    ("methods",),
    ("training", "interop"),
    ("evaluation", "comfy"),
    ("cli", "nodes"),
    ("benchmarks",),
)
GROUND = FLOORS[0]      # single files of core, which may import one another
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: str) -> str:
    """`core/bank/store.py` -> bank; `core/errors.py` -> errors; `nodes/learn.py` -> nodes."""
    parts = path.split("/")
    if parts[0] != "core":
        return parts[0]
    if path == "core/__main__.py":
        return "cli"
    return parts[1].removesuffix(".py")


def _target(folder: list[str], name: str) -> str:
    """The file that `from folder import name` reads, as a path below the root."""
    whole = ROOT.joinpath(*folder, name)
    if whole.with_suffix(".py").is_file():
        return "/".join([*folder, f"{name}.py"])
    if whole.is_dir():
        return "/".join([*folder, name, "__init__.py"])
    module = ROOT.joinpath(*folder)
    return "/".join([*folder[:-1], f"{folder[-1]}.py"] if module.with_suffix(".py").is_file()
                    else [*folder, "__init__.py"])


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """File -> the files of this project that it imports: also in functions, and for type checking only."""
    edges: dict[str, set[str]] = {}
    for top in ("core", "nodes", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            here = list(path.relative_to(ROOT).parts[:-1])
            own = edges.setdefault(path.relative_to(ROOT).as_posix(), set())
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level:
                    below = node.module.split(".") if node.module else []
                    folder = here[: len(here) - node.level + 1] + below
                    own.update(_target(folder, alias.name) for alias in node.names)
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Files that import one another, by Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(file: str) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for other in edges.get(file, ()):
            if other not in index:
                visit(other)
                low[file] = min(low[file], low[other])
            elif other in stack:
                low[file] = min(low[file], index[other])
        if low[file] == index[file]:
            members = stack[stack.index(file):]
            del stack[stack.index(file):]
            if len(members) > 1 or file in edges.get(file, ()):
                found.append(sorted(members))

    for file in edges:
        if file not in index:
            visit(file)
    return found


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports that leave a room and do not run to a lower floor."""
    def climbs(file: str, other: str) -> bool:
        here, there = room_of(file), room_of(other)
        if here == there or (here in GROUND and there in GROUND):
            return False
        return FLOOR_OF[there] >= FLOOR_OF[here]

    return [f"{file} imports {other}" for file, others in edges.items() for other in sorted(others)
            if climbs(file, other)]


def test_every_file_has_a_room(graph):
    assert not [file for file in graph if file != "core/__init__.py" and room_of(file) not in FLOOR_OF]


def test_every_import_is_found(graph):
    assert not [other for others in graph.values() for other in others if not (ROOT / other).is_file()]


def test_no_circles(graph):
    assert circles(graph) == []


def test_imports_run_downwards(graph):
    assert upward(graph) == []


@pytest.mark.parametrize("edges",
                         [{"core/model/a.py": {"core/bank/b.py"}}, {"core/bank/a.py": {"core/hosts/b.py"}},
                                   {"core/errors.py": {"core/model/a.py"}},
                                   {"nodes/a.py": {"core/cli/b.py"}}])
def test_an_upward_edge_is_seen(edges):
    assert len(upward(edges)) == 1


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"a"}}) == [["a"]]


def test_the_house_has_at_most_ten_floors_and_few_doors():
    assert len(FLOORS) <= 10
    assert len([path for path in (ROOT / "core").iterdir() if path.name != "__pycache__"]) <= 25
