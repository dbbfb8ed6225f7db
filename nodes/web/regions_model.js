// Regions as plain data: reading and writing the drawing's text, and the arithmetic of boxes. It needs no page.
// A box is [left, top, right, bottom], each a share of the picture from 0 to 1. The server refuses what is refused here.

export const MOST = { regions: 32, prompt: 4000, name: 100 };
export const SMALLEST = 0.02; // a box drawn or resized here is at least so wide and so high
export const DEFAULTS = { name: "", negative: "", strength: 1, start: 0, end: 1, feather: 0, on: true };
const KEYS = ["name", "prompt", "box", "color", "negative", "strength", "start", "end", "feather", "on"];
const BOX = "[left, top, right, bottom], numbers from 0 to 1 with left < right and top < bottom";

// Colours

function channels(index) {
    const hue = ((index * 0.61803) % 1) * 6, sector = Math.floor(hue), part = hue - sector;
    const value = 0.86, share = 0.65;
    const low = value * (1 - share), down = value * (1 - share * part), up = value * (1 - share * (1 - part));
    const mixes = [[value, up, low], [down, value, low], [low, value, up], [low, down, value], [up, low, value], [value, low, down]];
    return mixes[sector % 6].map(channel => Math.trunc(255 * channel));
}

/** #rrggbb of the region at an index; the pictures that the nodes draw have the same colours. */
export function colourOf(index) {
    return "#" + channels(index).map(channel => channel.toString(16).padStart(2, "0")).join("");
}

export const PALETTE = [...Array(8).keys()].map(colourOf);

/** Black or white, whichever has the higher contrast with a colour (WCAG 2.2). */
export function inkOn(colour) {
    const [red, green, blue] = [1, 3, 5].map(at => {
        const channel = parseInt(colour.slice(at, at + 2), 16) / 255;
        return channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4;
    });
    const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    return (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) ? "#000000" : "#ffffff";
}

// The text

function shown(value) {
    const text = JSON.stringify(value) ?? "nothing";
    return text.length <= 60 ? text : text.slice(0, 60) + "...";
}

function wrong(key, which, value, allowed) {
    return new Error(`the ${key} of ${which} is ${shown(value)}; allowed: ${allowed}`);
}

function isNumber(value, most) {
    return typeof value === "number" && value >= 0 && value <= most;
}

function checkText(item, key, which, limit) {
    const value = item[key] ?? "";
    if (key in item && typeof item[key] !== "string") throw wrong(key, which, item[key], `a text of at most ${limit} characters`);
    const length = [...value].length;
    if (length > limit) throw new Error(`the ${key} of ${which} has ${length} characters; allowed: at most ${limit}`);
    if (/\p{Surrogate}/u.test(value)) throw wrong(key, which, value, "a text of whole characters");
}

function checkNumbers(item, which) {
    for (const [key, most] of [["strength", 1], ["start", 1], ["end", 1], ["feather", 0.5]]) {
        if (key in item && !isNumber(item[key], most)) throw wrong(key, which, item[key], `a number from 0 to ${most}`);
    }
    const { start, end } = { ...DEFAULTS, ...item };
    if (start > end) throw wrong("start", which, start, `at most its end, ${end}`);
    const box = item.box;
    const whole = Array.isArray(box) && box.length === 4 && box.every(value => isNumber(value, 1));
    if (!whole || !(box[0] < box[2] && box[1] < box[3])) throw wrong("box", which, box, BOX);
}

