"""The page's part of a drawing that needs no page: its reader, and the arithmetic of boxes. Runs in Node
where there is one."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from continual_concepts.core.images import colour
from continual_concepts.core.regional.drawing import NAME, PROMPT, REGIONS, parse_regions

WEB = Path(__file__).resolve().parents[2] / "nodes" / "web"
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(function, [arguments, ...]) -> its results, {"error": sentence} for what it threw."""
    if NODE is None:
        pytest.skip("these tests run the page's code in Node, and there is no program 'node' here")
    folder = tmp_path_factory.mktemp("web")
    shutil.copy(WEB / "regions_model.js", folder / "model.mjs")
    (folder / "run.mjs").write_text(
        "import * as model from './model.mjs'; import { readFileSync } from 'node:fs';\n"
        "const [name, calls] = JSON.parse(readFileSync(0, 'utf8'));\n"
        "const call = given => { try {"
        " return typeof model[name] === 'function' ? model[name](...given) : model[name]; }"
        " catch (error) { return { error: error.message }; } };\n"
        "console.log(JSON.stringify(calls.map(call)));\n"
    )

    def run(name: str, calls: list) -> list:
        done = subprocess.run([NODE, str(folder / "run.mjs")], input=json.dumps([name, calls]),
                              capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return run


def boxes(count: int, chance: random.Random) -> list[list[float]]:
    """Valid ones, some at the borders and some thinner than what can be drawn."""
    found = []
    while len(found) < count:
        a, b, c, d = (chance.choice([0, 1, 0.5, chance.random(), chance.random() / 500]) for _ in range(4))
        if a != b and c != d:
            found.append([min(a, b), min(c, d), max(a, b), max(c, d)])
    return found


def valid(box) -> bool:
    return 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1


def test_the_colours_and_limits_are_those_of_the_pictures(model):
    expected = ["#" + "".join(f"{part:02x}" for part in colour(index)) for index in range(REGIONS)]
    assert model("colourOf", [[index] for index in range(REGIONS)]) == expected
    assert model("MOST", [[]]) == [{"regions": REGIONS, "prompt": PROMPT, "name": NAME}]


def test_the_page_refuses_what_the_server_refuses(model, script):
    cases = script(Path(__file__).with_name("test_drawing.py"))
    texts = [cases.with_field(key, value) for key, value, _ in cases.WRONG] + cases.WHOLE
    for text, found in zip(texts, model("parse", [[text] for text in texts]), strict=True):
        assert isinstance(found, dict) and found["error"] and "\n" not in found["error"], text[:80]


def test_a_drawing_survives_the_page(model):
    items = [
        {"prompt": "a <b>\n\"'\u00e4\U0001f600", "box": [0, 0, 0.3333333333333333, 1]},
        {"name": "n", "prompt": "", "box": [0.1, 0.2, 0.3, 0.4], "color": "#123456", "negative": "x",
         "strength": 0, "start": 0.25,
         "end": 0.5, "feather": 0.125, "on": False},
        {"prompt": "x" * PROMPT, "box": [0, 0, 1, 1], "strength": 1, "on": True},
    ]  # fmt: skip
    (regions,) = model("parse", [[json.dumps(items)]])
    (text,) = model("serialise", [[regions]])
    assert model("serialise", [model("parse", [[text]])]) == [text]
    assert [region | {"color": found["color"]} for region, found in zip(items, regions, strict=True)] == [
        {key: found[key] for key in region | {"color": ""}}
        for region, found in zip(items, regions, strict=True)
    ]
    # With a colour of its own each, and without what is as usual, it is the same drawing on the server
    assert parse_regions(text.replace('"prompt": ""', '"prompt": "y"')) == parse_regions(json.dumps(items))
    assert model("serialise", [[[]]]) == ["[]"] and model("parse", [[""], [" \n"], ["[]"]]) == [[], [], []]


def test_boxes_stay_boxes_whatever_is_done_to_them(model):
    chance = random.Random(0)
    start = boxes(300, chance)
    by = [(chance.choice([0, 0.01, -0.01, 3, -3, chance.uniform(-1, 1)]), chance.uniform(-1, 1))
          for _ in start]
    for box, found in zip(start, model("moved", [[box, *step] for box, step in zip(start, by, strict=True)]),
                          strict=True):
        assert valid(found)
        assert all(abs((found[i + 2] - found[i]) - max(box[i + 2] - box[i], 0.02)) < 1.1e-3 for i in (0, 1))
    handles = [chance.choice(["n", "s", "e", "w", "nw", "ne", "se", "sw"]) for _ in start]
    calls = [[box, handle, *step] for box, handle, step in zip(start, handles, by, strict=True)]
    for (box, handle, *_), found in zip(calls, model("resized", calls), strict=True):
        assert valid(found)
        assert all(found["wnes".index(side)] == box["wnes".index(side)]
                   for side in "wnes" if side not in handle)
    calls = [[[chance.uniform(-0.5, 1.5) for _ in "xy"] for _ in "ab"] for _ in range(300)]
    drawn = model("between", calls)
    assert all(box is None or valid(box) for box in drawn) and sum(box is not None for box in drawn) > 200


def test_a_move_goes_as_far_as_asked(model):
    moves = [[[0.1, 0.2, 0.3, 0.5], 0.05, -0.1], [[0.1, 0.2, 0.3, 0.5], 1, 1]]
    assert model("moved", moves) == [[0.15, 0.1, 0.35, 0.4], [0.8, 0.7, 1, 1]]
    assert model("resized", [[[0.1, 0.2, 0.3, 0.5], "se", 0.1, 0.1],
                             [[0.1, 0.2, 0.3, 0.5], "w", 0.9, 0]]) == [
        [0.1, 0.2, 0.4, 0.6],
        [0.28, 0.2, 0.3, 0.5],
    ]


def test_the_smallest_box_at_a_point_is_hit(model):
    regions = [{"box": box} for box in ([0, 0, 1, 0.9], [0.2, 0.2, 0.4, 0.4], [0.2, 0.2, 0.4, 0.4])]
    assert model("hit", [[regions, point] for point in ([0.3, 0.3], [0.5, 0.5], [0.5, 0.95])]) == [1, 0, -1]


def test_lists(model):
    regions = [{"prompt": name, "color": name} for name in "abc"]
    moved = model("reordered", [[regions, 0, 1], [regions, 2, 0], [regions, 1, 1]])
    assert ["".join(region["prompt"] for region in found) for found in moved] == ["bac", "cab", "abc"]
    new = model("fresh", [[[], None], [[{"color": "#db4c4c"}], [0, 0, 1, 1]], [[{"color": ""}] * 9, None]])
    assert new[0]["color"] == "#db4c4c" and new[1]["color"] != "#db4c4c" and new[1]["box"] == [0, 0, 1, 1]
    assert all(valid(region["box"]) for region in new)
    assert model("excerpt", [["a\n b", 5], ["abcdefgh", 6], ["", 3]]) == ["a b", "abc...", ""]
