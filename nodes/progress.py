"""Feedback while a node runs: progress bar, status text and cancellation."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..core.charts import smoothed
from ..core.evaluation.previews import Previews
from ..core.images import to_pil
from ..core.training.trainer import StepInfo

SHOWN = 512      # maximum longer side of a preview in pixels


NOTE = "continual-concepts.note"      # the event before each text, by which notes.js knows ours
SAVED = "continual-concepts.bank-saved"      # the event after which banks.js reads the lists of banks


def _server() -> Any:
    module = sys.modules.get("server")      # importing it would start parts of a server
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def _send(node: str, text: str, by: str) -> None:
    """Writes a text under a node. by: the node whose text it is, which may be inside of that one.

    The page may show another workflow by now, in which another node has this id.
    """
    server = _server()
    page = getattr(server, "client_id", None)      # other pages may have a node of this id
    if server is not None and page is not None:
        server.send_sync(NOTE, {"node": node, "by": by, "workflow": _workflow(server)}, page)
        server.send_progress_text(escape(text, quote=False), node, page)


def running_item(server: Any = None) -> tuple | None:
    """What runs now, as the server queued it: number, id, graph, other data, ids of its outputs. None without
    a server."""
    queue = getattr(_server() if server is None else server, "prompt_queue", None)
    items = list(getattr(queue, "currently_running", {}).values())
    return next((item for item in items if item[1] == _prompt()), None)


def _workflow(server: Any) -> str | None:
    """The id of the workflow that runs now; None if the page gave none."""
    item = running_item(server)
    found: Any = None if item is None else item[3]
    for key in ("extra_pnginfo", "workflow", "id"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def bank_saved() -> None:
    """Tells all pages to read the list of banks again."""
    if (server := _server()) is not None:
        server.send_sync(SAVED, {})


def _levels(node: str) -> list[str]:
    """A node's id, then those of the subgraphs that hold it: the page shows one level at a time."""
    parts = node.split(":")
    return [":".join(parts[:count]) for count in range(len(parts), 0, -1)]


_status: dict[str | None, tuple[str | None, str]] = {}      # node -> its prompt's id, and what it said last


def _prompt() -> str | None:
    """The id of the prompt that runs now."""
    running = get_executing_context()
    return None if running is None else running.prompt_id


def _stopped(status: str, is_cancelled: bool) -> str:
    """Where a node stopped, of its last status: up to its step, if it has one.

    A run resumes at a step, or at a concept of several.
    """
    parts = status.split(", ")
    steps = [place for place, part in enumerate(parts) if part.startswith("step ")]
    named = parts[0].endswith(">")
    where = ", ".join(parts[:steps[0] + 1]) if steps else status if named else parts[0]
    resumes = "; the next run with the same photos and settings resumes there"
    return f"stopped: {where}{resumes if (steps or named) and is_cancelled else ''}"


def say(node: str | None, text: str) -> None:
    """Writes a status line under a node. Does nothing without a server or a connected page.

    The page reads the line as HTML, so names such as <rex> are escaped. If the node is in a subgraph, the
    line stands under the subgraph's node as well.
    """
    if node is None:
        return
    _status[node] = _prompt(), text
    for level in _levels(node):
        _send(level, text, node)


@contextmanager
def stop_told(node: str | None) -> Iterator[None]:
    """If what it holds ends with an error or by Cancel, the status below the node says where it stopped.
    ComfyUI's page would keep "step 16 of 400"."""
    try:
        yield
    except BaseException as error:
        prompt, text = _status.get(node, (None, ""))
        if text and prompt == _prompt():      # an earlier prompt may have had another node of this id
            status, *notes = text.splitlines()
            is_cancelled = isinstance(error, comfy.model_management.InterruptProcessingException)
            say(node, "\n".join([_stopped(status, is_cancelled), *notes]))
            del _status[node]      # told; a node that learns several holds this one
        raise


