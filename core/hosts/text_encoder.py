"""CLIP text models and tokenizers from disk, the same with every version of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import ConceptError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_PREFIX = "text_model."


def named_as_in(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of a CLIP text model to the names of the installed transformers.

    Version 4 puts "text_model." in front of the names of a CLIPTextModel, version 5 does not.
    """
    own = model.state_dict().keys()
    other = {name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else _PREFIX + name: name for name in own}
    return {name if name in own else other.get(name, name): tensor for name, tensor in weights.items()}


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Loads a CLIP tokenizer from a folder.

    Raises:
        ConceptError: The folder has no vocabulary. Some versions of transformers would make an empty one.
    """
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    has = {name: (folder / name).is_file() for name in ("vocab.json", "merges.txt", "tokenizer.json")}
    if has["vocab.json"] and has["merges.txt"]:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    if has["tokenizer.json"]:      # saved by transformers 5
        return CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    raise ConceptError(f"the tokenizer folder '{folder}' has no vocabulary; needed: vocab.json and "
                       "merges.txt, or tokenizer.json")