function regionOf(item, number) {
    let which = `region ${number}`;
    if (item === null || typeof item !== "object" || Array.isArray(item)) {
        throw new Error(`${which} of the drawing is ${shown(item)}; allowed: an object with ${KEYS.join(", ")}`);
    }
    checkText(item, "name", which, MOST.name);
    if (item.name?.trim()) which += ` (${item.name.trim()})`;
    const unknown = Object.keys(item).find(key => !KEYS.includes(key));
    if (unknown !== undefined) throw new Error(`${which} of the drawing has ${shown(unknown)}; allowed: ${KEYS.join(", ")}`);
    const missing = ["prompt", "box"].find(key => !(key in item));
    if (missing) throw new Error(`${which} of the drawing has no ${missing}; every region needs one`);
    checkText(item, "prompt", which, MOST.prompt);
    checkText(item, "negative", which, MOST.prompt);
    checkNumbers(item, which);
    if ("on" in item && typeof item.on !== "boolean") throw wrong("on", which, item.on, "true or false");
    if ("color" in item && !(typeof item.color === "string" && /^#[0-9a-f]{6}$/i.test(item.color))) {
        throw wrong("color", which, item.color, "#rrggbb, such as #4c76db");
    }
    return { ...DEFAULTS, color: colourOf(number - 1), ...item };
}

/** Regions of a drawing's text, with every setting and a colour; throws an Error of one sentence. A prompt may still be empty here. */
export function parse(text) {
    if (!text.trim()) return [];
    let items;
    try {
        items = JSON.parse(text);
    } catch (error) {
        throw new Error(`the drawing is not readable JSON: ${error.message}; allowed: a list of regions`);
    }
    if (!Array.isArray(items)) throw new Error(`the drawing is ${shown(items)}; allowed: a list of regions in JSON, such as [] for none`);
    if (items.length > MOST.regions) throw new Error(`the drawing has ${items.length} regions; allowed: at most ${MOST.regions}`);
    return items.map((item, index) => regionOf(item, index + 1));
}

/** The text of regions: one line each, without values that are the defaults. */
export function serialise(regions) {
    const lines = regions.map(region => {
        const kept = KEYS.filter(key => region[key] !== DEFAULTS[key]).map(key => `${JSON.stringify(key)}: ${plain(region[key])}`);
        return `{${kept.join(", ")}}`;
    });
    return lines.length ? `[\n${lines.join(",\n")}\n]` : "[]";
}

function plain(value) {
    return Array.isArray(value) ? `[${value.join(", ")}]` : JSON.stringify(value);
}

// Boxes

const limit = (value, low, high) => Math.min(Math.max(value, low), high);
const rounded = value => Math.round(value * 1000) / 1000; // a tenth of a per cent

/** The box moved by shares of the picture; it stays inside, and its size stays. */
export function moved(box, right, down) {
    const [width, height] = [box[2] - box[0], box[3] - box[1]].map(size => Math.max(rounded(size), SMALLEST));
    const [x, y] = [limit(box[0] + right, 0, 1 - width), limit(box[1] + down, 0, 1 - height)].map(rounded);
    return [x, y, rounded(x + width), rounded(y + height)];
}

/** The box with the edges that `handle` names ("n", "se", ...) moved by shares of the picture. */
export function resized(box, handle, right, down) {
    let [x0, y0, x1, y1] = box;
    if (handle.includes("w")) x0 = rounded(limit(x0 + right, 0, Math.max(0, x1 - SMALLEST)));
    if (handle.includes("e")) x1 = rounded(limit(x1 + right, Math.min(1, x0 + SMALLEST), 1));
    if (handle.includes("n")) y0 = rounded(limit(y0 + down, 0, Math.max(0, y1 - SMALLEST)));
    if (handle.includes("s")) y1 = rounded(limit(y1 + down, Math.min(1, y0 + SMALLEST), 1));
    return [x0, y0, x1, y1];
}

/** The box between two points; null when it is too small to be intended. */
export function between(from, to) {
    const [x0, x1] = [from[0], to[0]].map(value => rounded(limit(value, 0, 1))).sort((a, b) => a - b);
    const [y0, y1] = [from[1], to[1]].map(value => rounded(limit(value, 0, 1))).sort((a, b) => a - b);
    return x1 - x0 >= SMALLEST && y1 - y0 >= SMALLEST ? [x0, y0, x1, y1] : null;
}

/** Index of the smallest region at a point, so that one inside another can be selected; -1 when there is none. */
export function hit(regions, [x, y]) {
    let found = -1, least = Infinity;
    regions.forEach(({ box }, index) => {
        const area = (box[2] - box[0]) * (box[3] - box[1]);
        if (x >= box[0] && x <= box[2] && y >= box[1] && y <= box[3] && area < least) [found, least] = [index, area];
    });
    return found;
}

// Lists

/** A new region, in the first colour that no other has; without a box it is placed a little beside the last one. */
export function fresh(regions, box = null) {
    const step = 0.05 * (regions.length % 8);
    const used = regions.map(region => region.color);
    const color = PALETTE.find(colour => !used.includes(colour)) ?? colourOf(regions.length);
    return { ...DEFAULTS, prompt: "", color, box: box ?? moved([0.1, 0.1, 0.5, 0.5], step, step) };
}

export function changed(regions, index, change) {
    return regions.map((region, at) => (at === index ? { ...region, ...change } : region));
}

export function without(regions, index) {
    return regions.filter((_, at) => at !== index);
}

/** The list with one region moved from its place to another. */
export function reordered(regions, index, to) {
    const rest = without(regions, index);
    return [...rest.slice(0, to), regions[index], ...rest.slice(to)];
}

/** What is written into a region's box. */
export function excerpt(text, most = 120) {
    const signs = [...text.replace(/\s+/g, " ").trim()];
    return signs.length <= most ? signs.join("") : signs.slice(0, most - 3).join("").trimEnd() + "...";
}
