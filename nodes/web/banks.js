// A bank that is dropped onto the page, such as a share file, is stored in output/concept_banks, and a Load Concept Bank with it
// appears. Other files go to ComfyUI. Without this file, banks are put into that folder by hand.
// A bank that Save Concept Bank has written is in the lists of Load Concept Bank at once. Without this file, R is pressed first.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { bankIn, checkFile, described } from "./banks_file.js";
import { isOf, widgetOf } from "./widgets.js";

const NODE = "ConceptBankLoad";
const NEW_BANK = "(new bank)"; // stands in every list of banks
const SAVED = "continual-concepts.bank-saved"; // sent by the server
const FOLDER = "concept_banks";

let place; // of the last drop, in the graph's coordinates; some versions of the page do not know it

function say(severity, detail) {
    const toast = app.extensionManager?.toast;
    if (toast?.add) toast.add({ severity, summary: "Continual Concepts", detail, life: severity === "error" ? undefined : 8000 });
    else if (severity === "error") window.alert(detail);
}

/** Stores the file beside the saved banks. The server never replaces another file. Returns the name that the file has there. */
async function stored(file, name) {
    const body = new FormData();
    body.append("image", file, name); // the server's route for files has this field for all kinds of files
    body.append("type", "output");
    body.append("subfolder", FOLDER);
    const answer = await api.fetchApi("/upload/image", { method: "POST", body });
    if (answer.status === 413) throw new Error(`the server takes no file of this size; put '${name}' into models/${FOLDER}`);
    if (answer.status !== 200) throw new Error(`the server does not store '${name}' (${answer.status} ${answer.statusText})`);
    return (await answer.json()).name;
}

/** Adds a Load Concept Bank with a stored bank where the file was dropped. */
async function addLoader(name) {
    await app.refreshComboInNodes?.();
    const node = window.LiteGraph.createNode(NODE);
    const graph = app.canvas.graph ?? app.graph;
    node.pos = [...(place ?? app.canvas.graph_mouse)];
    app.canvas.emitBeforeChange?.();
    try {
        graph.add(node);
        const widget = widgetOf(node, "bank_name");
        const values = widget.options.values;
        if (Array.isArray(values) && !values.includes(name)) values.push(name);
        widget.value = name;
        widget.callback?.(name);
    } finally {
        app.canvas.emitAfterChange?.();
    }
    graph.setDirtyCanvas(true, true);
    return node;
}

async function load(file, bank) {
    const name = await stored(file, checkFile(file, bank));
    const node = await addLoader(name);
    say("success", `${name} holds ${described(bank)}`);
    return node;
}

/** The list of an input in a node's definition; its two forms are those of ComfyUI's versions. */
function listIn(definition) {
    const [kind, more] = definition?.input?.required?.bank_name ?? [];
    return Array.isArray(kind) ? kind : more?.options;
}

function nodesOf(graph) {
    return (graph?._nodes ?? []).flatMap(node => [node, ...nodesOf(node.subgraph)]);
}

/** Adds new banks to the lists of present and of later nodes. */
async function addSaved() {
    const answer = await api.fetchApi(`/object_info/${NODE}`);
    const found = listIn((await answer.json())[NODE]) ?? [];
    const later = listIn(window.LiteGraph.registered_node_types[NODE]?.nodeData) ?? [];
    // a subgraph may show the input of a node in it, under a name of its own
    const isOurs = (node, { name, options }) => isOf(node, NODE) ? name === "bank_name"
        : node.subgraph && Array.isArray(options?.values) && options.values.includes(NEW_BANK);
    const shown = nodesOf(app.rootGraph ?? app.graph)
        .flatMap(node => (node.widgets ?? []).filter(widget => isOurs(node, widget)))
        .map(widget => widget.options?.values);
    for (const list of [later, ...shown].filter(Array.isArray)) list.push(...found.filter(name => !list.includes(name)));
}

app.registerExtension({
    name: "continual-concepts.banks",
    setup() {
        api.addEventListener(SAVED, () => addSaved().catch(console.warn));
        document.addEventListener("drop", event => (place = app.canvas.convertEventToCanvasOffset?.(event)), true);
        const before = app.handleFile; // of files that are dropped or opened
        if (!before) return;
        app.handleFile = async function (file, ...given) {
            const bank = await bankIn(file);
            if (!bank) return before.call(this, file, ...given);
            try {
                const node = await load(file, bank);
                given[1]?.onNodeCreated?.(node); // puts several ones below one another, where the page has this
            } catch (error) {
                say("error", `${error.message}.`);
            }
        };
    },
});
