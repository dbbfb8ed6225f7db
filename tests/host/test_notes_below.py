"""Notes that stand below a node on the page. Without a page nothing is sent."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def below(studio, monkeypatch):
    """Node -> the text below it; `run(prompt, node)` says which node runs."""
    from continual_concepts.nodes import progress

    found = SimpleNamespace(texts={}, running=None)
    monkeypatch.setattr(progress, "say", lambda node, text: found.texts.__setitem__(node, text))
    monkeypatch.setattr(progress, "get_executing_context", lambda: found.running)
    monkeypatch.setattr(progress, "_below", {})

    def run(prompt: str, node: str) -> None:
        found.running = SimpleNamespace(prompt_id=prompt, node_id=node)

    found.run = run
    return found


def test_notes_of_one_run_stand_below_one_another(below):
    from continual_concepts.nodes.progress import tell

    below.run("first", "3")
    for note in ("one", "two", "one"):
        tell(note)
    below.run("first", "4")
    tell("other")
    assert below.texts == {"3": "one\ntwo", "4": "other"}
    below.run("second", "3")
    tell("three")
    assert below.texts["3"] == "three"


def test_the_notes_of_a_result_stand_below_the_node(below, studio):
    below.run("first", "7")
    result = studio.learner(images=[studio.photos(2)], steps=1)
    assert below.texts["7"] == result.ui["text"][0] and below.texts["7"].startswith("2 photos")


def test_the_notes_of_a_result_keep_what_was_told_before(below):
    from continual_concepts.nodes.progress import tell, written_below

    below.run("first", "6")
    tell("told")
    assert written_below(["result"]) == {"text": ("result",)} and below.texts["6"] == "told\nresult"


def test_without_notes_nothing_is_written(below):
    from continual_concepts.nodes.progress import written_below

    below.run("first", "5")
    assert written_below([]) == {} and not below.texts
    assert written_below([], ["a detail"]) == {"text": ("a detail",)} and not below.texts


def test_names_are_sent_as_the_page_reads_them(pack, monkeypatch):
    from continual_concepts.nodes import progress

    sent = []
    page = SimpleNamespace(client_id="page", send_progress_text=lambda text, node: sent.append((text, node)))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=page))
    monkeypatch.setitem(sys.modules, "server", server)
    progress.say("7", "<rex> & 'mimi'")
    assert sent == [("&lt;rex&gt; &amp; 'mimi'", "7")]
