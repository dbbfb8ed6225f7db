// Concept Region Editor: puts the editor on the node. Without this file the node shows a text and two numbers.

import { app } from "../../scripts/app.js";
import { Editor } from "./regions_editor.js";
import { element } from "./regions_stage.js";
import { after, isLinked, widgetOf } from "./widgets.js";

const NODE = "ConceptRegionsDraw";
const LEAST = 560; // height of the editor, in the graph's pixels
const USUAL = [460, 800]; // size of a new node

function style() {
    const href = new URL("./regions.css", import.meta.url).href;
    if (!document.querySelector(`link[href="${href}"]`)) element("link", "", document.head, { rel: "stylesheet", href });
}

/** What the editor needs of a node. */
function hostOf(node, drawing) {
    const number = name => Math.max(1, Number(widgetOf(node, name)?.value) || 1);
    return {
        text: () => drawing.value,
        size: () => Math.min(Math.max(number("width") / number("height"), 0.1), 10),
        wired: () => isLinked(node, "drawing"),
        write: text => {
            if (drawing.value !== text) drawing.value = text;
            node.graph?.setDirtyCanvas?.(true, true);
        },
        noted: act => {
            app.canvas?.emitBeforeChange?.();
            try {
                act();
            } finally {
                app.canvas?.emitAfterChange?.();
            }
        },
    };
}

/** Over the editor, too, the wheel zooms the graph and the middle button drags it. The Vue renderer handles the wheel itself. */
function passOn(root) {
    root.addEventListener("wheel", event => {
        if (!root.closest("[data-node-id]") && !event.target.matches("textarea:focus")) app.canvas?.processMouseWheel?.(event);
    });
    for (const kind of ["pointerdown", "pointermove", "pointerup"]) {
        const name = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" }[kind];
        root.addEventListener(kind, event => {
            const middle = kind === "pointermove" ? event.buttons & 4 : event.button === 1;
            if (middle) app.canvas?.[name]?.(event);
        });
    }
}

const left = new Map(); // editors of nodes that were removed -> their nodes' ids

/** An undo builds the nodes anew, and the Vue renderer may go on showing the editor of the one that was there before. */
function takePlace(node, editor) {
    for (const [root, id] of left) {
        if (root.isConnected && id === node.id && !editor.root.isConnected && root.closest("[data-node-id]")) root.replaceWith(editor.root);
        if (!root.isConnected) left.delete(root);
    }
}

function equip(node) {
    const drawing = widgetOf(node, "drawing");
    if (!drawing || !node.addDOMWidget) return;
    style();
    const editor = new Editor(hostOf(node, drawing));
    const refresh = () => editor.refresh();
    drawing.hidden = true;
    drawing.options = Object.assign(drawing.options ?? {}, { hidden: true });
    const widget = node.addDOMWidget("editor", "concept_regions", editor.root, {
        serialize: false, // into the prompt; below: into the workflow
        hideOnZoom: false,
        getMinHeight: () => LEAST,
        onDraw: refresh,
    });
    widget.serialize = false;
    widget.label = "regions";
    // The page's panel writes its own width into widgets that it shows; the classic renderer would then keep it.
    Object.defineProperty(widget, "width", { configurable: true, get: () => undefined, set: () => {} });
    ["drawing", "width", "height"].forEach(name => widgetOf(node, name) && after(widgetOf(node, name), "callback", refresh));
    ["onAdded", "onConfigure", "onConnectionsChange"].forEach(name => after(node, name, refresh));
    after(node, "onRemoved", () => left.set(editor.root, node.id));
    after(node, "onConfigure", () => setTimeout(() => takePlace(node, editor), 100));
    passOn(editor.root);
    node.setSize?.([Math.max(node.size[0], USUAL[0]), Math.max(node.size[1], USUAL[1])]);
    refresh();
}

app.registerExtension({
    name: "continual_concepts.regions",
    nodeCreated(node) {
        if (node.comfyClass === NODE) equip(node);
    },
});
