"""The node ElasticWeightAggregate: applies concepts to a MODEL and a CLIP."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..core.bank.composition import WORDS
from ..core.bank.hints import notes_on_base
from ..core.bank.tokens import typed_name
from ..core.charts import note_picture, weights_picture
from ..core.comfy.backbone import ComfyBackbone
from ..core.comfy.concept_clip import concept_clip, encode
from ..core.comfy.model_concepts import Carried, with_concepts
from ..core.comfy.regions import refuse_regions
from ..core.comfy.saving import Held, telling_clip, telling_model
from ..core.conditioning.routing import aggregate, token_lora_deltas
from ..core.errors import ConceptError
from ..core.images import to_tensor
from . import types
from .progress import tell
from .schema import Schema, advanced, with_options

ONE = "one concept"
MODES = {"sharp": "sharp", "paper": "paper", "released code": "released", "equal merge": "equal",
         ONE: "sharp"}
WHICH = "which concepts act"
# what the page shows in place of the modes
LABELS = {"sharp": "those of the prompt (sharp)", "paper": "CIDM's elastic weights (paper)",
          "released code": "weights of CIDM's code (released code)",
          "equal merge": "all, equally (equal merge)"}


class ElasticWeightAggregate(io.ComfyNode):
    """Selects which concepts act, how strongly, at which layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ElasticWeightAggregate",
            display_name="Apply Concepts",
            category=types.EVERYDAY,
            search_aliases=["Elastic Weight Aggregate", "Elastic Weight Aggregation", "EWA", "load concept",
                            "merge lora", "concept bank"],
            description="Adds a bank's concepts to a model and a CLIP. With its outputs, <rex> works in "
                        "every CLIP Text Encode. Objects of 'slots' and concepts of 'bound' act through "
                        "their own words. Concepts of most other methods change the weights once, before "
                        "sampling.",
            inputs=advanced(("mode", "concept"), [
                io.Model.Input("model",
                               tooltip="The checkpoint that the bank was learned on, or one of its family."),
                io.Clip.Input("clip", tooltip="From the same checkpoint; it gets the bank's words."),
                types.Bank.Input("bank", optional=True,
                                 tooltip="Not connected, or an empty bank = model and clip unchanged."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    placeholder="a photo of <rex> on a beach",
                    tooltip="Decides which concepts act. It is also encoded, as the output conditioning.",
                ),
                with_options(io.Combo.Input(
                    "mode",
                    display_name=WHICH,
                    options=list(MODES),
                    default="sharp",
                    tooltip="sharp: those that the prompt names, at full strength. paper: CIDM's "
                            "elastic weights. released code: the weights of CIDM's code. equal merge: "
                            "all with equal weights. one concept: the one named below.",
                ), option_labels=LABELS),
                io.Float.Input("strength", default=1.0, min=-2.0, max=2.0, step=0.05,
                               tooltip="Factor on the deltas; 0 = the plain model."),
                io.String.Input("concept", default="", tooltip="The name, for 'one concept'."),
            ]),
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Conditioning.Output(display_name="conditioning"),
                io.Image.Output(display_name="weights"),
            ],
        )

    @classmethod
    def execute(cls, model, clip, prompt, mode, strength, concept="", bank=None) -> io.NodeOutput:
        if mode not in MODES:
            raise ConceptError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
        if bank is None or not len(bank):
            picture = to_tensor(note_picture("The bank holds no concept; model and clip are unchanged."))
            return io.NodeOutput(model, clip, encode(clip, prompt), picture)
        backbone = ComfyBackbone(model, clip)
        refuse_regions(model)
        only = typed_name(concept) if mode == ONE else ""
        if mode == ONE and not only:
            raise ConceptError(f"'{WHICH}' is '{ONE}', but 'concept' is empty; type a name there; the "
                               f"bank holds {', '.join(bank.names)}")
        parsed = bank.parse(prompt)
        aggregation = aggregate(backbone, bank, parsed, MODES[mode], strength, only=only)
        word_bound = tuple(token_lora_deltas(bank, strength, [only] if only else None))
        carried = Carried(bank, strength, aggregation.folded if strength else {}, word_bound)
        patched = with_concepts(model, backbone.sites, carried, aggregation.deltas if strength else {})
        for note in notes_on_base(bank.infos.values(), backbone.layout, backbone.fingerprint):
            tell(note)
        patched = telling_model(patched, Held(_folded(bank, aggregation), word_bound, tell))
        acting = [only] if only else parsed.concepts if MODES[mode] == "sharp" else bank.names
        strengths = {name: parsed.strength_of(name) for name in acting}
        new_clip = concept_clip(clip, bank, backbone.sites.reads_weights, strengths, tell)
        new_clip = telling_clip(new_clip, Held((), tuple(bank.names), tell))
        picture = to_tensor(weights_picture(aggregation.names, aggregation.weights,
                                            f"{WHICH}: {LABELS.get(mode, mode)}, strength {strength:g}"))
        return io.NodeOutput(patched, new_clip, encode(new_clip, prompt), picture,
                             ui=ui.PreviewImage(picture, cls=cls))


def _folded(bank, aggregation) -> tuple[str, ...]:
    """The concepts whose deltas are in the weights."""
    acting = (aggregation.weights != 0).any(0).tolist()
    return tuple(name for name, acts in zip(aggregation.names, acting, strict=True)
                 if acts and bank.infos[name].composes != WORDS and bank[name].deltas)


NODES = [ElasticWeightAggregate]
