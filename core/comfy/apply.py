"""MODELs with concepts. Deltas become ComfyUI weight patches; layer-wise words and regions use wrappers and
attn2 patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import comfy.lora
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ..errors import ConceptError
from ..model.context import Context, Strengths
from ..model.deltas import Deltas, LowRankDelta
from ..model.processor import AttentionProcessor
from ..sampling.attention_guidance import AttentionGuidance, MapRecorder, Subject
from .backbone import plain_weights, without_dynamic
from .families.base import Family
from .prompt_states import carried_by, settle
from .sites import (
    OFFSETS,
    STRENGTHS,
    WORDS,
    DiffusionWrapper,
    Hooks,
    ProcessorSource,
    fit_offsets,
    progress_of,
)
from .token_lora import TokenLoraRun, Words, code, words_of

KEY = "continual_concepts"
Wrappers = comfy.patcher_extension.WrappersMP


def weight_patches(sites: Family, deltas: Deltas) -> dict:
    """Deltas as ComfyUI's weight patches: low-rank ones as LoRA adapters, sparse ones as differences."""
    state: dict[str, Tensor] = {}
    keys: dict[str, object] = {}
    for (index, projection), delta in deltas.items():
        name = f"{index}.{projection}"
        keys[name] = sites.patch_key(sites.layout.sites[index], projection)
        if isinstance(delta, LowRankDelta):
            state[f"{name}.lora_up.weight"] = delta.up.float()
            state[f"{name}.lora_down.weight"] = delta.down.float()
            state[f"{name}.alpha"] = torch.tensor(delta.scale * delta.down.shape[0])
        else:
            state[f"{name}.diff"] = delta.dense()
    return comfy.lora.load_lora(state, keys)


def fold(model, sites: Family, deltas: Deltas, layerwise: bool):
    """Returns a clone of MODEL with deltas on its weights, and support for layer-wise words if `layerwise`.
    With neither, returns MODEL itself.
    """
    if not deltas and not layerwise:
        return model
    clone = model.clone()
    if deltas:
        clone.add_patches(weight_patches(sites, deltas))
    if layerwise:
        _wrap(clone, sites, processor_of(model))
        sites.add_layer_copies(clone)
    return clone


def processor_of(model) -> ProcessorSource | None:
    """The source of a MODEL's attention processors, or None."""
    wrappers = model.get_wrappers(Wrappers.DIFFUSION_MODEL, KEY)
    return wrappers[0].processor if wrappers else None


def _wrap(clone, sites: Hooks, processor: ProcessorSource | None) -> None:
    clone.remove_wrappers_with_key(Wrappers.DIFFUSION_MODEL, KEY)
    clone.add_wrapper_with_key(Wrappers.DIFFUSION_MODEL, KEY, DiffusionWrapper(sites, processor))
    clone.remove_wrappers_with_key(Wrappers.OUTER_SAMPLE, f"{KEY}_states")
    clone.add_wrapper_with_key(Wrappers.OUTER_SAMPLE, f"{KEY}_states", settle)


def drop_processor(clone) -> None:
    """Removes the attention processors from a clone; layer-wise words are still supported."""
    wrappers = clone.get_wrappers(Wrappers.DIFFUSION_MODEL, KEY)
    if wrappers:
        _wrap(clone, wrappers[0].hooks, None)


def with_word_bound(model, sites: Family, deltas: Mapping[str, Deltas]):
    """Returns a clone of MODEL with word-bound concepts. They act where prompts encoded by a concept CLIP
    contain their words. Without concepts, returns MODEL itself.
    """
    if not deltas:
        return model
    source = processor_of(model)
    below = source if isinstance(source, TokenLoraRun) else None
    return with_processor(model, sites, TokenLoraRun(deltas, below, model.model))


