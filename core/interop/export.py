"""One concept to files that other programs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..bank import ConceptBank
from ..concepts import Concept
from ..errors import ConceptError
from ..files import write_atomically
from ..methods.base import METHODS
from ..sites import SiteLayout
from ..tokens import check_name
from .diffusers_lora import diffusers_state
from .embedding import embedding_state, layer_loss
from .factors import DEFAULT_ERROR, DEFAULT_RANK, Factors, check_strength, low_rank
from .kohya import bundled_words, kohya_state
from .metadata import cover_type, kohya_metadata, modelspec

# What each format's files are called after the concept. The embedding has the plain name, because that is what people type.
ENDINGS = {"kohya": "_lora", "bundle": "_bundle", "diffusers": "_diffusers_lora", "embedding": ""}
FORMATS = tuple(ENDINGS)
DEFAULT_FORMATS = ("kohya", "embedding")
_MOST = 99_999
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}     # names that Windows keeps


@dataclass(frozen=True)
class Exported:
    """files: what was written, one per format, in the order asked for; notes: sentences on what the files hold and what they lost."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def export_concept(bank: ConceptBank, name: str, folder: Path | str, formats: Sequence[str] = DEFAULT_FORMATS, strength: float = 1.0,
                   rank: int = DEFAULT_RANK, max_error: float = DEFAULT_ERROR) -> Exported:
    """Writes a concept of the bank into `folder`, one file per format.

    formats: kohya (LoRA), bundle (LoRA and words in one file), diffusers (LoRA), embedding (words). strength: factor on the deltas;
    rank and max_error: for sparse deltas, see `factors.low_rank`. Files are called after the concept; nothing is overwritten, a
    counter such as `_00002` follows the name instead, the same for all files of one call. Raises ConceptError, and then leaves no file.
    """
    formats = tuple(dict.fromkeys(formats))
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown or not formats:
        raise ConceptError(f"export format is {unknown[0] if unknown else 'not given'!r}; allowed: {', '.join(FORMATS)}")
    strength, concept = check_strength(strength), bank[name]
    concept.check_fits(bank.layout)
    factors = None if formats == ("embedding",) else low_rank(concept.deltas, f"concept '{concept.name}'", rank, max_error)
    states = {kind: _state(kind, concept, bank.layout, factors, strength) for kind in formats}
    with _new_files(Path(folder), check_name(concept.name), formats) as paths:
        for kind, path in paths.items():
            metadata = _metadata(kind, concept, bank.layout, states[kind], _usage(kind, path, concept.name))
            write_atomically(path, lambda temporary, s=states[kind], m=metadata: save_file(s, str(temporary), m))
    notes = [f"{path.name}: {_usage(kind, path, concept.name)}" for kind, path in paths.items()]
    return Exported(tuple(paths.values()), (*notes, *_losses(concept, formats, factors)))


def _state(kind: str, concept: Concept, layout: SiteLayout, factors: Factors | None, strength: float) -> dict[str, Tensor]:
    if kind == "embedding":
        return embedding_state(concept.tokens)
    if kind == "diffusers":
        return diffusers_state(layout, factors.deltas, strength)
    words = bundled_words(concept.name, concept.tokens) if kind == "bundle" else {}
    return kohya_state(layout, factors.deltas, strength) | words


def _metadata(kind: str, concept: Concept, layout: SiteLayout, state: Mapping[str, Tensor], usage: str) -> dict[str, str]:
    common = modelspec(concept, layout, "textual-inversion" if kind == "embedding" else "lora", usage)
    return common | (kohya_metadata(concept.info, layout, state) if kind in ("kohya", "bundle") else {})


def _usage(kind: str, path: Path, name: str) -> str:
    if kind == "embedding":
        return f"goes into the embeddings folder; write embedding:{path.stem} in prompts, with a space before and after it"
    if kind == "diffusers":
        return f"for load_lora_weights of diffusers; the words: load_textual_inversion with the embedding file and token='<{name}>'"
    if kind == "bundle":
        return (f"LoRA and words in one file: A1111 reads both, the word is {name}; ComfyUI's LoRA loader leaves the words out and "
                "logs 'lora key not loaded' for them")
    return "LoRA without the words, which are in the embedding file; it acts on every prompt"


def _losses(concept: Concept, formats: tuple[str, ...], factors: Factors | None) -> list[str]:
    notes = []
    words = {"embedding", "bundle"} & set(formats)
    lost = layer_loss(concept.tokens)
    if words and concept.tokens.copies > 1:
        notes.append(f"the words have {concept.tokens.copies} layer copies and these formats hold one: their mean, {lost:.3f} away "
                     "(relative), so pictures differ from those of the bank")
    if not words:
        notes.append("the learned words are not in these files; export the format 'embedding' as well")
    if factors is not None and factors.error is not None:
        notes.append(f"sparse deltas were cut to rank {factors.rank}, which loses {factors.error:.4f} of them (relative)")
    method = METHODS.get(concept.info.method)
    if factors is not None and method is not None and method.composition == "sum":
        notes.append(f"method {concept.info.method} adds up the deltas of all concepts; these files hold only what <{concept.name}> added")
    if factors is not None and method is not None and method.composition == "bound":
        notes.append(f"<{concept.name}> acts through its own words alone here; in other programs its LoRA acts on every word of a prompt")
    if concept.cover and cover_type(concept.cover) is None:
        notes.append("the cover is no JPEG or PNG of up to 1 MB and was left out")
    return notes


@contextmanager
def _new_files(folder: Path, name: str, formats: tuple[str, ...]):
    """Format -> path of an empty file that nobody else has, all with the same counter. They disappear when the block fails."""
    stem = f"{name}_concept" if name.lower() in _DEVICES else name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = _reserved(folder, stem, formats)
    except OSError as error:
        raise ConceptError(f"cannot write concept '{name}' into '{folder}': {error.strerror or error}") from error
    try:
        yield paths
    except BaseException:
        _remove(paths.values())
        raise


def _reserved(folder: Path, stem: str, formats: tuple[str, ...]) -> dict[str, Path]:
    for count in range(1, _MOST + 1):
        counter = f"_{count:05d}" if count > 1 else ""
        paths = {kind: folder / f"{stem}{ENDINGS[kind]}{counter}.safetensors" for kind in formats}
        made: list[Path] = []
        try:
            for path in paths.values():
                path.open("xb").close()     # fails where something is, be it a link: two exports at once cannot meet
                made.append(path)
            return paths
        except OSError as error:
            _remove(made)
            if not isinstance(error, FileExistsError):
                raise
    raise ConceptError(f"'{folder}' holds {_MOST} exports of '{stem}' already; choose another folder")


def _remove(paths) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
