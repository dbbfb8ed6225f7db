"""Sites: the text cross-attention layers of a denoiser, numbered in execution order.

They are `attn2` of a UNet (down, middle, up), `blocks.N.cross_attn` of a diffusion transformer, and the
joint attention of `double_blocks.N` and `single_blocks.N`, or of `blocks.N`, where text and picture share a
softmax.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from ..errors import ConceptError

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
_TRANSFORMER_SITE = re.compile(r"blocks\.(\d+)\.cross_attn")
_JOINT_SITE = re.compile(r"((double|single)_)?blocks\.\d+")
# take class nouns instead of learned words
_ROW_ENCODERS = ("t5xxl", "qwen3_4b", "qwen3_8b", "qwen3vl_4b")
_TRANSFORMER_MODULES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "output_proj"}
_EXECUTION_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
# fingerprints of the embedded bases, so that messages can name the base of a bank
_EMBEDDED = {"6f395a5ccb499e4b": "embedded-64", "b9658e3c739a55e4": "embedded-128",
             "d3a84fc032a41b4e": "embedded-dit", "3f55204938c87f09": "embedded-joint"}
# number of sites and context width of UNets -> their family, for messages
_UNETS = {(16, 768): "SD1.5", (16, 1024): "SD2", (70, 2048): "SDXL"}
# models with more than SD1.5's 16 sites have one layer copy per transformer group (SDXL: 70 sites, 11 groups)
_LAYER_PER_GROUP_ABOVE = 16


def grid_of(cells: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a site with `cells` cells, for a latent of height x width. Every level halves both
    sides and rounds up.
    """
    rows, columns = height, width
    while rows * columns > max(1, cells):
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != cells:
        raise ConceptError(f"a site with {cells} cells does not belong to a {height}x{width} latent")
    return rows, columns


@dataclass(frozen=True)
class Site:
    """One text cross-attention layer.

    Attributes:
        index: Its number in execution order.
        name: Its module path, the same for every host: diffusers' for a UNet (`down_blocks.0...attn2`),
            `blocks.N.cross_attn` for a transformer; `double_blocks.N`, `single_blocks.N` or `blocks.N` for a
            joint attention.
        copy: Index of its layer copy in a context. Contexts without layer-wise words have only one copy.
        heads: Number of attention heads.
        width: Features of the picture side.
        context_width: Features of the text side.
        key_width: Features of keys and values, which several heads of the query may share; None = `width`.
    """

    index: int
    name: str
    copy: int
    heads: int
    width: int
    context_width: int
    key_width: int | None = None

    def __post_init__(self) -> None:
        if self.key_width == self.width:      # said in one way only, so that equal sites are equal
            object.__setattr__(self, "key_width", None)

    @property
    def of_transformer(self) -> bool:
        """Whether it is one of a transformer, whose sites all have the same grid."""
        return self.is_joint or _TRANSFORMER_SITE.fullmatch(self.name) is not None

    @property
    def is_joint(self) -> bool:
        """Whether text and picture share one softmax there."""
        return _JOINT_SITE.fullmatch(self.name) is not None

    def shape(self, projection: str) -> tuple[int, int]:
        """(a, b): output and input width of a projection."""
        if projection not in PROJECTIONS:
            raise ConceptError(f"projection '{projection}' is unknown; allowed: {', '.join(PROJECTIONS)}")
        if projection in ("to_k", "to_v"):
            return self.key_width or self.width, self.context_width
        return self.width, self.width

    def path(self, projection: str) -> str:
        """Module path of a projection: diffusers' for a UNet, Cosmos Predict2's for a transformer. Raises
        ConceptError for a joint attention, for whose projections no names are known."""
        if self.is_joint:
            raise ConceptError(f"site '{self.name}' is a joint attention of text and picture; no name of its "
                               f"{projection} for other programs is known, so its deltas cannot be exported")
        if _TRANSFORMER_SITE.fullmatch(self.name):
            return f"{self.name}.{_TRANSFORMER_MODULES[projection]}"
        return f"{self.name}.{'to_out.0' if projection == 'to_out' else projection}"


