"""A loaded MODEL, CLIP and VAE as a backbone for training. They are not copied, and training leaves them
unchanged.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

import comfy.model_management as management
import torch
from torch import Tensor, nn

from ..errors import ConceptError
from ..hosts.base_folder import check_channels
from ..model.activations import weights_of
from ..model.backbone import Backbone
from ..model.checkpointing import recomputed
from ..model.context import Context
from ..model.deltas import Delta, Deltas
from ..model.processor import AttentionProcessor
from ..model.sites import Site
from .clip_gradients import fit_for_gradients
from .families import find_sites
from .families.base import Family, computation_type
from .sites import ATTENTION, DELTAS, PROCESSOR, differentiable_attention
from .text import text_widths


def without_dynamic(model):
    """Returns MODEL, or a clone with fully loaded weights, because gradients do not pass through lazily
    loaded ones.
    """
    if getattr(model, "is_dynamic", bool)() and "disable_dynamic" in model.clone.__code__.co_varnames:
        return model.clone(disable_dynamic=True)
    return model


def plain_weights(module: nn.Module) -> None:
    """Replaces inference-mode weights, which autograd rejects, by plain clones. Clones one weight at a time,
    so that there is never a second model in memory. Afterwards no weight requires a gradient.
    """
    module.requires_grad_(False)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """The method, which does nothing once its object is gone.

    A part that kept its whole alive would keep the MODEL in memory until the garbage collector runs, and
    ComfyUI would warn of a memory leak.
    """
    reference = weakref.WeakMethod(method)

    def call() -> None:
        found = reference()
        if found is not None:
            found()

    return call


def weight_hash(model, sites: Family) -> str:
    """Hash of the first and last site's key weights in fp16, as in the diffusers host. Patches do not count.

    Args:
        model: A MODEL.
        sites: Of it.
    """
    digest = hashlib.sha256()
    for site in (sites.layout.sites[0], sites.layout.sites[-1]):
        backup = model.backup.get(sites.key(site, "to_k"))
        weight = sites.linear(site, "to_k").weight if backup is None else backup.weight
        digest.update(weight.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class ComfyBackbone(Backbone):
    """A backbone from the outputs of ComfyUI's loaders.

    Args:
        model: A MODEL; LoRA patches on it are part of the base.
        clip: A CLIP; LoRA patches on it are part of the base.
        vae: A VAE; None if no picture is encoded or decoded.
    """

    def __init__(self, model, clip, vae=None) -> None:
        model = without_dynamic(model)
        self.model, self.clip, self.vae = model, clip, vae
        self.sites = find_sites(model, text_widths(clip))
        self.layout, self.schedule = self.sites.layout, self.sites.schedule()
        self.unet, self.learning_notes = self.sites.denoiser, self.sites.learning_notes
        self.text = self.sites.text_encoders(clip, _weakly(self._reload))
        self.latent_channels = model.model.latent_format.latent_channels
        check_channels("the model", self.sites.channels, self.latent_channels)
        self.picture_multiple = _multiple(vae)
        self._is_loaded = self._was_loaded = False
        self._room, self._offloads = 0, False      # see make_room
        self.can_offload = self.device.type != "cpu"
        self._folds: list[_Fold] = []
        self._added: list[Deltas] = []
        self._patches = self.sites.own_options()
        self.fingerprint = weight_hash(model, self.sites)
        self.overlay = _overlay(model.patches, clip.patcher.patches, clip.layer_idx,
                                *(() if vae is None else (_ends(vae),)))

    @property
    def device(self) -> torch.device:
        return self.model.load_device

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.unet.parameters())

    def loaded_weights(self, with_text: bool) -> tuple[int, str]:
        """The host may unload text encoders that are not needed in every step."""
        with_text = with_text and self.sites.learns_in_text
        return weights_of(self.unet, *([self.clip.cond_stage_model] if with_text else []))

    def free_memory(self, with_text: bool) -> int | None:
        """What is free, and what gets free when the host unloads other models."""
        free = management.get_free_memory(self.device)
        if self.device.type == "cpu":      # weights of unloaded models stay in main memory
            return free
        needed = (self.model, self.clip.patcher) if with_text else (self.model,)
        return free + sum(loaded.model_loaded_memory() for loaded in management.current_loaded_models
                          if loaded.device == self.device and loaded.model is not None
                          and not any(loaded.model is patcher for patcher in needed))

    def make_room(self, size: int, offload: bool = False) -> None:
        self._room, self._offloads, self._is_loaded = max(self._room, size), offload, False
        if offload:      # the host decides anew how many weights it loads
            management.free_memory(1e30, self.device)

    def load(self, with_text: bool = True) -> None:
        """Loads weights that gradients can pass through. Reloads them if the host has unloaded them.

        Args:
            with_text: Whether also to load text encoders that words are learned in front of. Otherwise the
                host may have unloaded them.
        """
        with_text = with_text and self.sites.learns_in_text
        patchers = [self.model, *([self.clip.patcher] if with_text else [])]
        if self._is_loaded and _are_loaded(*patchers):
            return
        with torch.inference_mode(False):
            management.load_models_gpu(patchers, memory_required=self._room,
                                       force_full_load=not self._offloads)
            for module in (self.unet, *([self.clip.cond_stage_model] if with_text else [])):
                plain_weights(getattr(module, "inner", module))
            for fold in self._folds:
                fold.renew()
        self._is_loaded = self._was_loaded = True

    def _reload(self) -> None:
        """Reloads the text encoders. Does nothing unless `load` was called before, because nodes that only
        encode never call it.
        """
        if self._was_loaded:
            self.load()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Context manager around a training run: leaves inference mode, notifies the host, and prepares the
        CLIP for gradients.
        """
        before = getattr(management, "in_training", None)
        with torch.inference_mode(False):
            try:
                if before is not None:
                    management.in_training = True
                self.load()
                with fit_for_gradients(self.clip), self.sites.attached(learns=True):
                    yield
            finally:
                if before is not None:
                    management.in_training = before

    def encode_images(self, images: Tensor) -> Tensor:
        if self.vae is None:
            raise ConceptError("a VAE is needed to learn from pictures; connect one")
        pixels = ((images.float().permute(0, 2, 3, 1) + 1) / 2).cpu()
        if getattr(self.vae, "latent_dim", 2) == 3:      # a VAE of video takes a batch for frames
            latents = torch.cat([self.vae.encode(picture.unsqueeze(0)) for picture in pixels])
        else:
            latents = self.vae.encode(pixels)
        self._is_loaded = False     # the host may have unloaded the UNet for the VAE
        if latents.shape[1] != self.latent_channels:
            raise ConceptError(f"the VAE gives latents of {latents.shape[1]} channels, and the model reads "
                               f"{self.latent_channels}; connect the VAE of this model")
        latents = self.model.model.process_latent_in(latents.float()).to(self.device).clone()
        return latents[:, :, 0] if latents.ndim == 5 else latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        latents = latents.detach().cpu()
        if getattr(self.model.model.latent_format, "latent_dimensions", 2) == 3:
            latents = latents.unsqueeze(2)
        pixels = self.vae.decode(self.model.model.process_latent_out(latents))
        pixels = pixels[:, 0] if pixels.ndim == 5 else pixels
        self._is_loaded = False
        return (pixels.float().permute(0, 3, 1, 2) * 2 - 1).clamp(-1, 1)

    def predict(self, latents: Tensor, timesteps: Tensor, context: Context,
                processor: AttentionProcessor | None = None) -> Tensor:
        management.throw_exception_if_processing_interrupted()      # also runs while a preview is drawn
        self.load(with_text=False)
        options = {**self._patches, DELTAS: tuple(self._added)}
        if torch.is_grad_enabled():
            options[ATTENTION] = differentiable_attention
        if processor is not None:
            processor.prepare(context)
            options[PROCESSOR] = processor
            if self.layout.is_joint:
                context = replace(context, hidden=processor.extended(context.hidden[:, 0]).unsqueeze(1),
                                  lengths=() if processor.masks_texts else context.lengths)
        with self.sites.attached(learns=True):
            return self.sites.evaluate(latents, timesteps, context, options, self.picture_multiple).float()

    def project(self, site: Site, projection: str, x: Tensor) -> Tensor:
        self.load()
        return self.sites.project(site, projection, x.to(computation_type(self.model.model)))

    def normalised(self, site: Site, projection: str, y: Tensor) -> Tensor:
        return self.sites.normalised(site, projection, y)

    @contextmanager
    def folded(self, deltas: Deltas) -> Iterator[None]:
        if not deltas:
            yield
            return
        if self.layout.is_joint:      # folded, they would take a copy of most of the weights
            self._added.append(deltas)
            try:
                yield
            finally:
                self._added.pop()
            return
        self.load()
        with ExitStack() as stack:
            for (index, projection), delta in deltas.items():
                fold = _Fold(self.sites.linear(self.layout.sites[index], projection), delta)
                self._folds.append(fold)
                stack.callback(self._folds.pop)
                stack.callback(fold.undo)
            yield

    def gradient_checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        return recomputed(self.unet, self.sites.recomputed if enabled else ())


