// Text boxes whose text comes over a wire, in ComfyUI's classic renderer: there they stay as empty space that grows with the
// node. Here they take one line, with their name. Nodes 2.0 shows them as they are.

import { app } from "../../scripts/app.js";
import { after, isLinked } from "./widgets.js";

const CATEGORY = "continual concepts"; // of our nodes
const LINE = 20; // height in the graph's pixels
const LEFT = 20; // where names of inputs begin

function shrink(node, widget) {
    for (const limit of ["getMinHeight", "getMaxHeight"]) {
        const usual = widget.options[limit];
        widget.options[limit] = () => (isLinked(node, widget.name) ? LINE : usual?.());
    }
    after(widget, "draw", (context, _node, _width, y) => {
        if (!isLinked(node, widget.name) || !context || app.canvas?.low_quality) return;
        context.save();
        context.fillStyle = window.LiteGraph?.NODE_TEXT_COLOR;
        context.textAlign = "left";
        context.fillText(widget.label ?? widget.name, LEFT, y + 0.7 * LINE);
        context.restore();
    });
}

app.registerExtension({
    name: "continual-concepts.linked",
    async nodeCreated(node) {
        if (!node.constructor.nodeData?.category?.startsWith(CATEGORY)) return;
        for (const widget of node.widgets ?? []) if (widget.element && widget.options) shrink(node, widget);
    },
});
