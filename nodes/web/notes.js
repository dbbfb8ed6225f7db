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
const GAP = 4; // between widgets in Nodes 2.0
const LEAST = 60; // height of a text in Nodes 2.0
const DRAGGED = 100; // milliseconds after which a node has the height that it was dragged to
const SETTLED = 400; // milliseconds after which Nodes 2.0 has measured a node

// A node's id -> {node, by: ids of the nodes whose text it is, which may be inside of this one, run: the number of the run
// that it is of, grown: by how much the text made the node higher, isPending: a text is not measured yet, at: the node's
// height before it, held: its height when a mouse button went down, shape: stands for the room that the text takes,
// isKnown: measured with this shape}. Two instances of a subgraph share the notes in it.
const notes = new Map();
const noteOf = new WeakMap(); // node -> its note, or null; nodes in it save their size without the text
let last = null; // id of the node that runs now
let undo = null; // undoes what ComfyUI does with the text that comes next, if another workflow's node wrote that
let run = { number: 0, nodes: Promise.resolve(new Set()) }; // the one that goes on now, and the ids of all its nodes

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

/** The height that a text takes in Nodes 2.0, with the gap above it. Its frame fills the node, so its lines are measured. */
function roomOf(node) {
    const frames = document.querySelectorAll(`[data-node-id="${node.id}"] .comfy-markdown-content`);
    const lines = [...([...frames].at(-1)?.children ?? [])];
    if (!lines.length) return Infinity;
    return Math.max(LEAST, lines.at(-1).offsetTop + lines.at(-1).offsetHeight - lines[0].offsetTop) + GAP;
}

/** Gives a text its height, and remembers by how much the node has grown. Nodes 2.0 gives the height by itself. */
function measure(note) {
    const widget = textOf(note.node);
    if (!note.isPending || !widget?.options) return;
    const isClassic = !window.LiteGraph?.vueNodesMode;
    if (isClassic && note.node.flags?.collapsed) return; // it is measured later, when it is open
    note.isPending = false;
    delete note.held;
    const shape = heightOf(widget.value ?? "", isClassic ? note.node.size[0] : 300);
    const isSame = note.shape === shape;
    const isSettled = isSame && (isClassic || note.grown > 0 || note.isKnown); // Nodes 2.0 may be late the first time
    Object.assign(note, { shape, isKnown: isSame });
    if (isSettled) return; // a person changed the height since `begin`, if anything did
    if (isClassic) {
        widget.options.getMinHeight = () => heightOf(widget.value ?? "", note.node.size[0]);
        const needed = note.node.computeSize()[1];
        if (needed > note.node.size[1]) setHeight(note.node, needed);
    }
    const grown = Math.max(0, note.grown + note.node.size[1] - note.at);
    note.grown = isClassic ? grown : Math.min(grown, roomOf(note.node)); // a picture may have come meanwhile
}

/** A height that a person chose is kept when the text goes. */
function chosen() {
    for (const note of notes.values()) {
        if ("held" in note && note.node.size[1] !== note.held) note.grown = 0;
        delete note.held;
    }
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

function begin(id, by) {
    const node = nodeOf(id);
    if (!node) return;
    const known = (textOf(node) && noteOf.get(node)) || { node, grown: 0 };
    if (!known.isPending) Object.assign(known, { isPending: true, at: node.size[1] });
    if (known.run !== run.number) Object.assign(known, { run: run.number, by: new Set() });
    known.by.add(by);
    notes.set(id, known);
    saveWithout(known);
}

function shown(id) {
    const note = notes.get(id);
    if (!note) return;
    if (window.LiteGraph?.vueNodesMode) setTimeout(() => measure(note), SETTLED);
    else requestAnimationFrame(() => measure(note));
}

/** Returns what gives a node its present text and height back. The node may be missing. */
function before(node) {
    const widget = textOf(node);
    const [text, height] = [widget?.value, node?.size[1]];
    return () => {
        const written = textOf(node);
        if (!written) return;
        if (widget) written.value = text;
        else removeText(node, written);
        if (node.size[1] !== height) setHeight(node, height);
    };
}

function removeText(node, widget) {
    if (node.removeWidget) node.removeWidget(widget);
    else node.widgets.splice(node.widgets.indexOf(widget), 1);
}

function remove(note) {
    const ids = [...notes.keys()].filter((id) => notes.get(id) === note);
    for (const id of ids) notes.delete(id);
    const widget = textOf(note.node);
    if (noteOf.get(note.node) === note) noteOf.set(note.node, null);
    if (!widget || !ids.some((id) => nodeOf(id) === note.node)) return; // the page shows another workflow now
    measure(note);
    removeText(note.node, widget);
    if (note.grown) setHeight(note.node, Math.max(note.node.computeSize()[1], note.node.size[1] - note.grown));
}

function removeWhere(isWrong) {
    for (const note of new Set(notes.values())) if (isWrong(note)) remove(note);
}

/** The ids of all nodes of a run. A short one may be over when the server answers. */
async function nodesIn(prompt) {
    const read = async (path) => (await api.fetchApi(path)).json();
    const running = (await read("/queue")).queue_running?.find(([, id]) => id === prompt);
    const [, , graph] = running ?? (await read(`/history/${prompt}`))[prompt]?.prompt ?? [];
    return new Set(Object.keys(graph ?? {}));
}

/** Notes of nodes that did not come to run would speak of an earlier run. The node that stopped says so itself. */
async function stopped() {
    const { number, nodes } = run;
    const ids = await nodes;
    removeWhere((note) => note.run < number && [...note.by].some((id) => ids.has(id)));
}

app.registerExtension({
    name: "continual-concepts.notes",
    async setup() {
        const on = (event, then) => api.addEventListener(event, ({ detail }) => then(detail));
        on(NOTE, ({ node, by, workflow }) => {
            const own = (app.rootGraph ?? app.graph)?.id;
            undo = workflow && own && workflow !== own ? before(nodeOf(node)) : null;
            if (!undo) begin(String(node), String(by ?? node));
        });
        on("progress_text", ({ nodeId }) => {
            if (undo) queueMicrotask(undo); // after ComfyUI's own handler
            else shown(String(nodeId));
            undo = null;
        });
        on("execution_start", ({ prompt_id }) => {
            const unknown = (error) => (console.warn(error), new Set());
            last = null;
            run = { number: run.number + 1, nodes: notes.size ? nodesIn(prompt_id).catch(unknown) : Promise.resolve(new Set()) };
        });
        on("execution_cached", ({ nodes }) => {
            const cached = new Set((nodes ?? []).map(String));
            for (const note of notes.values()) if ([...note.by].every((id) => cached.has(id))) note.run = run.number;
        });
        on("executing", (id) => {
            if (id == null) return;
            const own = String(id);
            if (own === last) return; // repeated, because the page was connected anew
            last = own;
            removeWhere((note) => note.by.has(own) && (notes.get(own) === note || note.run < run.number));
        });
        const hold = () => notes.forEach((note) => (note.held = note.node.size[1]));
        window.addEventListener("pointerdown", hold, { capture: true });
        window.addEventListener("pointerup", () => setTimeout(chosen, DRAGGED), { capture: true });
        on("execution_interrupted", stopped);
        on("execution_error", stopped);
    },
});
