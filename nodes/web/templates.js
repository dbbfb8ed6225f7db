// The template browser shows workflows as the server lists them, and the server lists them as they lie on the disk: in
// no order on most systems. Ours are numbered in the order of learning. Without this file, only that order is missing.

import { api } from "../../scripts/api.js";

/** This pack's folder, which names its templates: `/extensions/FOLDER/templates.js`. */
export function folderOf(url) {
    const [, folder = ""] = /\/extensions\/([^/]+)\/[^/]*$/.exec(new URL(url).pathname) ?? [];
    return decodeURIComponent(folder);
}

/** The server's lists of templates, with one folder's in the order of their names. Lists of others stay as they are. */
export function inOrder(lists, folder) {
    const own = lists?.[folder];
    return Array.isArray(own) ? { ...lists, [folder]: [...own].sort() } : lists;
}

const asked = api.getWorkflowTemplates;
if (asked) {
    api.getWorkflowTemplates = async function (...given) {
        return inOrder(await asked.apply(this, given), folderOf(import.meta.url));
    };
}
