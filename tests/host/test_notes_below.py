"""Notes that stand below a node on the page. Without a page nothing is sent."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

RESUMES = "; the next run with the same photos and settings resumes there"


@pytest.fixture
def below(studio, monkeypatch):
    """Node -> the text below it; `run(prompt, node)` says which node runs."""
    from continual_concepts.nodes import progress

    found = SimpleNamespace(texts={}, running=None)
    monkeypatch.setattr(progress, "_send", lambda node, text, by: found.texts.__setitem__(node, text))
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


def test_warnings_stand_before_what_the_preset_did(below, studio):
    """They are what a person must see first."""
    below.run("first", "7")
    studio.learner(images=[studio.photos(2)], steps=1, preset="object", effort="quick")
    lines = below.texts["7"].splitlines()
    warned, preset = (next(i for i, line in enumerate(lines) if text in line)
                      for text in ("there are only 2 photos", "preset"))
    assert lines[0].startswith("2 photos") and warned < preset


def test_a_note_in_a_subgraph_stands_below_the_subgraph_as_well(below):
    """The page shows one level at a time."""
    from continual_concepts.nodes.progress import say, tell

    below.run("first", "15:4:2")
    tell("one")
    below.run("first", "15:4:3")
    tell("two")
    assert below.texts == {"15:4:2": "one", "15:4:3": "two", "15:4": "one\ntwo", "15": "one\ntwo"}
    say("15:4:2", "step 1")
    assert below.texts["15"] == below.texts["15:4:2"] == "step 1" and below.texts["15:4:3"] == "two"


def test_notes_go_to_the_page_that_runs_the_graph_as_it_reads_them(pack, monkeypatch):
    """Another page may have a node of the same id. The page reads a text as HTML."""
    from continual_concepts.nodes import progress

    sent = []
    page = SimpleNamespace(
        client_id="page", send_sync=lambda event, data, to: sent.append((event, data, to)),
        send_progress_text=lambda text, node, to: sent.append((text, node, to)))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=page))
    monkeypatch.setitem(sys.modules, "server", server)
    progress.say("7", "<rex> & 'mimi'")
    assert sent == [("continual-concepts.note", {"node": "7", "by": "7", "workflow": None}, "page"),
                    ("&lt;rex&gt; &amp; 'mimi'", "7", "page")]
    page.client_id = None
    progress.say("7", "nobody looks")
    assert len(sent) == 2
    page.client_id, sent[:] = "page", []
    progress.say("3:7", "inside")
    assert [data for event, data, _ in sent if event == progress.NOTE] == [
        {"node": "3:7", "by": "3:7", "workflow": None}, {"node": "3", "by": "3:7", "workflow": None}]


@pytest.mark.parametrize("extra, known", [
    ({"extra_pnginfo": {"workflow": {"id": "a-b"}}}, "a-b"),
    ({"extra_pnginfo": {"workflow": {"id": 7}}}, None),
    ({"extra_pnginfo": {"workflow": [1]}}, None), ({"extra_pnginfo": None}, None), ({}, None), (None, None)])
def test_a_text_says_of_which_workflow_it_is(pack, monkeypatch, extra, known):
    """The page may show another one by now. Programs send what they like."""
    from continual_concepts.nodes import progress

    items = {0: (0, "other", {}, {"extra_pnginfo": {"workflow": {"id": "other"}}}, []),
             1: (1, "mine", {}, extra, [])}
    sent = []
    page = SimpleNamespace(client_id="page", prompt_queue=SimpleNamespace(currently_running=items),
                           send_sync=lambda event, data, to: sent.append(data["workflow"]),
                           send_progress_text=lambda *_: None)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=page)))
    monkeypatch.setattr(progress, "_prompt", lambda: "mine")
    progress.say("7", "step 1")
    assert sent == [known]


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_node_that_stops_says_where(below, cancelled):
    """The page keeps the last status."""
    from comfy.model_management import InterruptProcessingException

    from continual_concepts.nodes.progress import say, stop_told

    error = InterruptProcessingException if cancelled else ValueError
    with pytest.raises(error), stop_told("7"):
        say("7", "step 16 of 400, loss 0.976, 2 min 40 s left\nonly 2 photos")
        raise error
    where = f"step 16 of 400{RESUMES}" if cancelled else "step 16 of 400"
    assert below.texts["7"] == f"stopped: {where}\nonly 2 photos"
    with stop_told("7"):
        say("7", "step 400 of 400, loss 0.2")
    assert below.texts["7"] == "step 400 of 400, loss 0.2"
    with pytest.raises(error), stop_told("8"):      # it had said nothing
        raise error
    assert "8" not in below.texts


def test_what_another_prompts_node_said_is_not_where_a_node_stopped(below):
    """Load Concept Photos says how many there are; in another workflow, a learner may have its id."""
    from continual_concepts.nodes.progress import say, stop_told

    below.run("first", "7")
    say("7", "5 photos")
    below.run("second", "7")
    below.texts.clear()
    with pytest.raises(ValueError), stop_told("7"):
        raise ValueError
    assert not below.texts


def test_a_node_that_learns_several_says_which_and_at_what_step_it_stopped(below):
    from comfy.model_management import InterruptProcessingException

    from continual_concepts.nodes.progress import say, stop_told

    for status, where in (("1 of 2: <mimi>, step 5 of 300, loss 0.3, 1 min left",
                           f"1 of 2: <mimi>, step 5 of 300{RESUMES}"),
                          ("2 of 2: <rex>, dog", f"2 of 2: <rex>, dog{RESUMES}"),
                          ("2 of 2: <rex>, encoding 5 photos",
                           f"2 of 2: <rex>, encoding 5 photos{RESUMES}"),
                          ("encoding photos", "encoding photos")):
        with pytest.raises(InterruptProcessingException), stop_told("7"):
            say("7", status)
            raise InterruptProcessingException
        assert below.texts["7"] == f"stopped: {where}"
