// The seeds of our nodes stay the same after a run. ComfyUI's usual "randomize" would give a new learner other numbers at
// each run, so that it learned anew, also after Cancel.

import { app } from "../../scripts/app.js";
import { isOf } from "./widgets.js";

const TYPES = ["ConceptLearner", "ConceptFolderLearner", "ConceptDemoPhotos", "ConceptNeuronSelect", "ConceptEvaluate"];
const CONTROL = /^control_(after|before)_generate$/;

app.registerExtension({
    name: "continual-concepts.seeds",
    nodeCreated(node) {
        if (!TYPES.some((type) => isOf(node, type))) return;
        for (const widget of node.widgets ?? []) if (CONTROL.test(widget.name)) widget.value = "fixed";
    },
});