_below: dict[str, tuple[str, list[str]]] = {}      # node -> its prompt's id, and what stands below it


def _add_below(lines: Sequence[str]) -> None:
    """Writes lines under the node that runs now. Those that it had before in the same run stay."""
    running = get_executing_context()
    if running is None or not lines:
        return
    for level in _levels(running.node_id):
        prompt, before = _below.get(level, ("", []))
        written = list(dict.fromkeys([*(before if prompt == running.prompt_id else []), *lines]))
        _below[level] = running.prompt_id, written
        _send(level, "\n".join(written), running.node_id)


def tell(text: str) -> None:
    """Writes a sentence to the log and under the node that runs now, which may be another pack's."""
    logging.warning("Continual Concepts: %s", text)
    _add_below([text])


def written_below(notes: Sequence[str], details: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Writes notes under the node that runs now. ComfyUI's page shows the pictures of a result, but no texts.

    Args:
        notes: Lines; without any, nothing is written.
        details: Lines that the node's picture shows as well.

    Returns:
        All lines as the text of the result, for programs that read the history.
    """
    _add_below(notes)
    return {"text": ("\n".join([*notes, *details]),)} if notes or details else {}


def duration(seconds: float) -> str:
    """`1 h 20 min`, `3 min 5 s` or `8 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def bar_preview(picture: Tensor) -> tuple[str, Image.Image, int]:
    """Converts a picture `[3, H, W]` in -1..1 for the progress bar. Small pictures are enlarged."""
    image = to_pil(picture)
    if max(image.size) < 128:
        image = image.resize((image.width * 4, image.height * 4), Image.Resampling.LANCZOS)
    return "JPEG", image, SHOWN


@dataclass(frozen=True)
class Part:
    """One concept of several that a node learns. number: from 1; name: shown before the status."""

    number: int
    count: int
    name: str = ""

    def status(self, *parts: str) -> str:
        """A status, behind which of several concepts it is about."""
        number = [f"{self.number} of {self.count}: <{self.name}>"] if self.name else []
        return ", ".join([*number, *parts])


WHOLE = Part(1, 1)


@dataclass
class Reporter:
    """The training loop's callback: cancellation, progress bar, status text, and a preview every `every`
    steps (0 = never). part: of a node that learns several concepts; its parts have equal widths of the bar.
    notes: lines that stay below the status.
    """

    total: int
    every: int
    previews: Previews
    node: str | None = None
    part: Part = WHOLE
    notes: Sequence[str] = ()
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(self.total * self.part.count)

    def __call__(self, info: StepInfo) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.losses.append(info.loss)
        self.times.append(time.monotonic())
        shown = None
        if self.every and info.step % self.every == 0 and info.step < self.total:
            # unless early stopping has already drawn a preview at this step
            if self.previews.last_step != info.step:
                self.previews.draw(info.snapshot(), info.step)
            shown = bar_preview(self.previews.pictures[-1])
        self.bar.update_absolute((self.part.number - 1) * self.total + info.step,
                                 self.total * self.part.count, shown)
        say(self.node, "\n".join([self.line(info.step), *self.notes]))

    def show_last(self) -> None:
        """Shows the last preview. The page would keep the one before on the node."""
        if self.every and self.previews.pictures:
            self.bar.update_absolute(self.part.number * self.total, self.total * self.part.count,
                                     bar_preview(self.previews.pictures[-1]))

    def line(self, step: int) -> str:
        """The smoothed loss, the last likeness, and the estimated remaining time, including previews."""
        parts = [f"step {step} of {self.total}", f"loss {smoothed(self.losses[-100:], 50)[-1]:.3f}"]
        if self.previews.scores:
            parts.append(f"likeness {100 * self.previews.scores[-1][1]:.1f}")
        if len(self.times) > 3 and step < self.total:
            pace = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
            if (left := pace * (self.total - step)) >= 0.5:
                parts.append(f"{duration(left)} left")
        return self.part.status(*parts)
