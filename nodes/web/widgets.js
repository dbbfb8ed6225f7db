// What our files need of a node and its widgets.

/** A widget of a node by its name; undefined if there is none. */
export function widgetOf(node, name) {
    return node.widgets?.find(widget => widget.name === name);
}

/** Calls `then` after whatever `owner[name]` does. */
export function after(owner, name, then) {
    const before = owner[name];
    owner[name] = function (...given) {
        const result = before?.apply(this, given);
        then.apply(this, given);
        return result;
    };
}

/** Whether another node gives the value of an input that has a widget. */
export function isLinked(node, name) {
    return node.inputs?.some(input => input.widget?.name === name && input.link != null) ?? false;
}
