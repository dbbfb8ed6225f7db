// Concept Learner: a new node begins with a preset, and inputs that follow a preset show the value that they will have.
// What the page cannot know is given as a range: the model's family, unless the model is an embedded base.
// Without this file presets work all the same; a new node then begins without one.

import { app } from "../../scripts/app.js";
import { after, isOf, widgetOf } from "./widgets.js";

const NODE = "ConceptLearner";
const AS_SET = "as set";
const FIRST = "person or animal"; // of a new node
const REFINE = "refine it";
const DECIDING = ["preset", "effort", "readable_by", "if_known", "variant_of"]; // inputs that change what is shown
const OF_CONCEPT = ["method", "lr", "token_lr"]; // what learning that goes on from a concept takes from it

/** Whether the model comes from Concept Demo Base, maybe through other nodes. */
function isEmbedded(node) {
    const seen = new Set();
    while (node && !seen.has(node)) {
        seen.add(node);
        if (isOf(node, "ConceptDemoBase")) return true;
        const slot = node.inputs?.findIndex((input) => input.type === "MODEL") ?? -1;
        // a copy in no graph, such as "Convert to Subgraph" makes, cannot be asked what it is linked to
        node = slot < 0 || !node.graph ? null : node.getInputNode?.(slot);
    }
    return false;
}

/** The classic renderer draws a disabled input at half strength. Here its label tells the preset's value, so it is drawn in
 * the stronger colour of values. */
function strengthen(widget) {
    Object.defineProperty(widget, "secondary_text_color", {
        configurable: true,
        get: () => window.LiteGraph?.[widget.disabled ? "WIDGET_TEXT_COLOR" : "WIDGET_SECONDARY_TEXT_COLOR"],
    });
}

/** Inputs that follow the preset are labelled with its values and cannot be edited. */
function show(node, valuesOf) {
    const valueOf = (name) => widgetOf(node, name)?.value;
    const values = valuesOf[valueOf("readable_by")] ?? Object.values(valuesOf)[0];
    const chosen = values[valueOf("preset")]?.[valueOf("effort")];
    const goesOn = valueOf("if_known") === REFINE || Boolean(valueOf("variant_of")?.trim());
    const family = isEmbedded(node) ? "embedded" : "published";
    const followers = Object.keys(Object.values(Object.values(values)[0])[0]);
    for (const name of followers) {
        const widget = widgetOf(node, name);
        if (!widget) continue;
        if (widget.plainLabel === undefined) {
            widget.plainLabel = widget.label ?? widget.name;
            strengthen(widget);
        }
        widget.disabled = Boolean(chosen);
        const value = goesOn && OF_CONCEPT.includes(name) ? "the concept's" : chosen?.[name][family];
        widget.label = chosen ? `${name} = ${value}` : widget.plainLabel;
    }
    node.graph?.setDirtyCanvas?.(true, true);
}

app.registerExtension({
    name: "continual-concepts.learner",
    async nodeCreated(node) {
        if (!isOf(node, NODE)) return;
        const preset = widgetOf(node, "preset");
        const effort = widgetOf(node, "effort");
        const given = node.constructor.nodeData?.input?.optional?.preset ?? [];
        const values = (given[1] ?? {}).preset_values;
        if (!preset || !effort || !values) return;
        for (const name of DECIDING) {
            const widget = widgetOf(node, name);
            if (widget) after(widget, "callback", () => show(node, values));
        }
        after(node, "onConnectionsChange", () => show(node, values));
        let saved = false;
        after(node, "onConfigure", () => {
            saved = true;
            show(node, values);
        });
        // Graphs that were saved without a preset have a name, in the API's form, too: they stay as they are.
        setTimeout(() => {
            if (!saved && preset.value === AS_SET && !widgetOf(node, "name")?.value) preset.value = FIRST;
            show(node, values);
        });
    },
});
