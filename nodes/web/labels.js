// Lists show their options under names that say what they do. Graphs store the options themselves.
// Without this file, and in ComfyUI before it had such names, a list shows what graphs store.

import { app } from "../../scripts/app.js";
import { widgetOf } from "./widgets.js";

app.registerExtension({
    name: "continual-concepts.labels",
    async nodeCreated(node) {
        const { required, optional } = node.constructor.nodeData?.input ?? {};
        for (const [name, given] of Object.entries({ ...required, ...optional })) {
            const labels = given?.[1]?.option_labels;
            const widget = labels && widgetOf(node, name);
            if (widget) widget.options.getOptionLabel = (value) => labels[value] ?? value ?? "";
        }
    },
});
