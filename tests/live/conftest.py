"""Starts a real ComfyUI server on this checkout: free port, CPU, a base directory of its own that is thrown
away afterwards.

No test may depend on what an earlier one left behind. `SHUFFLE=7 pytest tests/live` runs the modules, and the
tests in each, in another order; the number is the seed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from continual_concepts.core.demo.bases import picture_size
from continual_concepts.core.demo.scenes import CONCEPTS

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT = 240  # seconds
FOLDER = "continual-concepts"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
READY = "!!(window.app && app.graph && window.LiteGraph && LiteGraph.registered_node_types['ConceptLearner'])"
# The server keeps a person's settings for all pages, so every page begins with these.
SETTINGS = {"Comfy.VueNodes.Enabled": False, "Comfy.ColorPalette": "dark", "Comfy.TutorialCompleted": True,
            "Comfy.Minimap.Visible": False, "Comfy.RightSidePanel.IsOpen": False,
            "LiteGraph.Canvas.MinFontSizeForLOD": 8}


def pytest_collection_modifyitems(items: list) -> None:
    seed = os.environ.get("SHUFFLE")
    if not seed:
        return
    here = Path(__file__).parent
    places = [i for i, item in enumerate(items) if item.path.parent == here]
    modules: dict[Path, list] = {}
    for i in places:
        modules.setdefault(items[i].path, []).append(items[i])
    order, mixed = random.Random(seed), list(modules.values())
    order.shuffle(mixed)
    for module in mixed:
        order.shuffle(module)
    for i, item in zip(places, (item for module in mixed for item in module), strict=True):
        items[i] = item


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, else the ComfyUI whose custom_nodes this checkout lies in, else ~/comfy/ComfyUI."""
    named = os.environ.get("COMFYUI_PATH")
    around = [ROOT.parents[1]] if ROOT.parent.name == "custom_nodes" else []
    candidates = [Path(named)] if named else [*around, Path.home() / "comfy" / "ComfyUI"]
    return next((path for path in candidates if (path / "main.py").is_file() and (path / "comfy").is_dir()),
                None)


@dataclass
class Server:
    port: int
    base: Path  # its base directory: input, output, models, ...
    log_file: Path
    process: subprocess.Popen

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def call(self, path: str, data: dict | None = None, timeout: float = 300):
        """What the server answers, from JSON. An error's answer comes back too: {"error": ..., "node_errors":
        ...}."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, data=body,
                                         headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return json.loads(error.read() or b'{"error": "no answer"}')

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def queue(self, graph: dict) -> str:
        """Starts a graph in API format; returns the id of the run."""
        answer = self.call("/prompt", {"prompt": graph})
        assert "prompt_id" in answer, f"the server refuses the graph: {json.dumps(answer)[:2000]}"
        return answer["prompt_id"]

    def wait(self, run: str, limit: float = 900) -> dict:
        """The run's history: `status` and `outputs`."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            entry = self.call(f"/history/{run}").get(run)
            if entry and entry.get("status", {}).get("status_str"):
                return entry
            assert self.process.poll() is None, f"the server ended:\n{self.log[-3000:]}"
            time.sleep(0.2)
        raise AssertionError(f"the run took longer than {limit:g} s:\n{self.log[-2000:]}")

    def run(self, graph: dict, limit: float = 900) -> dict:
        """Runs a graph to its end and returns its history; a failed run is a failed test."""
        entry = self.wait(self.queue(graph), limit)
        assert entry["status"]["status_str"] == "success", self.error_of(entry) or self.log[-3000:]
        return entry

    @staticmethod
    def error_of(entry: dict) -> str:
        """The sentence of a failed run, "" for a good one."""
        found = [message for kind, message in entry["status"]["messages"] if kind == "execution_error"]
        return f"{found[0]['node_type']}: {found[0]['exception_message']}" if found else ""

    def interrupt(self) -> None:
        self.call("/interrupt", {})

    def pictures(self, entry: dict, node: str | None = None) -> list[Path]:
        """The files of the pictures that a run saved (not the previews), of one node or of all."""
        outputs = [entry["outputs"].get(node, {})] if node else entry["outputs"].values()
        named = [image for output in outputs for image in output.get("images", [])
                 if image["type"] == "output"]
        return [self.base / "output" / image.get("subfolder", "") / image["filename"] for image in named]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _why_not(comfyui: Path) -> str:
    """What this Python lacks to run this ComfyUI, "" if nothing."""
    check = "import torch, aiohttp, comfy.options, comfyui_frontend_package"
    tried = subprocess.run([sys.executable, "-c", check], cwd=comfyui, capture_output=True, text=True)
    return "" if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["it ends at once"])[-1]


