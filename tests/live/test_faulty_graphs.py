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