@dataclass(frozen=True)
class SiteLayout:
    """All sites of a model family and the widths of its text encoders. A concept must match this layout.

    Attributes:
        sites: In execution order.
        text_widths: Name and token width of each text encoder, such as `("clip_l", 768)`. SDXL has two.
    """

    sites: tuple[Site, ...]
    text_widths: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.sites)

    @cached_property
    def copies(self) -> int:
        """Layer copies of a layer-wise token: 16 for SD1.5 (one per site), 11 for SDXL (one per transformer
        group)."""
        return 1 + max(site.copy for site in self.sites)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of all shapes. Models with the same fingerprint can share concepts."""
        shapes = [(site.name, site.copy, site.heads, site.width, site.context_width,
                   *([] if site.key_width is None else [site.key_width])) for site in self.sites]
        return hashlib.sha256(json.dumps([shapes, self.text_widths]).encode()).hexdigest()[:16]

    @property
    def takes_words(self) -> bool:
        """Whether words can be learned in front of its text encoders. Models with joint attention, and those
        that read one row per token of T5 or Qwen, get class nouns instead."""
        return not self.is_joint and all(name not in _ROW_ENCODERS for name, _ in self.text_widths)

    @property
    def is_joint(self) -> bool:
        """Whether text and picture share one softmax at the sites."""
        return self.sites[0].is_joint

    def refuse_joint(self, what: str) -> None:
        """Raises ConceptError for sites of joint attention. what: What does not work there."""
        if self.is_joint:
            raise ConceptError(f"the model has joint attention of text and picture, where {what} not "
                               "supported; allowed: learning with 'slots' or 'lora', prompts, regions")

    def splits(self, projection: str, side: int) -> list[int]:
        """Widths of all sites on one side of a projection (0 = output, 1 = input), in site order."""
        return [site.shape(projection)[side] for site in self.sites]

    @property
    def embedded_base(self) -> str:
        """Name of the embedded base that has this layout; "" for other bases."""
        return _EMBEDDED.get(self.fingerprint, "")

    def describe(self) -> str:
        widths = "/".join(str(width) for _, width in self.text_widths)
        width, is_unet = self.sites[0].context_width, not self.sites[0].of_transformer
        sites = f"{len(self)} sites with {width}-wide context and {widths}-wide tokens"
        known = self.embedded_base or (_UNETS.get((len(self), width)) if is_unet else "")
        return f"{sites}, as {known} has" if known else sites

    def to_json(self) -> dict:
        sites = [asdict(site) for site in self.sites]
        for site in sites:
            if site["key_width"] is None:      # earlier versions know no such entry
                del site["key_width"]
        return {"sites": sites, "text_widths": list(self.text_widths)}

    @classmethod
    def from_json(cls, data: dict) -> SiteLayout:
        """Reads what `to_json` wrote. Raises ConceptError where the sites are invalid."""
        sites = tuple(Site(**site) for site in data["sites"])
        for i, site in enumerate(sites):
            sizes = (site.heads, site.width, site.context_width,
                     1 if site.key_width is None else site.key_width)
            has_sizes = all(isinstance(n, int) and n >= 1 for n in sizes)
            if site.index != i or not isinstance(site.name, str) or not has_sizes:
                raise ConceptError(f"site {i} of the layout is {site}; indices must run from 0, "
                                   "heads and widths be 1 or more")
            if not isinstance(site.copy, int) or not 0 <= site.copy < len(sites):
                raise ConceptError(f"site {i} of the layout reads layer copy {site.copy!r}; allowed: "
                                   f"0 to {len(sites) - 1}")
        if not sites or not data["text_widths"]:
            raise ConceptError("the layout has no sites or no text encoders")
        return cls(sites, tuple((str(name), int(width)) for name, width in data["text_widths"]))


def unet_layout(shapes: Mapping[str, tuple[int, int, int]],
                text_widths: tuple[tuple[str, int], ...]) -> SiteLayout:
    """The layout of a UNet, the same from every host.

    Args:
        shapes: Site name -> heads, width and context width, in execution order within the down, middle and up
            blocks.
        text_widths: As in `SiteLayout`.
    """
    names = sorted(shapes, key=lambda name: _EXECUTION_ORDER[name.split(".")[0]])
    per_group = len(names) > _LAYER_PER_GROUP_ABOVE
    owners = [name.split(".transformer_blocks")[0] if per_group else name for name in names]
    copies = list(dict.fromkeys(owners))      # one per layer copy, in order
    sites = [Site(index, name, copies.index(owner), *shapes[name])
             for index, (name, owner) in enumerate(zip(names, owners, strict=True))]
    return SiteLayout(tuple(sites), text_widths)


def transformer_layout(shapes: Mapping[str, tuple[int, int, int]],
                       text_widths: tuple[tuple[str, int], ...]) -> SiteLayout:
    """The layout of a diffusion transformer with cross-attention, the same from every host.

    All sites read the same layer copy, so words are not layer-wise there.

    Args:
        shapes: Site name `blocks.N.cross_attn` -> heads, width and context width, in any order.
        text_widths: As in `SiteLayout`.

    Raises:
        ConceptError: A name has another form.
    """
    def block(name: str) -> int:
        match = _TRANSFORMER_SITE.fullmatch(name)
        if match is None:
            raise ConceptError(f"site '{name}' is not one of a transformer; allowed: blocks.N.cross_attn")
        return int(match[1])

    sites = [Site(index, name, 0, *shapes[name]) for index, name in enumerate(sorted(shapes, key=block))]
    return SiteLayout(tuple(sites), text_widths)


def joint_layout(double: int, single: int, heads: int, width: int,
                 text_widths: tuple[tuple[str, int], ...]) -> SiteLayout:
    """The layout of a transformer with joint attention: `double_blocks.N`, then `single_blocks.N`.

    All sites read the same layer copy. Text rows have the width of the picture there.

    Args:
        double, single: Numbers of blocks.
        heads, width: Of every block.
        text_widths: As in `SiteLayout`.
    """
    names = [*(f"double_blocks.{i}" for i in range(double)), *(f"single_blocks.{i}" for i in range(single))]
    return SiteLayout(tuple(Site(index, name, 0, heads, width, width) for index, name in enumerate(names)),
                      text_widths)


def one_stream_layout(count: int, heads: int, width: int, key_width: int,
                      text_widths: tuple[tuple[str, int], ...]) -> SiteLayout:
    """The layout of a transformer with joint attention whose blocks are all alike: `blocks.N`.

    Args:
        count: Number of blocks.
        heads, width, key_width: Of every block.
        text_widths: As in `SiteLayout`.
    """
    return SiteLayout(tuple(Site(index, f"blocks.{index}", 0, heads, width, width, key_width)
                            for index in range(count)), text_widths)