def context_of(conditioning, copies: int, names: Sequence[str] = (), sites: Family | None = None) -> Context:
    """The first entry of a CONDITIONING as a context `[1, L, N, D]`.

    Args:
        sites: Of the MODEL that reads it; None = a UNet.
        conditioning: Output of ComfyUI's text nodes.
        copies: L, the layout's number of layer copies.
        names: The concepts whose word positions are read from it.
    """
    hidden, conds = carried_by(conditioning)
    hidden = hidden if sites is None else sites.rows(hidden, conditioning[0][1])
    layers = hidden.unsqueeze(1)
    if OFFSETS in conds:
        layers = layers + fit_offsets(conds[OFFSETS].cond.to(hidden), hidden)
    if layers.shape[1] == 1:
        layers = layers.expand(-1, copies, -1, -1)
    words: Words = ({},) * len(hidden)
    strengths: Strengths = ()
    if WORDS in conds:
        codes, factors = (fit_offsets(conds[key].cond.to(hidden.device), hidden)
                          for key in (WORDS, STRENGTHS))
        words, strengths = words_of(codes, factors, {code(name): name for name in names})
    is_joint = sites is not None and sites.layout.is_joint
    return Context(layers, conditioning[0][1].get("pooled_output"), words, strengths,
                   (hidden.shape[1],) * len(hidden) if is_joint else ())


def with_processor(model, sites: Family, processor: ProcessorSource, self_attention: bool = False):
    """Returns a clone of MODEL whose sites run the attention processors from `processor`.

    Args:
        model: A MODEL.
        sites: The MODEL's sites.
        processor: Called before each UNet call; returns the attention processor.
        self_attention: Whether the processors may also change the self-attention of the sites' blocks.
    """
    clone = model.clone()
    sites.hook(clone, self_attention)
    _wrap(clone, sites, processor)
    return clone


def with_attention_guidance(model, sites: Family, subject: Subject, strength: float):
    """Returns a clone of MODEL for one sampling with attention guidance. Returns MODEL itself if guidance
    does nothing.
    """
    if not AttentionGuidance([subject], strength).acts(0.0):
        return model
    if not sites.guides_attention:
        raise ConceptError(f"attention guidance (artists) is {strength:g}, but a model of class "
                           f"{type(model.model).__name__} has none; allowed: 0")
    run = _GuidanceRun(subject, strength, processor_of(model))
    clone = with_processor(without_dynamic(model), sites, run.processor)
    clone.add_wrapper_with_key(Wrappers.PREDICT_NOISE, KEY, run)
    return clone


class _GuidanceRun:
    """State of one sampling with attention guidance.

    The host's sampler owns the latent. The offset from guidance is therefore stored here, in units of the
    noise level, and added before every evaluation. With Euler and DPM++ 2M this equals moving the latent;
    with ancestral samplers it is an approximation.
    """

    def __init__(self, subject: Subject, strength: float, below: ProcessorSource | None = None) -> None:
        self.subject, self.strength, self.below = subject, strength, below
        self.offset: Tensor | None = None
        self.recorder: MapRecorder | None = None      # while maps are recorded

    def processor(self, options: dict, x: Tensor) -> AttentionProcessor | None:
        below = None if self.below is None else self.below(options, x)
        if self.recorder is not None:
            self.recorder.inner = below or AttentionProcessor()
            return self.recorder
        return below

    def __call__(self, executor, x, timestep, model_options=None, seed=None):
        sigma = timestep.view(-1, *[1] * (x.ndim - 1)).to(x)
        if self.offset is None:
            self.offset = torch.zeros_like(x)
            self.guidance = AttentionGuidance([self.subject] * len(x), self.strength)
        x = x + sigma * self.offset
        if self.guidance.acts(progress_of({**model_options["transformer_options"], "sigmas": timestep})):
            moved = self._moved(executor.class_obj, x, timestep, sigma, model_options)
            self.offset = self.offset + (moved - x) / sigma
            x = moved
        return executor(x, timestep, model_options, seed)

    @torch.inference_mode(False)      # the latent needs gradients; the host forbids them
    def _moved(self, guider, x: Tensor, timestep: Tensor, sigma: Tensor, model_options: dict) -> Tensor:
        inner = guider.inner_model
        plain_weights(inner.diffusion_model)
        # factor between the host's latents and the UNet's input
        scale = (sigma.square() + 1).sqrt().clone()

        def evaluate(latents: Tensor, recorder: MapRecorder) -> None:
            self.recorder = recorder
            try:
                comfy.samplers.calc_cond_batch(inner, [guider.conds["positive"][:1]], latents * scale,
                                               timestep.clone(), model_options)
            finally:
                self.recorder = None

        return self.guidance.moved(x.clone() / scale, evaluate) * scale
