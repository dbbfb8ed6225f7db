"""What families with joint attention of text and picture share.

Every block is a site. Text and picture share one softmax there, and both change by it. Only the rows of the
picture see a concept: the attention that they pay to the rows of the concept's words is divided among its
slots. The rows of the text keep the host's attention; otherwise other words would read the concept. So do
those of reference pictures, which stand behind the picture's own.

Two of the host's patches reach the blocks. `Begin` (attn1 patch) gets queries and keys after their norm and
before their rotary positions. It computes the picture's rows with the processor and leaves those of the text
to the host. `Finish` (attn1 output patch) puts both together. So no attention is computed twice.

Patches do not see the inputs of projections. While learning, core calls the blocks itself and changes the
projections' outputs (see `fused`). While the host samples, deltas are patches of the weights, or of parts of
them. So they act whenever the MODEL runs. Slots need no projections.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import comfy.model_sampling
from comfy.ldm.flux.math import apply_rope
from torch import Tensor, nn

from ...attention.token_lora import with_delta
from ...errors import ConceptError
from ...model.backbone import TextEncoder
from ...model.flow import FlowSchedule
from ...model.fused import Change, Offset, Projection, projecting, running
from ...model.joint_rows import attend_picture, fill_bias, put_together, restarted, without_picture
from ...model.processor import AttentionProcessor
from ...model.sites import PROJECTIONS, Site, SiteLayout
from ..noun_clip import RowText
from ..sites import DELTAS, PROCESSOR
from ..text import row_name
from .base import Family, append_once

BEFORE, AFTER = "attn1_patch", "attn1_output_patch"      # the host's keys of patches
_REFERENCES = "reference_image_num_tokens"      # the host's key of their numbers of rows
_PICTURE = "continual_concepts_picture"      # the attended picture, in the options of one block call
FILLS = "continual_concepts_fills"      # `Context.fills` of a call, where the denoiser takes no mask
_TIMESTEPS = 1000      # of training; the host's table may have more


class Joint(Family):
    """A MODEL with joint attention, for pictures from text.

    A class that derives from it sets `model`, `denoiser`, `layout`, and `flow`, the MODEL's schedule.
    """

    guides_attention: ClassVar[bool] = False
    learns_in_text = False
    flow: FlowSchedule

    @abstractmethod
    def blocks(self, denoiser: Any) -> list[nn.Module]:
        """The blocks of a denoiser, in the order of the sites."""

    def offset(self, site: Site, projection: str) -> Offset | None:
        """Where a projection is in the weight of its layer; None for all of it."""
        return None

    def patch_key(self, site: Site, projection: str) -> str | tuple[str, Offset]:
        key, offset = self.key(site, projection), self.offset(site, projection)
        return key if offset is None else (key, offset)

    def project(self, site: Site, projection: str, x: Tensor) -> Tensor:
        self.layout.refuse_joint("projecting text is")
        return x

    def schedule(self) -> FlowSchedule:
        sampling = self.model.get_model_object("model_sampling")
        if not isinstance(sampling, comfy.model_sampling.CONST):
            raise ConceptError(f"the model samples by {type(sampling).__name__}; allowed: a flow")
        sigmas = sampling.sigmas.detach().float().cpu()
        step = max(1, len(sigmas) // _TIMESTEPS)
        return FlowSchedule(sigmas[step - 1::step].clone())

    def times(self, timesteps: Tensor) -> Tensor:
        """The denoiser's times of integer timesteps `[B]`."""
        return self.model.get_model_object("model_sampling").timestep(self.flow.sigma(timesteps)).float()

    def text_encoders(self, clip, load: Callable[[], None]) -> tuple[TextEncoder, ...]:
        def vectors() -> Tensor:
            return getattr(clip.cond_stage_model, row_name(clip)).transformer.get_input_embeddings().weight

        return (RowText(clip, vectors, self.rows, self.reads_pooled),)

    # Sampling

    def hook(self, clone, self_attention: bool = False) -> None:
        for name, patches in self.own_options()["patches"].items():
            append_once(clone, name, patches[0])

    def add_layer_copies(self, clone) -> None:
        """Nothing to do: all sites read the same text."""

    def is_alone(self, options: dict) -> bool:
        return False      # the text changes from block to block, so nothing that is read from it can be kept

    def reads_own_text(self, options: dict) -> bool:
        return False

    def has_foreign_self_attention(self, options: dict) -> bool:
        return any(not isinstance(patch, Begin) for patch in options.get("patches", {}).get(BEFORE, []))

    @contextmanager
    def attached(self, denoiser: Any = None, learns: bool = False) -> Iterator[None]:
        """Modules run functions of this package, see `forwards`."""
        forwards = self.forwards(denoiser or self.denoiser, learns)
        if any(isinstance(module.__dict__.get("forward"), Around) for module in forwards):
            yield      # a call around this one attached them
            return
        with running(forwards):
            yield

    def forwards(self, denoiser: Any, learns: bool) -> dict[nn.Module, Around]:
        """What modules run during a call of the denoiser. Where core calls it, blocks run the processor's
        projections. Arguments as for `attached`."""
        if not learns:
            return {}
        found: dict[nn.Module, Around] = {}
        for block, site in zip(self.blocks(denoiser), self.layout.sites, strict=True):
            own = [Projection(site, name, denoiser.get_submodule(self.path(site, name)),
                              self.offset(site, name)) for name in PROJECTIONS]
            found[block] = RunBlock(block.forward, own)
        return found

    def rows(self, states: Tensor, extra: Mapping[str, Any]) -> Tensor:
        return states.to(self.model.load_device)

    # Learning

    def own_options(self) -> Mapping[str, Any]:
        return {"patches": {BEFORE: [Begin(self.layout)], AFTER: [Finish()]}}