def _draw_cast(folder: Path) -> None:
    """Photos of two things, for the node that learns a folder of concepts."""
    for name, noun in (("rex", "dog"), ("mimi", "cat")):
        (folder / f"{name} {noun}").mkdir(parents=True)
        for i, (picture, _) in enumerate(CONCEPTS[name].pictures(5, seed=7, size=picture_size())):
            Image.fromarray(picture).save(folder / f"{name} {noun}" / f"{i}.png")


def _start(comfyui: Path, base: Path, *more: str, packs: tuple[Path, ...] = ()) -> Server:
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True)
    for name, pack in {FOLDER: ROOT, **{pack.name: pack for pack in packs}}.items():
        (base / "custom_nodes" / name).symlink_to(pack, target_is_directory=True)
    _draw_cast(base / "input" / "cast")
    port, log = _free_port(), base / "server.log"
    options = ["--cpu", "--disable-api-nodes", "--disable-auto-launch", "--base-directory", str(base),
               "--database-url", "sqlite:///:memory:"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "main.py", *options, *more, "--listen", "127.0.0.1", "--port", str(port)],
            cwd=comfyui, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    return Server(port, base, log, process)


def _stop(server: Server) -> None:
    server.process.terminate()
    try:
        server.process.wait(20)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()


def _ready(server: Server) -> bool:
    end = time.monotonic() + START_LIMIT
    while time.monotonic() < end and server.process.poll() is None:
        try:
            return bool(server.call("/system_stats", timeout=5))
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    return False


@pytest.fixture(scope="session")
def comfyui_folder() -> Path:
    found = find_comfyui()
    if found is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH to its folder")
    lacks = _why_not(found)
    if lacks:
        pytest.skip(f"this Python cannot run the ComfyUI in {found}: {lacks}")
    return found


@pytest.fixture(scope="session")
def start_server(comfyui_folder, tmp_path_factory):
    """start_server(*options, packs=()): a context in which a ComfyUI runs with this checkout, and the folders
    `packs`, as custom nodes."""
    @contextmanager
    def run(*options: str, packs: tuple[Path, ...] = ()) -> Iterator[Server]:
        running = _start(comfyui_folder, tmp_path_factory.mktemp("comfyui") / "base", *options, packs=packs)
        try:
            if not _ready(running):
                pytest.fail(f"ComfyUI did not start within {START_LIMIT} s:\n{running.log[-3000:]}")
            yield running
        finally:
            _stop(running)

    return run


@pytest.fixture(scope="session")
def server(start_server) -> Iterator[Server]:
    """One for all tests."""
    with start_server() as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server) -> dict:
    """What the server says about every node: node id -> inputs, outputs, category."""
    return server.call("/object_info")


@pytest.fixture(scope="module")
def browser(server):
    playwright = pytest.importorskip("playwright.sync_api",
                                     reason="the page tests need playwright: pip install playwright")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("the page tests need Chromium: none of " + ", ".join(BROWSERS) + " is on the path")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found,
                                          args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def open_page(browser, server):
    """open_page(width, height): ComfyUI's page with the settings of a new person, whatever tests before
    changed. `errors` collects what goes wrong on the page; `render(True)` switches to Nodes 2.0."""
    pages = []

    def open_one(width: int = 1800, height: int = 1050):
        server.call("/settings", SETTINGS)
        page = browser.new_page(viewport={"width": width, "height": height})
        pages.append(page)
        page.set_default_timeout(60_000)
        page.errors = []
        page.render = lambda vue: page.evaluate(
            "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", vue)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(server.url, wait_until="load", timeout=180_000)
        page.wait_for_function(READY, timeout=180_000)
        page.wait_for_timeout(1500)
        page.keyboard.press("Escape")      # the template browser of a first visit
        return page

    yield open_one
    for page in pages:
        page.close()
