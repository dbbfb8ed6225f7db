"""`locales/en/nodeDefs.json` from the nodes' own schemas; the other languages translate it.

    python tests/host/make_locales.py COMFYUI_FOLDER
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "locales" / "en" / "nodeDefs.json"


def _one(part) -> dict[str, str]:
    """What people read of an input or an output."""
    found = {"name": getattr(part, "display_name", None) or getattr(part, "id", None),
             "tooltip": getattr(part, "tooltip", None)}
    return {key: value for key, value in found.items() if value}


def definitions(classes) -> dict:
    """ComfyUI's form of a nodeDefs file, of every node."""
    found = {}
    for cls in classes:
        schema = cls.define_schema()
        found[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {one.id: _one(one) for one in schema.inputs},
            "outputs": {str(i): _one(one) for i, one in enumerate(schema.outputs)},
        }
    return dict(sorted(found.items()))


def text_of(found: dict) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def main(comfyui: str) -> None:
    sys.path.insert(0, comfyui)
    from comfy.cli_args import args

    args.cpu = True
    import importlib

    extension = importlib.import_module("continual_concepts.nodes").Extension()
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text_of(definitions(asyncio.run(extension.get_node_list()))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
