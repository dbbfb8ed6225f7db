"""Sampled pictures that are not sampled twice.

Pictures of a concept right after learning and at the end of the sequence are the same if nothing that acts
has changed. Whether that is so is decided by a digest of everything that acts, not by the method's promise.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.conditioning.routing import aggregate, averaged_names, by_strength
from ...core.model.backbone import Backbone
from ...core.sampling.sampling import sample
from ...core.sampling.settings import SampleSettings

MOST_BYTES = 256_000_000      # of pictures in memory; the oldest are dropped


def _feed(digest, value: object) -> None:
    """Adds a value to a digest: tensors by their bytes, containers and dataclasses by what they hold."""
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                      if value.dim() else repr(value.item()).encode())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of".encode())
        for part in value:
            _feed(digest, part)
    elif is_dataclass(value) and not isinstance(value, type):
        digest.update(type(value).__name__.encode())
        for entry in fields(value):
            _feed(digest, getattr(value, entry.name))
    else:
        digest.update(repr(value).encode())


def digest_of(backbone: Backbone, bank: ConceptBank, prompts: Sequence[str], seeds: Sequence[int],
              settings: SampleSettings) -> str:
    """Identifies everything that `sample` reads, so that equal digests mean equal pictures, bit for bit.

    These are the base, the prompts with the concepts that they name (words, deltas and all else that the
    bank holds of them), the deltas that are folded into the weights for each prompt, the concepts whose
    predictions are averaged, seeds and settings.
    """
    digest, parsed = hashlib.sha256(), bank.vocabulary.parse_all(prompts)
    negative = bank.parse(settings.negative)
    named = dict.fromkeys(name for prompt in (*parsed, negative) for name in prompt.concepts)
    averaged = averaged_names(bank)
    _feed(digest, (backbone.fingerprint, [prompt.weighted for prompt in (*parsed, negative)], list(seeds),
                   settings, {name: bank[name] for name in named}, sorted(by_strength(bank, named)),
                   [bank[name] for name in averaged]))
    groups = {(prompt.concepts if settings.mode in ("sharp", "equal") else prompt.text): prompt
              for prompt in parsed}
    for prompt in groups.values():
        deltas = aggregate(backbone, bank, prompt, settings.mode, settings.strength, without=averaged).deltas
        _feed(digest, deltas)
    return digest.hexdigest()


class Sampler:
    """Samples with one base, and returns pictures that it still has if everything that acts is the same."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._pictures: OrderedDict[str, Tensor] = OrderedDict()

    def sample(self, bank: ConceptBank, prompts: Sequence[str], seeds: Sequence[int],
               settings: SampleSettings) -> Tensor:
        """Pictures `[B, 3, H, W]` in -1..1, see `core.sampling.sampling.sample`."""
        key = digest_of(self.backbone, bank, prompts, seeds, settings)
        if key in self._pictures:
            self._pictures.move_to_end(key)
        else:
            self._pictures[key] = sample(self.backbone, bank, prompts, seeds, settings)
            while len(self._pictures) > 1 and sum(p.nbytes for p in self._pictures.values()) > MOST_BYTES:
                self._pictures.popitem(last=False)
        return self._pictures[key]