class Around:
    """Runs a module's own function, `forward`."""

    def __init__(self, forward: Callable) -> None:
        self.forward = forward

    def __call__(self, *rows: Any, **given: Any) -> Any:
        return self.forward(*rows, **given)


class RunBlock(Around):
    """The same for a block, whose projections the processor of the call may change."""

    def __init__(self, forward: Callable, projections: Sequence[Projection]) -> None:
        super().__init__(forward)
        self.projections = projections

    def __call__(self, *rows: Any, **given: Any) -> Any:
        options = given.get("transformer_options") or {}
        processor: AttentionProcessor | None = options.get(PROCESSOR)
        changes: list[Change] = [partial(with_delta, deltas) for deltas in options.get(DELTAS, ())]
        changes += [] if processor is None else [processor.project]
        with projecting(self.projections, changes):
            return self.forward(*rows, **given)


class Begin:
    """The last attn1 patch: attends from the picture's rows with the processor, and leaves the other rows to
    the host."""

    def __init__(self, layout: SiteLayout) -> None:
        self.sites = {_address(site): site for site in layout.sites}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pe: Tensor | None = None,
                 attn_mask: Tensor | None = None, extra_options: dict | None = None) -> dict:
        options = extra_options or {}
        processor: AttentionProcessor | None = options.get(PROCESSOR)
        site = self.sites.get((options.get("block_type"), options.get("block_index")))
        if attn_mask is None and options.get(FILLS) is not None:
            attn_mask = fill_bias(options[FILLS], q.shape[2] - options[FILLS].shape[1]).to(q)
        if processor is None or site is None:
            return {} if attn_mask is None else {"attn_mask": attn_mask}
        if options["patches"][BEFORE][-1] is not self:
            raise ConceptError("another node patches the model's attention behind the concepts; put that "
                               "node before Apply Concepts")
        count = options["img_slice"][0]
        rows = count, q.shape[2] - sum(options.get(_REFERENCES) or ())
        turned_q, turned_k = (q, k) if pe is None else apply_rope(q, k, restarted(pe, processor.prompts, 2))
        picture, mask = attend_picture(processor, site, q, (turned_q, turned_k, v), rows, attn_mask)
        options[_PICTURE] = count, picture
        return {"q": without_picture(turned_q, rows), "k": turned_k, "pe": None, "attn_mask": mask}


def _address(site: Site) -> tuple[str | None, int | None]:
    """The host's kind and number of a block. Where all blocks are alike, it calls them single."""
    kind, _, number = site.name.rpartition("blocks.")
    return kind.removesuffix("_") or "single", int(number)


class Finish:
    """attn1 output patch: puts the rows of text, picture and references together."""

    def __call__(self, attended: Tensor, options: dict) -> Tensor:
        if _PICTURE not in options:
            return attended
        count, picture = options.pop(_PICTURE)
        return put_together(attended, picture, count)
