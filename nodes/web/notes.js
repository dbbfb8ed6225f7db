// The texts that our nodes write below themselves and below others. ComfyUI's page shows such a text, but keeps it for
// good, and its classic renderer shows two lines of it. Here a text goes when its node runs again, and it gets the height
// that it needs.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { after, nodeOf } from "./widgets.js";

const WIDGET = "$$node-text-preview"; // ComfyUI's name of the text below a node
const NOTE = "continual-concepts.note"; // sent before each of our texts
const MOST = 180; // height of a text in the graph's pixels; longer ones scroll
const LETTER = 6.2; // mean width of a letter in the graph's pixels
const LINE = 17;
const BORDER = 26; // above and below the lines
const SETTLED = 400; // milliseconds after which Nodes 2.0 has measured a node

const notes = new Map(); // a node's id -> {node, isFresh: of the run that goes on now, before: height, grown: by how much}
const grown = new WeakMap(); // node -> its note; nodes in it save their size without the text

function textOf(node) {
    return node?.widgets?.find((widget) => widget.name === WIDGET);
}

function setHeight(node, height) {
    node.setSize([node.size[0], height]);
    node.graph?.setDirtyCanvas?.(true, true);
}

/** The height that a text takes in the classic renderer. */
function heightOf(text, width) {
    const letters = Math.max(10, Math.floor((width - 52) / LETTER));
    const lines = String(text).split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0);
    return Math.min(MOST, BORDER + LINE * lines);
}

/** A workflow is saved without its texts, so their height is left out, too. */
function saveWithout(node, note) {
    if (!grown.has(node)) {
        after(node, "onSerialize", (saved) => {
            const height = textOf(node) ? grown.get(node).grown : 0;
            if (height && saved?.size) saved.size = [saved.size[0], saved.size[1] - height];
        });
    }
    grown.set(node, note);
}

/** Gives a text its height, once ComfyUI has shown it. */
function fit(id) {
    const note = notes.get(id);
    const node = note?.node;
    const widget = textOf(node);
    if (!widget?.options) return;
    saveWithout(node, note);
    if (window.LiteGraph?.vueNodesMode) {
        if (note.settling) return;
        note.settling = setTimeout(() => {
            note.settling = null;
            note.grown = Math.max(note.grown, node.size[1] - note.before);
        }, SETTLED);
        return;
    }
    widget.options.getMinHeight = () => heightOf(widget.value ?? "", node.size[0]);
    const needed = node.computeSize()[1];
    if (needed > node.size[1]) setHeight(node, needed);
    note.grown = Math.max(note.grown, node.size[1] - note.before);
}

function remove(id) {
    const note = notes.get(id);
    const node = nodeOf(id);
    notes.delete(id);
    // another workflow may have a node of this id
    const index = note?.node === node ? (node?.widgets?.findIndex((widget) => widget.name === WIDGET) ?? -1) : -1;
    if (index < 0) return;
    clearTimeout(note.settling);
    node.widgets[index].onRemove?.();
    node.widgets.splice(index, 1);
    if (note.grown) setHeight(node, Math.max(node.computeSize()[1], node.size[1] - note.grown));
}

/** The subgraphs that hold a node show its texts, too. */
function levels(id) {
    const parts = String(id).split(":");
    return parts.map((_, index) => parts.slice(0, parts.length - index).join(":"));
}

app.registerExtension({
    name: "continual-concepts.notes",
    async setup() {
        const on = (event, then) => api.addEventListener(event, ({ detail }) => then(detail));
        on(NOTE, ({ node: id }) => {
            const node = nodeOf(id);
            if (!node) return;
            const known = textOf(node) && notes.get(id)?.node === node ? notes.get(id) : { node, grown: 0, before: node.size[1] };
            notes.set(id, Object.assign(known, { isFresh: true }));
        });
        on("progress_text", ({ nodeId }) => requestAnimationFrame(() => fit(String(nodeId))));
        on("execution_start", () => notes.forEach((note) => (note.isFresh = false)));
        on("execution_cached", ({ nodes }) => {
            for (const id of nodes ?? []) for (const level of levels(id)) if (notes.has(level)) notes.get(level).isFresh = true;
        });
        on("executing", (id) => {
            if (id == null) return;
            const [own, ...outer] = levels(id);
            remove(own);
            for (const level of outer) if (!notes.get(level)?.isFresh) remove(level);
        });
        const stopped = (detail) => {
            for (const level of detail?.node_id == null ? [] : levels(detail.node_id)) remove(level);
            for (const [id, note] of [...notes]) if (!note.isFresh) remove(id);
        };
        on("execution_interrupted", stopped);
        on("execution_error", stopped);
    },
});