def _are_loaded(*patchers) -> bool:
    return all(any(loaded.model is patcher for loaded in management.current_loaded_models)
               for patcher in patchers)


class _Fold:
    """A delta folded into a weight."""

    def __init__(self, module: nn.Linear, delta: Delta) -> None:
        self.module, self.delta = module, delta
        self._apply()

    def _apply(self) -> None:
        self.parameter = self.module.weight
        self.before = self.parameter.data
        changed = self.before.float() + self.delta.dense().to(self.before.device)
        self.parameter.data = changed.to(self.before.dtype)

    def renew(self) -> None:
        """Applies the delta again if the host has reloaded the weights, which replaces parameters that have
        LoRA patches.
        """
        if self.module.weight is not self.parameter:
            self._apply()

    def undo(self) -> None:
        self.parameter.data = self.before.to(self.parameter.device)      # the host may have moved it


def _overlay(*parts) -> str:
    """Hash of everything outside the checkpoint's weights that affects a run's result. A few numbers
    represent each tensor.
    """
    digest = hashlib.sha256()

    def add(thing) -> None:
        if torch.is_tensor(thing):
            flat = thing.detach().flatten()
            sample = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
            digest.update(str(tuple(thing.shape)).encode() + sample.tobytes())
        elif isinstance(thing, dict):
            add(sorted(thing.items()))
        elif isinstance(thing, (list, tuple)):
            for item in thing:
                add(item)
        elif hasattr(thing, "weights"):
            add(thing.weights)
        else:
            digest.update(str(getattr(thing, "__qualname__", thing)).encode())

    add(parts)
    return digest.hexdigest()[:16]


def _ends(vae) -> tuple:
    """The first and last weight of an autoencoder."""
    parameters = list(vae.first_stage_model.parameters())
    return (parameters[0], parameters[-1]) if parameters else ()


def _multiple(vae) -> int:
    """Pixels per latent cell along each side. A VAE of video has three ratios: time, height and width."""
    ratio = 8 if vae is None else getattr(vae, "downscale_ratio", 8)
    ratio = ratio[-1] if isinstance(ratio, tuple) else ratio
    return ratio if isinstance(ratio, int) else 8
