"""Messages on what is lost when other nodes save or merge a MODEL or CLIP with concepts.

ComfyUI's saving and merging nodes copy weights. The deltas of prompt-activated and always-on concepts are
patched into the weights, so they are saved and merged. Word-bound concepts act in the attention, and learned
words are in the CLIP's tokenizer, so they are not copied. Older ComfyUI (such as 0.8) saves weights without
calling the MODEL; it shows these messages for CLIPs and merges only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from ..bank.tokens import listed

_listed = partial(listed, most=6)
KEEP = "keep the bank, and apply it to the loaded model with Apply Concepts"


@dataclass(frozen=True)
class Held:
    """What a MODEL or CLIP holds beside its base.

    Args:
        folded: Concepts whose deltas are in the weights.
        word_bound: Concepts that act through their own words.
        tell: Shows a sentence to the person.
    """

    folded: tuple[str, ...]
    word_bound: tuple[str, ...]
    tell: Callable[[str], None]

    def and_below(self, other: Held | None) -> Held:
        """Together with what the MODEL held already, as with two Apply Concepts nodes."""
        if other is None:
            return self
        return Held(tuple(dict.fromkeys((*other.folded, *self.folded))),
                    tuple(dict.fromkeys((*other.word_bound, *self.word_bound))), self.tell)

    @property
    def of_saved_model(self) -> str:
        inside = (f"the weights of {_listed(self.folded)}, at the strength of the prompt that was set, but "
                  "not their words" if self.folded else "")
        outside = (f"{_listed(self.word_bound)}, because word-bound concepts are no part of the weights"
                   if self.word_bound else "")
        if inside and outside:
            return f"the saved model holds {inside} and not {outside}; {KEEP}"
        return f"the saved model holds {inside}; {KEEP}" if inside else (
            f"the saved model does not hold {outside}; {KEEP}")

    @property
    def of_saved_clip(self) -> str:
        return f"the saved CLIP does not hold the words of {_listed(self.word_bound)}; {KEEP}"

    @property
    def of_merged_model(self) -> str:
        return (f"the merged model does not hold {_listed(self.word_bound)}, because word-bound concepts "
                "are no part of the weights; apply the bank after the merge")

    @property
    def of_merging_model(self) -> str:
        return (f"the merge does not scale {_listed(self.word_bound)}, because word-bound concepts are no "
                "part of the weights; for another strength, apply the bank after the merge")

    @property
    def of_merged_clip(self) -> str:
        return (f"the merged CLIP does not hold the words of {_listed(self.word_bound)}; apply the bank "
                "after the merge")


def telling_model(model, held: Held):
    """Returns a clone of MODEL with messages on what is lost when it is saved or merged. Without concepts,
    returns MODEL itself.
    """
    if not held.folded and not held.word_bound:
        return model
    clone = model.clone()
    before = getattr(model, "held", None)
    base: Any = type(clone)
    clone.__class__ = _model_class(base)
    clone.held, clone.is_told = held.and_below(before), False
    return clone


def telling_clip(clip, held: Held):
    """The same for a CLIP. `held.word_bound` are the concepts whose words it knows."""
    if not held.word_bound:
        return clip
    clone = clip.clone()
    before = getattr(clip, "held", None)
    base: Any = type(clone)
    clone.__class__ = _clip_class(base)
    clone.held = held.and_below(before)
    return clone


@cache
def _model_class(base: Any) -> type:
    """A class of patchers (ComfyUI has several) with the sentences. Clones keep their class."""
    if hasattr(base, "tells_of_concepts"):
        return base

    class TellingPatcher(base):
        tells_of_concepts = True
        held: Held
        is_told = False

        def clone(self, *args, **kwargs):
            clone = super().clone(*args, **kwargs)
            if hasattr(type(clone), "tells_of_concepts"):
                clone.held, clone.is_told = self.held, False
            return clone

        def state_dict_for_saving(self, *args, **kwargs):
            self.held.tell(self.held.of_saved_model)
            return super().state_dict_for_saving(*args, **kwargs)

        def get_key_patches(self, filter_prefix=None):
            if filter_prefix is not None and self.held.word_bound:      # the patcher itself calls it without
                self.held.tell(self.held.of_merged_model)
            return super().get_key_patches(filter_prefix)

        def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
            if strength_model != 1.0 and self.held.word_bound and not self.is_told:      # not so for LoRAs
                self.is_told = True
                self.held.tell(self.held.of_merging_model)
            return super().add_patches(patches, strength_patch, strength_model)

    return TellingPatcher


@cache
def _clip_class(base: Any) -> type:
    if hasattr(base, "tells_of_concepts"):
        return base

    class TellingClip(base):
        tells_of_concepts = True
        held: Held

        def clone(self, *args, **kwargs):
            clone = super().clone(*args, **kwargs)      # of the host's own class
            clone.__class__, clone.held = TellingClip, self.held
            return clone

        def state_dict_for_saving(self, *args, **kwargs):
            self.held.tell(self.held.of_saved_clip)
            return super().state_dict_for_saving(*args, **kwargs)

        def get_sd(self):      # older ComfyUI saves with this
            self.held.tell(self.held.of_saved_clip)
            return super().get_sd()

        def get_key_patches(self):
            self.held.tell(self.held.of_merged_clip)
            return super().get_key_patches()

    return TellingClip
