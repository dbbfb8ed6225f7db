"""The node ConceptLearner."""

from __future__ import annotations

from functools import partial

from comfy_api.latest import io, ui

from ..core.bank.concepts import KINDS
from ..core.data.pictures import pair_pictures
from ..core.files import check_output_folder
from ..core.methods import DEFAULT, METHODS
from ..core.training.config import TrainingConfig
from . import types
from .folders import checkpoint_folder
from .images import deferred_pictures, masks_of
from .inputs import check_choice, first, setting_input, setting_inputs, valid
from .learning import AGAIN, IF_KNOWN, KEEP, REFINE, Learning, learn_concept
from .presets import checked_name, checked_noun, preset_inputs, reader_input
from .progress import written_below
from .saving import check_saving
from .schema import Schema, advanced

NAMES = (DEFAULT, *sorted(set(METHODS) - {DEFAULT}))      # of the methods, as they are shown
ADVANCED = ("kind", "method", "steps", "lr", "token_lr", "resolution", "batch_size", "seed", "preview_every",
            "if_known", "stop_after", "show_older", "variant_of", "readable_by")


class ConceptLearner(io.ComfyNode):
    """Learns a new concept on top of a bank."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptLearner",
            display_name="Concept Learner",
            category=types.EVERYDAY,
            is_input_list=True,
            search_aliases=["train lora", "dreambooth", "textual inversion", "continual learning", "CIDM",
                            "teach", "learn without forgetting", "lora without forgetting"],
            description="Learns one concept (your dog, your painter's style) from a few photos and adds it "
                        "to a bank. The stored concepts stay the same, bit for bit, and so does the model.",
            inputs=advanced(ADVANCED, [
                io.Model.Input("model", tooltip="The checkpoint to learn on; it is not changed."),
                io.Clip.Input("clip", tooltip="From the same checkpoint."),
                io.Vae.Input("vae", tooltip="From the same checkpoint; it encodes the photos."),
                io.Image.Input("images",
                               tooltip="3 to 10 photos of the concept: a batch, or a list of any sizes."),
                io.String.Input("name", default="",
                                tooltip="What you type in prompts as <name>: letters, digits, - and _."),
                io.String.Input("class_noun", default="",
                                tooltip="What it is, in a word the model knows: dog, teddy bear, painting."),
                io.Combo.Input("kind", options=list(KINDS), default="object",
                               tooltip="object: a person, animal or thing. style: how pictures look."),
                io.Combo.Input(
                    "method",
                    options=list(NAMES),
                    default=DEFAULT,
                    tooltip="How the concept is learned. slots is the usual one. lora is for files that "
                            "other programs read. docs/methods.md describes all.",
                ),
                setting_input(TrainingConfig, "steps"),
                io.Float.Input("lr", display_name="learning rate (lr)", default=0.0, min=0.0, max=1.0,
                               step=1e-5, round=1e-7,
                               tooltip="Learning rate of the weights; 0 = the method's own."),
                io.Float.Input("token_lr", display_name="word learning rate (token_lr)", default=0.0, min=0.0,
                               max=1.0, step=1e-4, round=1e-7,
                               tooltip="Learning rate of the words; 0 = the method's own."),
                *setting_inputs(TrainingConfig, ("resolution", "batch_size", "seed")),
                io.Int.Input("preview_every", default=100, min=0, max=10_000,
                             tooltip="Steps between previews; 0 = none."),
                io.Combo.Input(
                    "if_known",
                    display_name=IF_KNOWN,
                    options=[KEEP, AGAIN, REFINE],
                    default=KEEP,
                    tooltip="What happens if the bank already holds this name. keep it: nothing is "
                            "learned; other photos or settings are an error. learn it again: the concept "
                            "is replaced. refine it: learning continues from it with further photos.",
                ),
                types.Bank.Input("bank", optional=True,
                                 tooltip="The bank to add it to; not connected = a new one."),
                io.String.Input(
                    "captions",
                    optional=True,
                    default="",
                    multiline=True,
                    tooltip="One line per photo (an empty line = no caption), or one line for all. Empty = "
                            "'a photo of <name>'.",
                ),
                io.Mask.Input("masks", optional=True,
                              tooltip="White where the concept is, one per photo, same size."),
                io.Image.Input("prior_images", optional=True,
                               tooltip="Other pictures of the class, so that the class noun keeps its "
                                       "meaning."),
                types.Selection.Input("selection", optional=True,
                                      tooltip="From Select Concept Neurons; for methods that use one (cns)."),
                types.Settings.Input("method_settings", optional=True,
                                     tooltip="From the method's own settings node; none = its defaults."),
                types.Settings.Input("training_settings", optional=True,
                                     tooltip="From Concept Training Settings; none = its defaults."),
                io.ClipVision.Input(
                    "clip_vision", optional=True,
                    tooltip="Shows the likeness of every preview to your photos. Without it, the encoder "
                            "for photos is used if it is installed. The method l2dm also uses it.",
                ),
                io.Int.Input(
                    "stop_after",
                    optional=True,
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Stop after this many previews without a gain in likeness to the photos; 0 = "
                            "do all steps. Needs preview_every, and clip_vision or the encoder for photos.",
                ),
                io.Boolean.Input(
                    "show_older",
                    display_name="draw older concepts",
                    optional=True,
                    default=False,
                    tooltip="At the end, draw up to eight older concepts of the bank, each beside its "
                            "thumbnail from when it was learned.",
                ),
                *preset_inputs(),
                io.String.Input(
                    "variant_of", display_name="variant of", default="", optional=True,
                    tooltip="For a variant, such as rex-winter of rex: the concept of the bank to start "
                            "from. Its method and settings are used. Empty = start anew.",
                ),
                reader_input(),
                types.Settings.Input("judging", optional=True,
                                     tooltip="From Concept Judge Settings: keeps states and proposes the "
                                             "best; none = the last state counts."),
            ]),
            outputs=[
                types.Bank.Output(display_name="bank"),
                io.Image.Output(display_name="loss picture"),
                io.Image.Output(display_name="previews"),
                io.Image.Output(display_name="older concepts"),
                types.Bank.Output(display_name="proposed bank"),
                io.Image.Output(display_name="kept states"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(cls, name, class_noun, if_known=None, variant_of=""):
        """Reports a missing or wrong name, or a folder that cannot be written, before the graph runs. Text
        from another node is None at this point."""
        name, noun = first(name), first(class_noun)
        goes_on = _goes_on({"if_known": first(if_known), "variant_of": first(variant_of)})
        return valid(lambda: check_choice(IF_KNOWN, first(if_known), (KEEP, AGAIN, REFINE)),
                     lambda: name is None or checked_name(name),
                     lambda: noun is None or checked_noun(noun, goes_on),
                     lambda: check_output_folder(checkpoint_folder()))

    @classmethod
    def execute(
        cls, images, captions=None, bank=None, masks=None, prior_images=None, **inputs
    ) -> io.NodeOutput:
        given = {key: first(value) for key, value in inputs.items()}
        given["name"] = checked_name(given["name"])
        given["class_noun"] = checked_noun(given["class_noun"], _goes_on(given))
        node, bank = getattr(cls.hidden, "unique_id", None), first(bank)
        photos = pair_pictures(deferred_pictures(images, "images"), captions or [], masks_of(masks, "masks"))
        prior = deferred_pictures(prior_images, "prior_images")
        check = partial(check_saving, getattr(cls.hidden, "prompt", None), node, bank, [given["name"]])
        learning = learn_concept(given, bank, photos, prior, node, begins=check)
        return _shown(learning)


def _goes_on(given: dict) -> bool:
    """Whether learning goes on from a stored concept, which has a class noun."""
    return given["if_known"] == REFINE or bool(given.get("variant_of"))


def _shown(learning: Learning) -> io.NodeOutput:
    picture = ui.PreviewImage(learning.previews[-1:], cls=ConceptLearner).as_dict() if learning.is_new else {}
    return io.NodeOutput(learning.bank, learning.loss, learning.previews, learning.older,
                         learning.proposed, learning.states,
                         ui={**picture, **written_below(learning.notes)})


NODES = [ConceptLearner]
