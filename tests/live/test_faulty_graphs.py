"""Graphs that the server refuses before it runs them."""

from __future__ import annotations

import json


def test_a_mistake_in_drawn_regions_stops_the_run_before_it_starts(server):
    drawing = {"drawing": '[{"prompt": "", "box": [0, 0, 1, 1]}]', "width": 512, "height": 512}
    graph = {
        "1": {"class_type": "ConceptRegionsDraw", "inputs": drawing},
        "2": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "3": {"class_type": "ConceptRegionsShow", "inputs": {"image": ["2", 0], "regions": ["1", 0]}},
    }
    answer = server.call("/prompt", {"prompt": graph})
    assert "the prompt of region 1 is empty" in json.dumps(answer["node_errors"])


def test_what_is_missing_is_named_before_any_work(server):
    """A newcomer runs a workflow without photos or without a bank."""
    graph = {
        "1": {"class_type": "ConceptPhotosLoad", "inputs": {"folder": "rexx"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "3": {"class_type": "ConceptBankLoad", "inputs": {"bank_name": "nobody.safetensors"}},
        "4": {"class_type": "ConceptBankInspect", "inputs": {"bank": ["3", 0]}},
    }
    errors = server.call("/prompt", {"prompt": graph})["node_errors"]
    told = {node: [error["details"] for error in found["errors"]] for node, found in errors.items()}
    assert len(told["1"]) == 1 and "there is no folder 'rexx' with photos in" in told["1"][0]
    assert "put 3 to 10 photos into it, and press R on the page" in told["1"][0]
    assert len(told["3"]) == 1 and "there is no bank 'nobody.safetensors'; learn a concept" in told["3"][0]
