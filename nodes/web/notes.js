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

// A node's id -> {node, isFresh: of the run that goes on now, grown: by how much the text made the node higher,
// isPending: a text is not measured yet, at: the node's height before it}
const notes = new Map();
const noteOf = new WeakMap(); // node -> its note, or null; nodes in it save their size without the text
let inRun = new Set(); // ids of all nodes of the run that goes on now

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
    const plain = String(text).replace(/&(lt|gt|amp);/g, " ");
    const lines = plain.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0);
    return Math.min(MOST, BORDER + LINE * lines);
}

/** Gives a text its height, and remembers by how much the node has grown. Nodes 2.0 gives the height by itself. */
function measure(note) {
    const widget = textOf(note.node);
    if (!note.isPending || !widget?.options) return;
    note.isPending = false;
    if (!window.LiteGraph?.vueNodesMode) {
        widget.options.getMinHeight = () => heightOf(widget.value ?? "", note.node.size[0]);
        const needed = note.node.computeSize()[1];
        if (needed > note.node.size[1]) setHeight(note.node, needed);
    }
    note.grown = Math.max(0, note.grown + note.node.size[1] - note.at);
}

/** A workflow is saved without its texts, so their height is left out, too. */
function saveWithout(note) {
    const node = note.node;
    if (!noteOf.has(node)) {
        after(node, "onSerialize", (saved) => {
            const present = noteOf.get(node);
            if (!present || !saved?.size) return;
            measure(present);
            saved.size = [saved.size[0], node.size[1] - present.grown];
        });
    }
    noteOf.set(node, note);
}

function begin(id) {
    const node = nodeOf(id);
    if (!node) return;
    const known = textOf(node) && notes.get(id)?.node === node ? notes.get(id) : { node, grown: 0 };
    if (!known.isPending) Object.assign(known, { isPending: true, at: node.size[1] });
    known.isFresh = true;
    notes.set(id, known);
    saveWithout(known);
}

function shown(id) {
    const note = notes.get(id);
    if (!note) return;
    if (window.LiteGraph?.vueNodesMode) setTimeout(() => measure(note), SETTLED);
    else requestAnimationFrame(() => measure(note));
}

function remove(id) {
    const note = notes.get(id);
    notes.delete(id);
    const widget = textOf(note?.node);
    if (noteOf.get(note?.node) === note) noteOf.set(note.node, null);
    if (!widget || nodeOf(id) !== note.node) return; // the page shows another workflow now
    measure(note);
    if (note.node.removeWidget) note.node.removeWidget(widget);
    else note.node.widgets.splice(note.node.widgets.indexOf(widget), 1);
    if (note.grown) setHeight(note.node, Math.max(note.node.computeSize()[1], note.node.size[1] - note.grown));
}

/** The subgraphs that hold a node show its texts, too. */
function levels(id) {
    const parts = String(id).split(":");
    return parts.map((_, index) => parts.slice(0, parts.length - index).join(":"));
}

function isInRun(id) {
    return [...inRun].some((node) => levels(node).includes(id));
}

async function readRun(prompt) {
    inRun = new Set();
    if (!notes.size) return;
    const queue = await (await api.fetchApi("/queue")).json();
    const running = queue.queue_running?.find(([, id]) => id === prompt);
    inRun = new Set(Object.keys(running?.[2] ?? {}));
}

app.registerExtension({
    name: "continual-concepts.notes",
    async setup() {
        const on = (event, then) => api.addEventListener(event, ({ detail }) => then(detail));
        on(NOTE, ({ node }) => begin(String(node)));
        on("progress_text", ({ nodeId }) => shown(String(nodeId)));
        on("execution_start", ({ prompt_id }) => {
            for (const note of notes.values()) note.isFresh = false;
            readRun(prompt_id).catch(console.warn);
        });
        on("execution_cached", ({ nodes }) => {
            for (const id of nodes ?? []) for (const level of levels(id)) if (notes.has(level)) notes.get(level).isFresh = true;
        });
        on("executing", (id) => {
            if (id == null) return;
            const [own, ...outer] = levels(id);
            if (notes.has(own)) remove(own);
            for (const level of outer) if (notes.has(level) && !notes.get(level).isFresh) remove(level);
        });
        // Notes of nodes that did not come to run would speak of an earlier run. The node that stopped says so itself.
        const stopped = () => {
            for (const [id, note] of [...notes]) if (!note.isFresh && isInRun(id)) remove(id);
        };
        on("execution_interrupted", stopped);
        on("execution_error", stopped);
    },
});
