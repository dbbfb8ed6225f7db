"""What must not be in published files: the registry's security scan flags a version for a single finding."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 350

FORBIDDEN_MODULES = {
    # processes
    "subprocess", "pty",
    # connections
    "aiohttp", "ftplib", "http", "httpx", "requests", "smtplib", "socket", "ssl", "urllib", "urllib3",
                     "websocket", "websockets",
    # files that execute code when they are read
    "cloudpickle", "dill", "marshal", "pickle", "shelve",
    # encryption
    "Crypto", "cryptography",
}  # fmt: skip
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_OS = re.compile(
    r"environ(b)?|(get|put|unset)env|system|popen|fork(pty)?|exec[lv]p?e?|(posix_)?spawn\w*|startfile")
# A scanner reads comments and strings as well.
FORBIDDEN_TEXT = re.compile(
    r"os\.environ|os\.getenv|os\.system|os\.popen|\bsubprocess\b|__import__|\bimport_module\b")

COMFYUI_MODULES = {
    "app", "comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras",
                   "execution", "folder_paths",
    "latent_preview", "node_helpers", "nodes", "server",
}  # fmt: skip

MACHINE_PATH = re.compile(
    r"(?<![\w.~>)\]}$*-])(?:/(?:home|media|mnt|opt|root|tmp|Users|work)/\w|[A-Za-z]:\\Users\\)")


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether patterns in the manner of .gitignore (the simple ones: no `!`, no `**`) leave the path out."""
    parts = PurePosixPath(path).parts
    for pattern in patterns:
        bare = pattern.strip("/")
        deepest = len(parts) if not pattern.endswith("/") else len(parts) - 1
        for depth in range(1, deepest + 1):
            anchored = "/" in pattern.rstrip("/")
            if fnmatch("/".join(parts[:depth]) if anchored else parts[depth - 1], bare):
                return True
    return False


def patterns_of(name: str) -> list[str]:
    lines = (line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def repository_files() -> list[str]:
    """Paths from the root: what git tracks or would track.

    Without git, everything that .gitignore does not name.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True,
                             text=True).stdout.strip()
    except FileNotFoundError:
        top = ""
    if top and Path(top).resolve() == ROOT:
        listing = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split("\0")
        return sorted(name for name in set(names) if name and (ROOT / name).is_file())
    patterns = [".git", *patterns_of(".gitignore")]
    found = []
    for folder, folders, files in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not ignored((here / name / "any").as_posix(), patterns)]
        found += [path for path in ((here / name).as_posix() for name in files)
                  if not ignored(path, patterns)]
    return sorted(found)


FILES = repository_files()
SHIPPED = [path for path in FILES if not ignored(path, patterns_of(".comfyignore"))]
SHIPPED_PYTHON = [path for path in SHIPPED if path.endswith(".py")]
CORE = [path for path in SHIPPED_PYTHON if path.startswith("core/")]


def source(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def imports(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import.

    Relative names become `continual_concepts.core.model.sites.Site`.
    """
    package = ["continual_concepts", *PurePosixPath(path).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def keyword_is(call: ast.Call, name: str, value: bool) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value
               for k in call.keywords)


def findings(text: str, path: str = "core/example.py") -> list[str]:
    """What the scan would flag in a file, one line each."""
    tree = ast.parse(text)
    found = [(line, f"imports {name}") for line, name in imports(tree, path)
             if name.split(".")[0] in FORBIDDEN_MODULES]
    found += [
        (line, f"imports {name}")
        for line, name in imports(tree, path)
        if name == "importlib.import_module" or (name.startswith("os.") and FORBIDDEN_OS.fullmatch(name[3:]))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name == "importlib.import_module" or (node.value.id == "os"
                                                     and FORBIDDEN_OS.fullmatch(node.attr)):
                found.append((node.lineno, f"uses {name}"))
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_NAMES:
            found.append((node.lineno, f"calls {node.func.id}"))
        if ast.unparse(node.func) == "torch.load" and not keyword_is(node, "weights_only", True):
            found.append((node.lineno, "calls torch.load without weights_only=True"))
        allows = any(k.arg == "allow_pickle" for k in node.keywords)
        if allows and not keyword_is(node, "allow_pickle", False):
            found.append((node.lineno, "allows pickled objects"))
    for number, line in enumerate(text.splitlines(), 1):
        found += [(number, f"holds the text {match.group()}") for match in FORBIDDEN_TEXT.finditer(line)]
    return [f"{path}:{line} {what}" for line, what in sorted(set(found))]


def test_the_shipped_files_are_the_package_without_its_workshop():
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE"} <= set(SHIPPED)
    assert "core/__init__.py" in CORE
    assert any(path.startswith("core/demo/assets/") for path in SHIPPED)
    workshop = ("tests", "benchmarks", ".ci", ".github", ".git", ".venv", "demo", "build")
    assert not [path for path in SHIPPED if path.split("/")[0] in workshop]


@pytest.mark.parametrize(
    "text",
    [
        "import os\nx = os.environ.get('A')",
        "from os import environ",
        "import os\nos.system('ls')",
        "import subprocess",
        "from urllib.request import urlopen",
        "import requests",
        "import socket",
        "import pickle",
        "eval('1')",
        "exec('1')",
        "__import__('json')",
        "import importlib\nimportlib.import_module('json')",
        "from importlib import import_module",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "# see os.environ",
    ],
)
def test_the_checks_find_what_they_look_for(text):
    assert findings(text)


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('a', weights_only=True)",
        "import re\nre.compile('a')",
        "model = model.eval()",
        "import os\nos.replace('a', 'b')",
        "from .http import server",
    ],
)
def test_the_checks_leave_the_rest_alone(text):
    assert not findings(text)


