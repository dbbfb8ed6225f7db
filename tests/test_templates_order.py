"""The page's code that puts templates in order. Runs in Node where there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NODE = shutil.which("node")
RUN = """
import { readFileSync } from "node:fs";
import { api } from "./scripts/api.js";
import { folderOf } from "./extensions/our folder/templates.js";
const found = await api.getWorkflowTemplates("a");
console.log(JSON.stringify([found, api.given, ["http://host/extensions/our%20folder/templates.js",
    "http://host/base/extensions/x/templates.js?v=1", "http://host/templates.js"].map(folderOf)]));
"""


@pytest.mark.parametrize("served", [{"our folder": ["10 b", "02 c", "01 d"], "other": ["b", "a"]}, None, {}])
def test_our_templates_come_in_the_order_of_their_numbers(tmp_path, served):
    """The server lists them as they lie on the disk."""
    if NODE is None:
        pytest.skip("this test runs the page's code in Node, and there is no program 'node' here")
    page = tmp_path / "extensions" / "our folder"
    page.mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(ROOT / "nodes" / "web" / "templates.js", page)
    (tmp_path / "scripts" / "api.js").write_text(
        f"export const api = {{ served: {json.dumps(served)},\n"
        "    async getWorkflowTemplates(...given) { this.given = given; return this.served; } };\n")
    (tmp_path / "run.js").write_text(RUN)
    done = subprocess.run([NODE, str(tmp_path / "run.js")], capture_output=True, text=True, check=True)
    found, given, folders = json.loads(done.stdout)
    expected = served and {"our folder": ["01 d", "02 c", "10 b"], "other": ["b", "a"]}
    assert found == expected and given == ["a"] and folders == ["our folder", "x", ""]
