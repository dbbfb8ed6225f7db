// Advanced inputs in ComfyUI's classic renderer, which shows all of them: they are hidden, and a button shows them.
// Nodes 2.0 hides them itself. Without this file all inputs are shown.

import { app } from "../../scripts/app.js";
import { after, isLinked, widgetOf } from "./widgets.js";

const CATEGORY = "continual concepts"; // of our nodes
const SHOW = "Show advanced inputs";
const HIDE = "Hide advanced inputs";
const ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets"; // ComfyUI's own setting

/** The names of a node's advanced inputs, and of what ComfyUI adds to them (the seed's control). */
function advancedNames(node) {
    const { required, optional } = node.constructor.nodeData?.input ?? {};
    const names = Object.entries({ ...required, ...optional })
        .filter(([, given]) => given?.[1]?.advanced)
        .map(([name]) => name);
    return new Set(names.flatMap((name) => [
        name, ...(widgetOf(node, name)?.linkedWidgets ?? []).map((widget) => widget.name),
    ]));
}

/** Whether the person has set that all nodes show their advanced inputs. Older versions have no such setting. */
function alwaysShows() {
    return Boolean(app.extensionManager?.setting?.get?.(ALWAYS));
}

/** `hidden` follows the node's state. Nodes 2.0 reads it for the node's height only. */
function hideUnless(node, widget, isShown) {
    Object.defineProperty(widget, "hidden", {
        configurable: true,
        get: () => !isShown() && !isLinked(node, widget.name),
        set: () => {},
    });
}

app.registerExtension({
    name: "continual-concepts.advanced",
    async nodeCreated(node) {
        if (!node.constructor.nodeData?.category?.startsWith(CATEGORY)) return;
        const names = advancedNames(node);
        if (!names.size) return;
        let savedBefore = false; // by a version that showed all inputs: the graph stays as it was laid out
        let configured = false;
        let isNew = false; // Nodes 2.0 keeps the height of a new node, which counts the hidden inputs
        const isOpen = () => savedBefore || Boolean(node.showAdvanced);
        for (const widget of node.widgets ?? []) {
            if (names.has(widget.name)) hideUnless(node, widget, () => isOpen() || alwaysShows());
        }
        const fit = () => {
            button.label = isOpen() ? HIDE : SHOW;
            if (!window.LiteGraph?.vueNodesMode || isNew) node.setSize([node.size[0], node.computeSize()[1]]);
            node.graph?.setDirtyCanvas?.(true, true);
        };
        const toggle = () => {
            const wasOpen = isOpen();
            savedBefore = false;
            node.showAdvanced = !wasOpen;
            fit();
        };
        const button = node.addWidget("button", SHOW, null, toggle, { serialize: false, canvasOnly: true });
        button.serialize = false;
        Object.defineProperty(button, "hidden", { configurable: true, get: alwaysShows, set: () => {} });
        after(node, "onConfigure", (saved) => {
            configured = true;
            savedBefore = saved?.showAdvanced === undefined;
            button.label = isOpen() ? HIDE : SHOW;
        });
        setTimeout(() => {
            if (configured) return;
            node.showAdvanced ??= false; // graphs store it
            isNew = true;
            fit();
            isNew = false;
        });
    },
});
