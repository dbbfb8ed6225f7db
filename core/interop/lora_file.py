"""Reads LoRA files of other programs. Files are untrusted: only safetensors are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..bank.format import METADATA_KEY
from ..bank.terms import Terms
from ..errors import ConceptError
from .lora_names import ALPHA, Part, part_of, shown
from .peft_config import RAW, PeftConfig, in_folder, in_header

BUNDLE = "bundle_emb."
_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors",
            "pytorch_custom_diffusion_weights.safetensors")
_TEXT_FOLDERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file.

    Args:
        tensors: LoRA tensors and bundled words.
        others: Names of ignored tensors.
        configs: Prefix of names -> what PEFT's configuration says about their scales.
        folders: Names of the adapters in a folder that PEFT saved.
        beside: Files of that folder that are not read.
        terms: Licence and author in the metadata.
    """

    tensors: Mapping[str, Tensor]
    others: tuple[str, ...] = ()
    configs: Mapping[str, PeftConfig] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    terms: Terms = Terms()

    @cached_property
    def parts(self) -> list[tuple[Part, Tensor]]:
        """The parsed names of LoRA tensors."""
        return [(part, tensor) for key, tensor in self.tensors.items()
                if not key.startswith(BUNDLE) and (part := part_of(key)) is not None]

    @property
    def adapters(self) -> set[str]:
        """PEFT's names of the adapters, "" for tensors without such a name."""
        return {part.adapter for part, _ in self.parts if part.form != ALPHA}

    @property
    def embeddings(self) -> dict[str, dict[str, Tensor]]:
        """Bundled words: name of the embedding -> text encoder (or its key in the file) -> vectors."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            if key.startswith(BUNDLE):
                name, _, encoder = key.removeprefix(BUNDLE).partition(".")
                found.setdefault(name, {})[encoder or name] = tensor
        return found

    def config_of(self, path: str) -> tuple[PeftConfig, str] | None:
        """The configuration for a layer, and the layer's name in it. None without a configuration."""
        for prefix, config in self.configs.items():
            if path.startswith(prefix):
                return config, path.removeprefix(prefix).removeprefix(RAW)
        return None

    @property
    def lacks_config(self) -> bool:
        """Whether the names are those of a PEFT folder whose configuration is not there."""
        return not self.configs and any(key.startswith(RAW) for key in self.tensors)


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer: form -> side -> tensor. alpha: as stored, or None."""

    module: str
    path: str
    is_text: bool
    forms: Mapping[str, Mapping[str, Tensor]]
    alpha: Tensor | None


def layers_of(file: LoraFile, which: str, owner: str) -> list[Layer]:
    """The layers that one adapter of the file changes.

    Args:
        which: Names what to take, where a file holds several adapters.

    Raises:
        ConceptError: There are several adapters and `which` names none of them.
    """
    adapter = chosen(file.adapters, which, owner, "adapters")
    layers: dict[tuple[bool, str], Layer] = {}
    for part, tensor in file.parts:
        place = part.is_text, part.module
        layer = layers.get(place) or Layer(part.module, part.path, part.is_text, {}, None)
        if part.form == ALPHA:
            layer = replace(layer, alpha=tensor)
        elif part.adapter == adapter:
            sides = {**layer.forms.get(part.form, {}), part.side: tensor}
            layer = replace(layer, path=part.path, forms={**layer.forms, part.form: sides})
        layers[place] = layer
    return [layer for layer in layers.values() if layer.forms]


def chosen(names: Iterable[str], which: str, owner: str, what: str) -> str:
    """The one name to take; "" without names.

    Args:
        names: What a file holds.
        which: A name, or several with commas: one for each kind of thing.
        what: Plural, for messages.

    Raises:
        ConceptError: There are several and `which` names none or more than one of them.
    """
    names = sorted(set(names))
    if len(names) <= 1:
        return names[0] if names else ""
    wanted = {name.strip() for name in which.split(",")} & set(names)
    if len(wanted) != 1:
        listed = ", ".join(shown(name) or "one without a name" for name in names[:8])
        raise ConceptError(f"{owner} holds {len(names)} {what}: {listed}; say with 'which' the one to import")
    return wanted.pop()


def read_lora(path: Path | str, which: str = "") -> LoraFile:
    """Reads a LoRA file, or the folder that PEFT or diffusers saved.

    Args:
        which: Names the adapter of a folder that holds several.

    Raises:
        ConceptError: It is no readable `.safetensors` file, or the folder's file is not unique.
    """
    path = Path(path)
    adapters = _in_folder(path) if path.is_dir() else {}
    name = chosen(set(adapters) - set(_TEXT_FOLDERS), which, f"'{path.name}'", "adapters")
    file = adapters.get(name, path)
    tensors, others, metadata = read_tensors(
        file, lambda key: key.startswith(BUNDLE) or part_of(key) is not None)
    is_peft = file.name == _WEIGHTS[0] or any(key.startswith(RAW) for key in tensors)
    configs = in_header(metadata) or (in_folder(file.parent) if is_peft else {})
    if not any(key.startswith(RAW) for key in tensors):      # PEFT's prefix may be cut off in its folder
        configs = {"" if prefix == RAW else prefix: config for prefix, config in configs.items()}
    beside = [f"{folder}/{other.name}" for folder, other in adapters.items() if folder in _TEXT_FOLDERS]
    return LoraFile(tensors, others, configs, tuple(adapters), tuple(beside), Terms.from_metadata(metadata))


def _in_folder(folder: Path) -> dict[str, Path]:
    """Name of an adapter -> its file. PEFT saves the adapter `default` in the folder itself, others in
    folders of their name.
    """
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    found = {"default" if place == folder else place.name: place / name
             for place in (folder, *inner) for name in reversed(_WEIGHTS) if (place / name).is_file()}
    if not set(found) - set(_TEXT_FOLDERS):
        files = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:6])
        raise ConceptError(f"'{folder}' is a folder with {files or 'no .safetensors file'}; allowed: a file, "
                           f"or a folder with {' or '.join(_WEIGHTS)}")
    return found


def read_tensors(path: Path,
                 wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], tuple[str, ...], dict[str, str]]:
    """Tensors, names of the unwanted ones and the header's text of a `.safetensors` file.

    Raises:
        ConceptError: There is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise ConceptError(f"there is no file '{path}'")
    if path.suffix.lower() != ".safetensors":
        raise ConceptError(f"'{path.name}' is a {path.suffix or 'nameless'} file; allowed: .safetensors "
                           "(others can run code when opened)")
    try:
        with safe_open(str(path), framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            if METADATA_KEY in metadata:
                raise ConceptError(f"'{path.name}' is a bank of this program; merge it with another "
                                   "bank, or open it")
            tensors = {key: file.get_tensor(key) for key in keys if wanted(key)}
            return tensors, tuple(key for key in keys if key not in tensors), metadata
    except ConceptError:
        raise
    # safetensors names some number formats that torch does not have: KeyError or AttributeError
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ConceptError(f"'{path.name}' is not a readable .safetensors file ({error})") from error
