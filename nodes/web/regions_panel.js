// What can be set of the selected region: a field for each, so that everything can be done by keyboard.

import { MOST, PALETTE, resized } from "./regions_model.js";
import { element } from "./regions_stage.js";

const SHARES = [
    ["strength", "Strength", 1, "How much the region's prompt replaces the scene's; 0 = not at all."],
    ["feather", "Feather", 0.5, "Width of the soft edge as a share of the smaller side; 0 = hard."],
    ["start", "Start", 1, "From which share of the steps on; 0 = the first."],
    ["end", "End", 1, "Until which share of the steps; 1 = the last."],
];
const EDGES = [["w", "Left %"], ["n", "Top %"], ["e", "Right %"], ["s", "Bottom %"]];
const AT = { w: 0, n: 1, e: 2, s: 3 };

/**
 * `on` tells what a person does: type(change) at every letter, change(change) when a value is set, add(), remove(), raise(by), text().
 * `show(region, place)` fills the fields; region may be undefined.
 */
export class Panel {
    constructor(parent, on) {
        this.on = on;
        this.fields = {};
        this.tools(element("div", "ccr-row", parent));
        const grid = element("fieldset", "ccr-fields", parent);
        this.grid = grid;
        this.words(grid);
        SHARES.forEach(([key, label, most, tip]) => {
            const field = this.number(grid, key, label, { min: "0", max: String(most), step: "0.05", title: tip });
            field.addEventListener("change", () => this.share(key, field, most));
        });
        EDGES.forEach(([edge, label]) => {
            const field = this.number(grid, edge, label, { min: "0", max: "100", step: "any", title: `${label} of the picture` });
            field.addEventListener("change", () => this.edge(edge, field));
        });
    }

    tools(row) {
        this.buttons = {};
        const button = (key, text, tip, act) => {
            this.buttons[key] = element("button", "ccr-button", row, { type: "button", title: tip });
            this.buttons[key].textContent = text;
            this.buttons[key].addEventListener("click", act);
        };
        button("add", "Add", "A new region. Or drag on the picture, with Shift also where a region is.", () => this.on.add());
        button("remove", "Delete", "Delete the selected region (Delete key).", () => this.on.remove());
        button("raise", "Raise", "Earlier in the list: it lies on top where regions overlap.", () => this.on.raise(-1));
        button("lower", "Lower", "Later in the list.", () => this.on.raise(1));
        button("text", "JSON", "The drawing as text.", () => this.on.text());
    }

    words(grid) {
        this.line(grid);
        const field = (kind, key, label, attributes) => {
            const made = this.field(grid, kind, key, label, "ccr-wide", attributes);
            made.addEventListener("input", () => this.on.type({ [key]: made.value }));
            made.addEventListener("change", () => this.on.change({ [key]: made.value }));
        };
        const text = { maxlength: String(MOST.prompt), spellcheck: "false", "data-capture-wheel": "true" };
        const example = "What is here, and where: a photo of <rex> in a meadow";
        field("textarea", "prompt", "Prompt", { ...text, rows: "3", placeholder: example });
        field("textarea", "negative", "Negative", { ...text, rows: "1", placeholder: "Empty = the scene's negative" });
    }

    /** Name, colour, and whether the region is on. */
    line(grid) {
        const row = element("div", "ccr-row ccr-wide", grid);
        const name = this.field(row, "input", "name", "Name", "ccr-grow", { maxlength: String(MOST.name) });
        name.addEventListener("input", () => this.on.type({ name: name.value }));
        name.addEventListener("change", () => this.on.change({ name: name.value }));
        const colours = element("div", "ccr-colours", row, { role: "group", "aria-label": "Colour" });
        this.swatches = PALETTE.map((colour, index) => {
            const swatch = element("button", "ccr-swatch", colours, { type: "button", "aria-label": `Colour ${index + 1}` });
            swatch.style.background = colour;
            swatch.addEventListener("click", () => this.on.change({ color: colour }));
            return swatch;
        });
        const label = element("label", "ccr-check", row, { title: "Off = the region is kept and left out." });
        this.fields.on = element("input", "", label, { type: "checkbox", "data-field": "on" });
        label.append("on");
        this.fields.on.addEventListener("change", () => this.on.change({ on: this.fields.on.checked }));
    }

    field(parent, kind, key, label, style, attributes) {
        const around = element("label", `ccr-field ${style}`, parent);
        element("span", "ccr-label", around).textContent = label;
        this.fields[key] = element(kind, "ccr-input", around, { "data-field": key, ...attributes });
        return this.fields[key];
    }

    number(grid, key, label, attributes) {
        return this.field(grid, "input", key, label, "", { type: "number", ...attributes });
    }

    /** A share as it was typed, brought into its range; start and end stay in order. What is no number is taken back. */
    share(key, field, most) {
        const { start, end } = this.region, value = Math.min(Math.max(field.valueAsNumber, 0), most);
        if (Number.isNaN(value)) return this.show(this.region, this.place, true);
        const ordered = key === "start" ? Math.min(value, end) : key === "end" ? Math.max(value, start) : value;
        this.on.change({ [key]: ordered });
    }

    edge(edge, field) {
        const box = this.region.box, by = field.valueAsNumber / 100 - box[AT[edge]];
        if (Number.isNaN(by)) return this.show(this.region, this.place, true);
        this.on.change({ box: resized(box, edge, by, by) });
    }

    /** `place`: {index, count}. A field that is being typed in is left alone unless its value was `set`. */
    show(region, place, set = false) {
        [this.region, this.place] = [region, place];
        this.grid.disabled = !region;
        this.buttons.add.disabled = place.count >= MOST.regions;
        this.buttons.remove.disabled = !region;
        this.buttons.raise.disabled = !region || place.index === 0;
        this.buttons.lower.disabled = !region || place.index === place.count - 1;
        const values = { ...region, ...Object.fromEntries(EDGES.map(([edge]) => [edge, percent(region?.box[AT[edge]])])) };
        for (const [key, field] of Object.entries(this.fields)) {
            if (key === "on") field.checked = region?.on ?? false;
            else if (set || field !== document.activeElement) field.value = values[key] ?? "";
        }
        this.swatches.forEach((swatch, index) => swatch.setAttribute("aria-pressed", String(region?.color === PALETTE[index])));
    }
}

function percent(share) {
    return share === undefined ? "" : Math.round(share * 1000) / 10;
}
