// The picture's frame with the boxes of the regions in it: drawing, moving and resizing by pointer and by arrow keys.

import { between, excerpt, hit, inkOn, moved, resized } from "./regions_model.js";

const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];
const STEP = 0.01; // of the picture, for an arrow key
const ARROWS = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };

export function element(kind, name, parent, attributes = {}) {
    const made = document.createElement(kind);
    if (name) made.className = name;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent?.append(made);
    return made;
}

/**
 * `on` tells what a person does: select(index), change(index, box), add(box), remove(index).
 * `show(regions, selected)` draws; `focus(index)` gives a box the keyboard focus.
 */
export class Stage {
    constructor(parent, on) {
        this.on = on;
        this.regions = [];
        this.selected = -1;
        this.drag = null;
        this.room = element("div", "ccr-room", parent);
        this.frame = element("div", "ccr-frame", this.room, { role: "group", tabindex: "-1", "aria-label": "Regions of the picture" });
        this.hint = element("div", "ccr-hint", this.frame);
        this.hint.textContent = "Drag to draw a region.";
        this.draft = element("div", "ccr-draft", this.frame);
        this.boxes = [];
        this.handles = HANDLES.map(handle => element("div", "ccr-handle", null, { "data-handle": handle }));
        this.listen();
    }

    listen() {
        const frame = this.frame;
        // The browser would move the focus to the frame after we moved it to a box. Stopping pointerdown would stop mouseup as well,
        // at which the page notes a step for its undo.
        frame.addEventListener("mousedown", event => event.preventDefault());
        frame.addEventListener("pointerdown", event => this.begin(event));
        frame.addEventListener("pointermove", event => this.proceed(event));
        frame.addEventListener("pointerup", event => this.end(event));
        frame.addEventListener("pointercancel", () => this.abandon());
        frame.addEventListener("keydown", event => this.key(event));
        frame.addEventListener("focusin", event => {
            const index = this.boxes.indexOf(event.target);
            if (index >= 0 && index !== this.selected && !this.drag) this.on.select(index);
        });
    }

    // Pointer

    /** Where an event is, in shares of the picture; what the page's zoom does to the frame cancels out. */
    place(event) {
        const frame = this.frame.getBoundingClientRect();
        return [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
    }

    begin(event) {
        if (event.button !== 0 || this.drag) return;
        const from = this.place(event), handle = event.target.dataset?.handle;
        const index = handle ? this.selected : event.shiftKey ? -1 : hit(this.regions, from);
        this.frame.setPointerCapture(event.pointerId);
        this.drag = { from, handle, index, box: this.regions[index]?.box, result: null };
        this.on.select(index);
        this.focus(index);
    }

    proceed(event) {
        if (!this.drag) return this.point(event);
        const { from, handle, index, box } = this.drag, to = this.place(event);
        const [right, down] = [to[0] - from[0], to[1] - from[1]];
        if (index < 0) this.drag.result = between(from, to);
        else if (handle) this.drag.result = resized(box, handle, right, down);
        else this.drag.result = moved(box, right, down);
        this.draw();
    }

    /** What pressing here would do; handles have cursors of their own. */
    point(event) {
        this.frame.style.cursor = !event.shiftKey && hit(this.regions, this.place(event)) >= 0 ? "move" : "crosshair";
    }

    end() {
        if (!this.drag) return;
        const { index, box, result } = this.drag;
        this.abandon();
        if (!result) return;
        if (index < 0) this.on.add(result);
        else if (String(result) !== String(box)) this.on.change(index, result);
    }

    abandon() {
        this.drag = null;
        this.draw();
    }

    // Keys

    key(event) {
        const arrow = ARROWS[event.key], region = this.regions[this.selected];
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        if (event.key === "Escape") {
            if (this.drag) this.abandon();
            else this.on.select(-1);
        } else if (region && arrow) {
            this.on.change(this.selected, event.shiftKey ? resized(region.box, "se", ...arrow) : moved(region.box, ...arrow));
        } else if (region && (event.key === "Delete" || event.key === "Backspace")) {
            this.on.remove(this.selected);
        } else return;
        event.preventDefault();
    }

    focus(index) {
        (this.boxes[index] ?? this.frame).focus({ preventScroll: true });
    }

    // Drawing

    show(regions, selected) {
        [this.regions, this.selected, this.drag] = [regions, selected, regions === this.regions ? this.drag : null];
        while (this.boxes.length < regions.length) this.boxes.push(this.newBox());
        while (this.boxes.length > regions.length) this.boxes.pop().remove();
        this.draw();
    }

    newBox() {
        const box = element("div", "ccr-box", this.frame, { tabindex: "0", role: "button" });
        const words = element("div", "ccr-words", box);
        box.name = element("div", "ccr-name", words);
        box.prompt = element("div", "ccr-prompt", words);
        return box;
    }

    draw() {
        this.hint.hidden = this.regions.length > 0 || Boolean(this.drag?.result);
        this.regions.forEach((region, index) => this.drawBox(this.boxes[index], region, index));
        const drawn = this.drag?.index < 0 ? this.drag.result : null;
        this.draft.hidden = !drawn;
        if (drawn) lay(this.draft, drawn);
        const chosen = this.boxes[this.selected];
        if (!chosen) this.handles.forEach(handle => handle.remove());
        else if (this.handles[0].parentElement !== chosen) chosen.append(...this.handles);
    }

    drawBox(box, region, index) {
        const chosen = index === this.selected;
        lay(box, (this.drag?.index === index && this.drag.result) || region.box);
        box.style.setProperty("--shade", region.color);
        box.style.setProperty("--ink", inkOn(region.color));
        box.style.zIndex = chosen ? this.regions.length + 1 : this.regions.length - index; // the first of the list lies on top
        box.classList.toggle("ccr-off", !region.on);
        box.setAttribute("aria-pressed", String(chosen));
        box.name.textContent = `${index + 1}${region.name.trim() ? " " + region.name.trim() : ""}`;
        box.prompt.textContent = excerpt(region.prompt) || "no prompt yet";
        box.prompt.classList.toggle("ccr-missing", !region.prompt.trim());
        box.setAttribute("aria-label", `Region ${box.name.textContent}: ${box.prompt.textContent}`);
    }
}

function lay(box, [left, top, right, bottom]) {
    const share = value => `${100 * value}%`;
    Object.assign(box.style, { left: share(left), top: share(top), width: share(right - left), height: share(bottom - top) });
}
