"""What saved graphs rely on in every node's schema: ids, types, order, defaults, options, ranges and outputs;
no tooltips."""

from __future__ import annotations

KEPT = ("default", "options", "min", "max", "step", "round", "multiline", "optional", "upload",
        "image_folder")
OF_THE_MACHINE = {      # lists of files or of the host's own names
    ("ConceptBankLoad", "bank_name"), ("ConceptImport", "lora"), ("ConceptImport", "embedding"),
    ("ConceptPhotosLoad", "folder"),
    ("RegionalConceptSampler", "sampler_name"), ("RegionalConceptSampler", "scheduler"),
}


def _input(node: str, entry) -> dict:
    values = {key: value for key, value in entry.as_dict().items() if key in KEPT}
    if (node, entry.id) in OF_THE_MACHINE:
        values.pop("options")
    # bitsandbytes' may be installed or not
    if (node, entry.id) == ("ConceptTrainingSettings", "optimizer"):
        values["options"] = [name for name in values["options"] if not name.endswith("8bit")]
    return {"id": entry.id, "type": entry.get_io_type(), **values}


def schemas(classes) -> dict:
    """Node id -> its inputs and outputs in order, as JSON values."""
    found = {}
    for cls in classes:
        schema = cls.define_schema()
        found[schema.node_id] = {
            "category": schema.category,
            "is_input_list": bool(schema.is_input_list),
            "is_output_node": bool(schema.is_output_node),
            "inputs": [_input(schema.node_id, entry) for entry in schema.inputs],
            "outputs": [{"name": entry.display_name, "type": entry.get_io_type(),
                         "list": bool(entry.is_output_list)}
                        for entry in schema.outputs],
        }
    return dict(sorted(found.items()))
