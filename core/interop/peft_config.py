"""The scales that PEFT stores outside its tensors: in `adapter_config.json` or in diffusers' header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConceptError
from .lora_names import shown

HEADER = "lora_adapter_metadata"      # diffusers' key: flat JSON such as {"unet.lora_alpha": 16}
FILE = "adapter_config.json"
LARGEST = 1 << 20      # bytes
_LARGEST_NUMBER = 1e9
TYPES = ("LORA", "LOHA", "LOKR")
# these initialisations change the base's weights, so the factors alone are not the change
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
RAW = "base_model.model."      # begins the names in a PEFT folder


@dataclass(frozen=True)
class PeftConfig:
    """Scales of one model's layers.

    Args:
        alpha, rank: Of all layers without a pattern.
        is_rslora: Divide by the root of the rank (Kalajdzievski, 2023).
        alphas, ranks: Layer name or its end -> its own alpha or rank.
        source: Where it was read, for messages.
    """

    alpha: float
    rank: int
    is_rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    source: str = FILE

    def scale(self, path: str, rank: int | None) -> float:
        """The scale of a layer.

        Args:
            path: Its name with dots, without prefixes.
            rank: The rank of its tensors; None if they have none.

        Raises:
            ConceptError: The tensors have another rank.
        """
        alpha, own = _match(self.alphas, path, self.alpha), _match(self.ranks, path, self.rank)
        if rank not in (None, own):
            raise ConceptError(f"{self.source} gives {shown(path)} the rank {own:g}, and its tensors have "
                               f"rank {rank}; they belong to different files")
        return alpha / (math.sqrt(own) if self.is_rslora else own)

    def told(self) -> str:
        some = f" (other values for {len(self.alphas)} layers)" if self.alphas else ""
        root = "the root of " if self.is_rslora else ""
        return f"scaled by alpha {self.alpha:g}{some} / {root}rank {self.rank}, from {self.source}"


def _match(patterns: Mapping, path: str, default):
    """PEFT's rule: the first pattern that is the name or its end; `^` stands for the begin."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if path == name or (name == pattern and path.endswith(f".{name}")):
            return value
    return default


def in_folder(folder: Path) -> dict[str, PeftConfig]:
    """The configuration of a PEFT folder under the prefix of PEFT's names. Empty if there is none."""
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > LARGEST:
            raise ConceptError(f"'{file}' is larger than {LARGEST >> 20} MB; allowed: a PEFT configuration")
        text = file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConceptError(f"'{file}' cannot be read ({error})") from error
    return {RAW: _config(_json(text, FILE), FILE)}


def in_header(metadata: Mapping[str, str] | None) -> dict[str, PeftConfig]:
    """diffusers' configurations in the header of a file: prefix such as `unet.` -> configuration."""
    if not metadata or HEADER not in metadata:
        return {}
    what = f"the header's {HEADER}"
    groups: dict[str, dict] = {}
    for key, value in _json(metadata[HEADER], what).items():
        prefix, dot, name = key.rpartition(".")      # without a prefix: of the one model in the file
        groups.setdefault(prefix + dot, {})[name] = value
    return {prefix: _config(values, what) for prefix, values in groups.items() if "r" in values}


def _json(text: str, what: str) -> dict:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConceptError(f"{what} is not readable JSON ({str(error)[:80]})") from error
    if not isinstance(data, dict):
        raise ConceptError(f"{what} holds no JSON object; allowed: a PEFT configuration")
    return data


def _config(data: Mapping, source: str) -> PeftConfig:
    kind = str(data.get("peft_type") or "LORA").removeprefix("PeftType.").upper()
    if kind not in TYPES:
        raise ConceptError(f"{source} says peft_type {kind[:20]!r}; allowed: {', '.join(TYPES)}")
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        raise ConceptError(f"{source} says init_lora_weights {start[:20]!r}, which also changes the base's "
                           "weights; allowed: a LoRA that PEFT has converted to a plain one")
    rank = _number(data.get("r"), "r", source)
    if rank != int(rank) or rank < 1:
        raise ConceptError(f"{source} says r {rank:g}; allowed: whole numbers of 1 or more")
    # PEFT's configurations of LoHa and LoKr call it alpha
    alpha = data.get("lora_alpha", data.get("alpha"))
    alpha = _number(rank if alpha is None else alpha, "lora_alpha", source)
    alphas, ranks = (_patterns(data, name, source) for name in ("alpha_pattern", "rank_pattern"))
    return PeftConfig(alpha, int(rank), data.get("use_rslora") is True, alphas, ranks, source)


def _patterns(data: Mapping, name: str, source: str) -> dict:
    patterns = data.get(name) or {}
    if not isinstance(patterns, dict):
        raise ConceptError(f"{source} says {name} {str(patterns)[:40]!r}; allowed: layer names with numbers")
    for pattern, value in patterns.items():
        # PEFT allows regular expressions, which an untrusted file must not bring
        if not pattern.removeprefix("^").replace(".", "").replace("_", "").isalnum():
            raise ConceptError(f"{source} has the {name} {pattern[:40]!r}; allowed: names of layers, "
                               "no regular expressions")
        if _number(value, name, source) <= 0 and name == "rank_pattern":
            raise ConceptError(f"{source} says {name} {value!r} for {shown(pattern)}; allowed: above 0")
    return patterns


def _number(value: object, name: str, source: str) -> float:
    # NaN and numbers above a float's range fail this comparison too
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST_NUMBER:
        raise ConceptError(f"{source} says {name} {str(value)[:40]!r}; allowed: a number")
    return float(value)