def test_shipped_python_holds_nothing_that_the_scan_flags():
    assert not [finding for path in SHIPPED_PYTHON for finding in findings(source(path), path)]


def test_core_imports_neither_comfyui_nor_nodes():
    wrong = [
        f"{path}:{line} imports {name}"
        for path in CORE
        for line, name in imports(ast.parse(source(path)), path)
        if f"{name}.".startswith("continual_concepts.nodes.")
        or (name.split(".")[0] in COMFYUI_MODULES and not path.startswith("core/comfy/"))
    ]
    assert not wrong


def test_the_package_imports_itself_relatively():
    """ComfyUI imports it under another name, made of the path of its folder."""
    wrong = []
    for path in SHIPPED_PYTHON:
        for node in ast.walk(ast.parse(source(path))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{path}:{node.lineno}" for name in names if name.split(".")[0] == "continual_concepts"]
    assert not wrong


def test_the_root_imports_nothing_at_module_level():
    assert not [node for node in ast.parse(source("__init__.py")).body
                if isinstance(node, ast.Import | ast.ImportFrom)]


def test_the_root_is_not_on_sys_path():
    """There, nodes/ would hide ComfyUI's nodes.py."""
    assert ROOT not in [Path(entry).resolve() for entry in sys.path]


def test_no_python_file_is_too_long():
    lengths = {path: len(source(path).splitlines()) for path in FILES if path.endswith(".py")}
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_every_folder_with_python_is_a_package():
    """Otherwise an installed copy would lack it."""
    folders = {PurePosixPath(path).parent for path in SHIPPED_PYTHON
               if path.split("/")[0] in ("core", "nodes")}
    assert not sorted(str(folder) for folder in folders if f"{folder}/__init__.py" not in FILES)


def test_no_text_names_a_folder_of_some_machine():
    wrong = []
    for path in FILES:
        try:
            text = source(path)
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            wrong += [f"{path}:{number} {match.group()}" for match in MACHINE_PATH.finditer(line)]
    assert not wrong


def test_requirements_mirror_the_dependencies():
    block = re.search(r"^dependencies = \[\n(.*?)^\]", source("pyproject.toml"), re.MULTILINE
                      | re.DOTALL).group(1)
    assert re.findall(r'"([^"]+)"', block) == source("requirements.txt").split()


def test_documents_name_files_that_exist():
    named = re.compile(r"`((?:benchmarks|core|docs|nodes|tests|workflows)/[\w./-]+)`")
    documents = [path for path in FILES if path.endswith(".md") and path != "CHANGELOG.md"]
    assert not [f"{path}: {name}" for path in documents for name in named.findall(source(path))
                if not (ROOT / name).exists()]
