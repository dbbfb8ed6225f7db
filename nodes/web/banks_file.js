// What a bank's file says of itself. It needs no page. Files are untrusted: the server checks them again when the bank is used.

const KEY = "continual_concepts";
export const MOST = { file: 100e6, header: 50e6, name: 120, shown: 3, line: 200 }; // bytes, letters, concepts
const FILE = /^[\p{L}\p{N}][\p{L}\p{N}_ ().~-]*\.safetensors$/u;
const CONCEPT = /^[\p{L}\p{N}](?:[\p{L}\p{N}_-]{0,62}[\p{L}\p{N}])?$/u;
const ODD = /[\p{Cc}\u202a-\u202e\u2066-\u2069]+/gu; // control characters, and those that turn the direction of writing
const DEVICE = /^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])\s*\./i; // of Windows, which cannot open such files

/** The JSON in front of a .safetensors file and the position of its last byte; undefined if there is none. */
async function headerOf(file) {
    if (!file.name?.toLowerCase().endsWith(".safetensors") || file.size < 10) return undefined;
    const length = Number(new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true));
    if (length > Math.min(MOST.header, file.size - 8)) return undefined;
    try {
        return [JSON.parse(await file.slice(8, 8 + length).text()), 8 + length];
    } catch {
        return undefined;
    }
}

/**
 * The bank in a file: its header, its metadata, and the position of the last byte that the header names; `fault` if it is a bank
 * that cannot be read. Undefined if the file is something else.
 */
export async function bankIn(file) {
    const [entries, start] = (await headerOf(file)) ?? [];
    const metadata = entries?.__metadata__;
    if (typeof metadata?.[KEY] !== "string") return undefined;
    const ends = Object.entries(entries).map(([key, entry]) => (key === "__metadata__" ? 0 : entry?.data_offsets?.[1] ?? NaN));
    const end = ends.reduce((most, each) => Math.max(most, each), 0) + start;
    try {
        return { header: JSON.parse(metadata[KEY]), metadata, end };
    } catch {
        return { fault: "its description is damaged" };
    }
}

/** Returns the name to store a bank's file under. Throws an error whose message is one sentence. */
export function checkFile(file, { header, end, fault }) {
    const name = file.name.normalize("NFC").replace(/\.safetensors$/i, ".safetensors"); // the server lists this ending alone
    const shown = name.length <= MOST.name ? name : `${name.slice(0, 40)}...`;
    if (name.length > MOST.name || !FILE.test(name) || DEVICE.test(name)) {
        throw new Error(`the file name '${shown}' is not allowed; rename the file: letters, digits, spaces and _ ( ) . ~ -, up to ${MOST.name} in all`);
    }
    if (file.size > MOST.file) {
        throw new Error(`'${shown}' has ${Math.round(file.size / 1e6)} MB, and the page takes ${MOST.file / 1e6}; put it into models/concept_banks`);
    }
    const concepts = header?.concepts;
    const named = Array.isArray(concepts) && concepts.every(entry => CONCEPT.test(entry?.info?.name ?? ""));
    const what = fault ?? (!named ? "its list of concepts is damaged" : !concepts.length ? "it holds no concept"
        : end !== file.size ? "it is incomplete" : "");
    if (what) throw new Error(`'${shown}' cannot be used as a concept bank, because ${what}; get the file again`);
    return name;
}

/** Concepts, licence and author in one line: `<rex>, licence CC BY 4.0, by Ann`. */
export function described({ header, metadata }) {
    const infos = header.concepts.map(entry => entry.info);
    const names = infos.slice(0, MOST.shown).map(info => `<${info.name}>`);
    if (infos.length > MOST.shown) names.push(`${infos.length - MOST.shown} more`);
    if (infos.length > 1) return names.join(", ");
    const line = text => (typeof text === "string" ? text.replace(ODD, " ").trim().slice(0, MOST.line) : "");
    const licence = line(infos[0].licence ?? metadata["modelspec.license"]);
    const author = line(infos[0].author ?? metadata["modelspec.author"]);
    return [...names, ...(licence ? [`licence ${licence}`] : []), ...(author ? [`by ${author}`] : [])].join(", ");
}
