// The editor of a drawing: stage, panel, and the drawing's text when it cannot be read. The text is the only lasting state.

import { changed, fresh, parse, reordered, serialise, without } from "./regions_model.js";
import { Panel } from "./regions_panel.js";
import { element, Stage } from "./regions_stage.js";

const WIRED = "The drawing comes from a connection. Disconnect it to draw here.";

/**
 * `host` is the node: text() and size() read it, write(text) keeps what was drawn, noted(act) makes `act` one step of undo, and
 * wired() tells whether the text comes from elsewhere.
 */
export class Editor {
    constructor(host) {
        this.host = host;
        this.regions = [];
        this.selected = 0;
        this.seen = null;
        this.raw = false;
        this.root = element("div", "ccr", null, { "data-testid": "draw-regions" });
        this.body = element("div", "ccr-body", this.root);
        this.stage = new Stage(this.body, {
            select: index => this.select(index),
            change: (index, box) => this.commit(changed(this.regions, index, { box })),
            add: box => this.add(box),
            remove: index => this.remove(index),
        });
        this.panel = new Panel(this.body, {
            type: change => this.keep(changed(this.regions, this.selected, change)),
            change: change => this.commit(changed(this.regions, this.selected, change)),
            add: () => this.add(),
            remove: () => this.remove(this.selected),
            raise: by => this.reorder(this.selected + by),
            text: () => this.showText(true),
        });
        this.textView();
        this.guard();
    }

    /** Keys that are typed here are no shortcuts of the page. Outside of fields, those with Ctrl are: undo, save, run. */
    guard() {
        for (const kind of ["keydown", "keyup", "keypress"]) {
            this.root.addEventListener(kind, event => {
                const typing = event.target.matches("input, textarea");
                if (typing || !(event.ctrlKey || event.metaKey)) event.stopPropagation();
            });
        }
        for (const kind of ["pointerenter", "focusin"]) this.root.addEventListener(kind, () => this.refresh());
    }

    textView() {
        this.other = element("div", "ccr-other", this.root);
        this.message = element("div", "ccr-message", this.other, { role: "alert" });
        this.area = element("textarea", "ccr-input ccr-text", this.other, {
            spellcheck: "false", "aria-label": "The drawing as JSON", "data-field": "text", "data-capture-wheel": "true",
        });
        const row = element("div", "ccr-row", this.other);
        this.back = element("button", "ccr-button", row, { type: "button", title: "Show the regions of this text." });
        this.back.textContent = "Draw";
        this.empty = element("button", "ccr-button", row, { type: "button", title: "Throws this text away." });
        this.empty.textContent = "Start with no regions";
        this.area.addEventListener("input", () => this.typed());
        this.area.addEventListener("change", () => this.host.noted(() => this.typed()));
        this.back.addEventListener("click", () => this.showText(false));
        this.empty.addEventListener("click", () => {
            this.raw = false;
            this.commit([], -1);
        });
    }

    // State

    /** Reads the node again; cheap when nothing has changed there. */
    refresh() {
        const text = String(this.host.text() ?? ""), ratio = this.host.size(), wired = this.host.wired();
        if (text === this.seen && ratio === this.ratio && wired === this.wired) return;
        [this.ratio, this.wired] = [ratio, wired];
        if (text !== this.seen) this.read(text);
        this.draw();
    }

    read(text) {
        this.seen = text;
        try {
            [this.regions, this.error] = [parse(text), ""];
            this.selected = Math.min(this.selected, this.regions.length - 1);
        } catch (error) {
            [this.regions, this.error] = [[], error.message];
        }
    }

    keep(regions, selected = this.selected) {
        [this.regions, this.selected, this.error] = [regions, selected, ""];
        this.seen = serialise(regions);
        this.host.write(this.seen);
        this.draw();
    }

    commit(regions, selected = this.selected) {
        this.host.noted(() => this.keep(regions, selected));
        this.panel.show(this.regions[this.selected], this.place(), true);
    }

    select(index) {
        this.selected = index;
        this.draw();
    }

    add(box = null) {
        if (this.panel.buttons.add.disabled) return;
        this.commit([...this.regions, fresh(this.regions, box)], this.regions.length);
        if (box) this.stage.focus(this.selected);
        else this.panel.fields.prompt.focus({ preventScroll: true });
    }

    remove(index) {
        if (!this.regions[index]) return;
        this.commit(without(this.regions, index), Math.min(index, this.regions.length - 2));
        this.stage.focus(this.selected);
    }

    reorder(to) {
        if (this.regions[this.selected] && this.regions[to]) this.commit(reordered(this.regions, this.selected, to), to);
    }

    // The text

    typed() {
        this.raw = true; // once it can be read it stays a text, until the person who types is done
        this.read(this.area.value);
        this.host.write(this.seen);
        this.draw();
    }

    showText(raw) {
        this.raw = raw;
        this.draw();
        if (raw) this.area.focus({ preventScroll: true });
    }

    // What is seen

    place() {
        return { index: this.selected, count: this.regions.length };
    }

    draw() {
        const text = this.raw || this.wired || Boolean(this.error);
        this.body.hidden = text;
        this.other.hidden = !text;
        this.stage.frame.style.setProperty("--ratio", String(this.ratio));
        this.stage.show(this.regions, this.selected);
        this.panel.show(this.regions[this.selected], this.place());
        this.message.textContent = this.wired ? WIRED : this.error;
        this.message.hidden = !this.message.textContent;
        this.area.hidden = this.back.hidden = this.empty.hidden = this.wired;
        this.back.disabled = Boolean(this.error);
        this.empty.hidden ||= !this.error;
        if (this.area.value !== this.seen) this.area.value = this.seen;
    }
}
