"""The workflows that ship: every one runs through a real server, and what people see of them is complete."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from continual_concepts.core.demo.bases import picture_size

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"
GRAPHS = sorted(WORKFLOWS.glob("*.json"))
API_GRAPHS = sorted((WORKFLOWS / "api").glob("*.json"))
OF_THE_PAGE = {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}  # nodes that the server knows nothing of
# lists of what a person's folders hold
FILES = {"ckpt_name", "bank_name", "folder", "image", "lora", "embedding", "clip_name", "bg_removal_name"}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"      # a choice that may have inputs of its own
NEWER = {"LoadBackgroundRemovalModel", "RemoveBackground", "TextGenerate"}  # not in the oldest ComfyUI


def read_for(path: Path, object_info) -> dict:
    """A graph; skips the test if this ComfyUI is too old for it."""
    graph = read(path)
    missing = {node["type"] for node in graph["nodes"]} & NEWER - set(object_info)
    if missing:
        pytest.skip(f"this ComfyUI has no {min(missing)}")
    return graph


def name_of(path: Path) -> str:
    return path.stem


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def api_graph(title: str) -> dict:
    """The workflow of this title in API format. Its file has a number before the title."""
    (path,) = (WORKFLOWS / "api").glob(f"?? {title}.json")
    return read(path)


def shortened(graph: dict, learning: int = 4, sampling: int = 3) -> dict:
    """The same graph with few steps."""
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] in ("ConceptLearner", "ConceptFolderLearner"):
            inputs["steps"], inputs["preview_every"] = learning, min(inputs["preview_every"], learning // 2)
        elif node["class_type"] in ("KSampler", "BasicScheduler", "RegionalConceptSampler"):
            inputs["steps"] = sampling
        elif node["class_type"] == "ConceptEvaluate":
            inputs["steps"], inputs["seeds"] = sampling, 1
        elif node["class_type"] == "ConceptNeuronSelect":
            inputs["draws"] = 2
    return graph


def nodes_of(graph: dict, kind: str) -> list[str]:
    return [key for key, node in graph.items() if node["class_type"] == kind]


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


# What the server has of us


def test_the_pack_loads(server, object_info):
    wrong = [text for text in ("IMPORT FAILED", "Cannot import", "Error while calling comfy_entrypoint")
             if text in server.log]
    assert not wrong, server.log[-3000:]
    assert {"ConceptLearner", "ElasticWeightAggregate", "RegionalConceptSampler"} <= set(object_info)


def our_nodes(object_info) -> dict:
    return {name: node for name, node in object_info.items()
            if node["python_module"] == "custom_nodes.continual-concepts"}


def test_every_node_explains_itself(object_info):
    for name, node in our_nodes(object_info).items():
        assert node["display_name"] and node["category"].startswith("continual concepts")
        assert node["description"], f"{name} has no description"


def test_every_node_has_a_help_page_that_names_its_inputs(server, object_info):
    pages = ROOT / "nodes" / "web" / "docs"
    assert {page.stem for page in pages.glob("*.md")} == set(our_nodes(object_info))
    for name, node in our_nodes(object_info).items():
        page = (pages / f"{name}.md").read_text(encoding="utf-8")
        inputs = [key for group in ("required", "optional") for key in node["input_order"].get(group, [])]
        shown = [options["display_name"] for group in node["input"].values() for _, *more in group.values()
                 for options in more if "display_name" in options]
        missing = [key for key in (*inputs, *node["output_name"], *shown) if f"`{key}`" not in page]
        assert not missing, f"{name}.md says nothing of an input or output"


def test_the_server_serves_help_and_templates(server):
    templates = server.call("/api/workflow_templates")["continual-concepts"]
    assert set(templates) == {name_of(path) for path in GRAPHS}
    page = server.text("/extensions/continual-concepts/docs/ConceptLearner.md")
    assert page.startswith("# Concept Learner")


# The files


def test_every_workflow_has_its_api_form_and_its_picture():
    assert GRAPHS
    assert [name_of(path) for path in GRAPHS] == [name_of(path) for path in API_GRAPHS]
    assert {path.stem for path in WORKFLOWS.glob("*.jpg")} == {name_of(path) for path in GRAPHS}
    assert {path.suffix for path in WORKFLOWS.iterdir() if path.is_file()} == {".json", ".jpg"}


def test_g15_templates_are_numbered_in_the_order_of_learning():
    """The template browser shows file names. A number before the title says what comes next."""
    numbers, titles = zip(*(name_of(path).split(" ", 1) for path in GRAPHS), strict=True)
    assert list(numbers) == [f"{number:02d}" for number in range(1, len(GRAPHS) + 1)]
    assert titles[:4] == ("Tour without a download", "Learn a first concept", "Use concepts with KSampler",
                          "Add a second concept")


def test_g15_sibling_texts_name_templates_that_exist():
    """Notes and help pages name a template by its title, in bold; the README by its file name."""
    titles = [name_of(path).split(" ", 1)[1] for path in GRAPHS]
    beginnings = {tuple(title.split()[:2]) for title in titles}
    pages = (ROOT / "nodes" / "web" / "docs").glob("*.md")
    texts = [*(note for path in GRAPHS for note in notes_of(read(path))),
             *(" ".join(page.read_text(encoding="utf-8").split()) for page in pages)]
    bold = [name for text in texts for name in re.findall(r"\*\*([^*\n]+)\*\*", text)]
    named = [name for name in bold if tuple(name.split()[:2]) in beginnings]
    assert len(named) > 8
    assert set(named) <= set(titles)
    opened = re.findall(r"\*(\d\d [^*]+)\*", " ".join((ROOT / "README.md").read_text("utf-8").split()))
    assert len(opened) > 3 and set(opened) <= {name_of(path) for path in GRAPHS}


def test_every_node_has_an_example(object_info):
    """In the graph that people open, but for the demo's nodes, which take the place of a checkpoint in the
    form that runs anywhere."""
    opened = {node["type"] for path in GRAPHS for node in read(path)["nodes"]}
    run = {node["class_type"] for path in API_GRAPHS for node in read(path).values()}
    assert set(our_nodes(object_info)) <= opened | run
    assert set(our_nodes(object_info)) - opened <= {"ConceptDemoBase", "ConceptDemoPhotos"}


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.jpg")), ids=name_of)
def test_thumbnails_are_small(path):
    assert max(Image.open(path).size) <= 512
    assert path.stat().st_size < 60_000


# UI format


def sockets_and_widgets(node: dict) -> tuple[list[str], list[tuple[str, tuple]]]:
    """A node's inputs in order: those that only take links, and those with a widget, phantom widgets
    included."""
    sockets, widgets = [], []
    for group in ("required", "optional"):
        for name in node["input_order"].get(group, []):
            kind, *more = node["input"][group][name]
            options = more[0] if more else {}
            if kind == DYNAMIC:
                keys = [option["key"] for option in options["options"] if not any(option["inputs"].values())]
                widgets.append((name, (keys, {})))
                continue
            if not (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN",
                                                       "COMBO")) or options.get("forceInput"):
                sockets.append(name)
                continue
            widgets.append((name, (kind, options)))
            if kind == "INT" and (options.get("control_after_generate") or name in ("seed", "noise_seed")):
                widgets.append(("control_after_generate", (["fixed", "increment", "decrement", "randomize"],
                                                           {})))
            if options.get("image_upload"):
                widgets.append(("upload", (["image"], {})))
    return sockets, widgets


def fits(name: str, kind, options: dict, value) -> bool:
    allowed = kind if isinstance(kind, list) else options.get("options", [])
    if kind == "COMBO" or isinstance(kind, list):
        return isinstance(value, str) and (name in FILES or value in allowed)
    if kind in ("INT", "FLOAT"):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        in_range = number and options.get("min", -math.inf) <= value <= options.get("max", math.inf)
        return in_range and (kind == "FLOAT" or value == int(value))
    return isinstance(value, bool if kind == "BOOLEAN" else str)


@pytest.mark.parametrize("path", GRAPHS, ids=name_of)
def test_workflows_fit_the_nodes(path, object_info):
    graph = read_for(path, object_info)
    unknown = {node["type"] for node in graph["nodes"]} - set(object_info) - OF_THE_PAGE
    assert not unknown
    for node in graph["nodes"]:
        if node["type"] in OF_THE_PAGE:
            continue
        _, widgets = sockets_and_widgets(object_info[node["type"]])
        values = node.get("widgets_values", [])
        assert len(values) == len(widgets), f"{node['type']}: {values} for {[name for name, _ in widgets]}"
        pairs = zip(widgets, values, strict=True)
        wrong = [(name, value) for (name, (kind, options)), value in pairs
                 if not fits(name, kind, options, value)]
        assert not wrong, f"{node['type']}: {wrong}"


@pytest.mark.parametrize("path", GRAPHS, ids=name_of)
def test_workflows_are_linked_as_the_nodes_say(path, object_info):
    graph = read_for(path, object_info)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for _, origin, origin_slot, target, target_slot, kind in graph["links"]:
        assert object_info[nodes[origin]["type"]]["output"][origin_slot] == kind
        taken = nodes[target]["inputs"][target_slot]
        assert taken["type"] in (kind, "*")
        spec = object_info[nodes[target]["type"]]["input"]
        assert taken["name"] in {**spec.get("required", {}), **spec.get("optional", {})}
    for node in graph["nodes"]:
        if node["type"] not in OF_THE_PAGE:
            sockets, _ = sockets_and_widgets(object_info[node["type"]])
            needed = set(sockets) & set(object_info[node["type"]]["input"].get("required", {}))
            linked = {taken["name"] for taken in node["inputs"] if taken.get("link") is not None}
            assert needed <= linked, f"{node['type']} lacks {needed - linked}"


def notes_of(graph: dict) -> list[str]:
    return [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]


@pytest.mark.parametrize("path", GRAPHS, ids=name_of)
def test_g13_sibling_notes_have_no_inline_code(path):
    """Nodes 2.0 writes it blue on brown, which nobody can read."""
    assert not [note for note in notes_of(read(path)) if "`" in note]
    assert all(note.startswith(f"# {name_of(path).split(' ', 1)[1]}") for note in notes_of(read(path)))


@pytest.mark.parametrize("path", GRAPHS, ids=name_of)
def test_workflows_have_notes_and_no_overlaps(path):
    graph = read(path)
    assert any(node["type"] == "MarkdownNote" and len(node["widgets_values"][0]) > 200
               for node in graph["nodes"])
    boxes = [(node["type"], *node["pos"], *node["size"]) for node in graph["nodes"]]
    # 30: a node's title
    boxes = [(kind, x, y - 30, x + width, y + height) for kind, x, y, width, height in boxes]
    for i, (kind, left, top, right, bottom) in enumerate(boxes):
        for other, left2, top2, right2, bottom2 in boxes[i + 1 :]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, f"{kind} lies on {other}"


@pytest.mark.parametrize("path", GRAPHS, ids=name_of)
def test_both_forms_do_the_same_job(path, object_info):
    """The API form learns on the embedded base what the other one takes from disk; everything else of ours is
    in both."""
    loaders = {"ConceptPhotosLoad", "ConceptBankLoad", "ConceptImport"}
    ours = set(our_nodes(object_info)) - loaders
    seen = {node["type"] for node in read(path)["nodes"]} & ours
    run = {node["class_type"] for node in read(WORKFLOWS / "api" / path.name).values()} & ours
    assert seen <= run


# API format


@pytest.mark.parametrize("path", API_GRAPHS, ids=name_of)
def test_workflows_run(path, server):
    graph = shortened(read(path))
    entry = server.run(graph)
    savers = nodes_of(graph, "SaveImage")
    # the tour shows its pictures larger
    side = 256 if nodes_of(graph, "ImageScale") and not nodes_of(graph, "VAEEncode") else picture_size()
    regional = nodes_of(graph, "RegionalConceptSampler") or nodes_of(graph, "ConceptRegionsApply")
    wide = 2 if regional and nodes_of(graph, "EmptyLatentImage") else 1
    assert savers
    for saver in savers:
        files = server.pictures(entry, saver)
        assert files
        for file in files:
            picture = pixels(file)
            # a sheet is as large as it must be
            if graph[saver]["inputs"]["images"][0] not in nodes_of(graph, "ConceptEvaluate"):
                assert picture.shape == (side, wide * side, 3)
            assert picture.std() > 5, f"{file.name} shows nothing"


def test_a_second_concept_leaves_the_first_as_it_was(server):
    graph = shortened(api_graph("Add a second concept"), learning=8)
    entry = server.run(graph)
    old, new, second = (pixels(server.pictures(entry, f"{tag}_picture")[0])
                        for tag in ("old_bank", "new_bank", "second"))
    assert (old == new).all()
    assert (old != second).any()


def test_inpainting_leaves_the_rest_of_the_photo_alone(server):
    graph = shortened(api_graph("Edit a photo by inpainting a concept"))
    entry = server.run(graph)
    before, after = (pixels(server.pictures(entry, key)[0]) for key in ("photo_picture", "picture"))
    box, grown = graph["mask"]["inputs"], graph["grow"]["inputs"]["expand"]
    right, bottom = (box[at] + graph["white"]["inputs"][side] + grown
                     for at, side in (("x", "width"), ("y", "height")))
    changed = (before != after).any(-1)
    assert changed.any()
    changed[max(box["y"] - grown, 0) : bottom, max(box["x"] - grown, 0) : right] = False
    assert not changed.any()


def test_an_unchanged_graph_is_not_run_again(server):
    graph = shortened(api_graph("Tour without a download"))
    server.run(graph)
    again = server.run(graph)
    cached = next(message for kind, message in again["status"]["messages"] if kind == "execution_cached")
    assert set(nodes_of(graph, "ConceptLearner")) <= set(cached["nodes"])


def test_g12_sibling_a_name_from_another_node_waits_for_the_run(server):
    graph = shortened(api_graph("Tour without a download"))
    (photos,), (learner,) = (nodes_of(graph, kind) for kind in ("ConceptDemoPhotos", "ConceptLearner"))
    graph[learner]["inputs"]["class_noun"] = [photos, 2]
    server.run(graph)


def test_g9_the_page_gets_the_sentence_without_a_path(server):
    graph = shortened(api_graph("Tour without a download"))
    (learner,) = nodes_of(graph, "ConceptLearner")
    graph[learner]["inputs"] |= {"stop_after": 3, "preview_every": 0}
    entry = server.wait(server.queue(graph))
    (error,) = (message for kind, message in entry["status"]["messages"] if kind == "execution_error")
    shown = f"{error['exception_type']}: {error['exception_message']}".strip()
    assert shown.startswith("Continual Concepts: stop_after is 3 but ") and "\n" not in shown


@pytest.mark.parametrize(("kind", "name", "value"), [
    ("ConceptLearner", "class_noun", "(dog:1.2)"), ("ConceptLearner", "name", "two words"),
    ("ConceptBankSave", "bank_name", "CON")])
def test_g12_wrong_names_stop_the_run_before_it_starts(server, kind, name, value):
    graph = shortened(api_graph("Learn a first concept"))
    (node,) = nodes_of(graph, kind)
    graph[node]["inputs"][name] = value
    answer = server.call("/prompt", {"prompt": graph})
    assert f"{value}' is not allowed" in json.dumps(answer["node_errors"])
