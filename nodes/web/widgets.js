// What our files need of a node and its widgets.

import { app } from "../../scripts/app.js";

/** The node of an id such as "15:14": node 14 in the subgraph of node 15. */
export function nodeOf(id) {
    let graph = app.rootGraph ?? app.graph;
    let node = null;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById?.(part) ?? null;
        graph = node?.subgraph;
    }
    return node;
}

/** A widget of a node by its name; undefined if there is none. */
export function widgetOf(node, name) {
    return node.widgets?.find(widget => widget.name === name);
}

/** Calls `then` after whatever `owner[name]` does. */
export function after(owner, name, then) {
    const before = owner[name];
    owner[name] = function (...given) {
        const result = before?.apply(this, given);
        then.apply(this, given);
        return result;
    };
}

/** Whether another node gives the value of an input that has a widget. */
export function isLinked(node, name) {
    return node.inputs?.some(input => input.widget?.name === name && input.link != null) ?? false;
}

/** Whether a node is of a type. Older pages keep the type at the node itself. */
export function isOf(node, type) {
    return (node?.constructor.comfyClass ?? node?.comfyClass) === type;
}
