"""Trains the metric encoder: individuals and drawing styles by supervised contrastive loss, captions by
CLIP's loss.

Pools of pictures are rendered once and stored on disk. They contain none of `scenes.CONCEPTS`: individuals
are random, and so are styles, except for the five pretraining styles.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.demo import scenes
from ...core.demo.encoder import MetricEncoder
from ...core.demo.render import Style
from .data import to_tensor
from .diffusion import tokenize
from .loop import Run

FAMILY = 4  # individuals (or styles) per family that differ in few attributes (hard negatives)
# moderate, so that an individual with most attributes in common stays nearer than one with none
TEMPERATURE = 0.12
TEXT_TEMPERATURE = 0.07
COLOUR_FIELDS = ("body", "second", "pattern_colour", "accessory_colour")
TRAITS = ("body", "second", "pattern", "pattern_colour", "accessory", "accessory_colour")
ACCESSORIES = ("none", "hat", "scarf")
SWAPPED = (tuple(scenes.PALETTE), scenes.KINDS, scenes.PATTERNS[1:])  # mutually exclusive words per group


@dataclass(frozen=True)
class Pool:
    """Pictures `[M, 64, 64, 3]` uint8.

    owners `[M, 2]`: the individuals (or styles) in each picture, -1 for none; facts `[individuals, F]`.
    """

    pictures: np.ndarray
    owners: np.ndarray
    facts: np.ndarray

    def by_owner(self) -> list[np.ndarray]:
        """Indices of the pictures of every individual."""
        return [np.flatnonzero((self.owners == i).any(1)) for i in range(self.owners.max() + 1)]


def facts_of(thing: scenes.Thing) -> list[float]:
    """Attributes of a thing: four colours in 0..1, then the indices of kind, pattern and accessory."""
    colours = [c / 255 for name in COLOUR_FIELDS for c in getattr(thing, name)]
    return [*colours, scenes.KINDS.index(thing.kind), scenes.PATTERNS.index(thing.pattern),
            ACCESSORIES.index(thing.accessory)]


def _tell_apart(a: scenes.Thing, b: scenes.Thing) -> bool:
    """Whether two things differ visibly, not only by a shade."""
    if (a.kind, a.pattern, a.accessory) != (b.kind, b.pattern, b.accessory):
        return True
    shown = ["body", "second", *["pattern_colour"] * (a.pattern != "plain"),
             *["accessory_colour"] * (a.accessory != "none")]
    return any(sum(abs(p - q) for p, q in zip(getattr(a, f), getattr(b, f), strict=True)) > 90 for f in shown)


def family(rng: random.Random) -> list[scenes.Thing]:
    """FAMILY individuals that share half of their attributes, or all except the class."""
    members = [scenes.random_thing(rng)]
    while len(members) < FAMILY:
        wears_scarf = members[0].accessory == "scarf"
        kinds = list(scenes.SCARF_AT) if wears_scarf else scenes.KINDS
        kind = rng.choice(kinds) if rng.random() < 0.15 else members[0].kind
        share = 0.5 if kind == members[0].kind else 1.0
        candidate = replace(scenes.random_thing(rng, kind),
                            **{f: getattr(members[0], f) for f in TRAITS if rng.random() < share})
        if all(_tell_apart(candidate, member) for member in members):
            members.append(candidate)
    return members


def render_individuals(families: int, views: int, seed: int) -> Pool:
    """Renders photos of every individual alone, and one of every fourth next to an individual of the next
    family.
    """
    rng = random.Random(seed)
    things = [thing for _ in range(families) for thing in family(rng)]
    pictures, owners = [], []
    for i in range(len(things)):
        for group in [(i, -1)] * views + [(i, (i + FAMILY) % len(things))] * (i % FAMILY == 0):
            scene = scenes.random_scene(rng, tuple(things[k] for k in group if k >= 0), "photo")
            pictures.append(scenes.render(scene))
            owners.append(group)
    return Pool(np.stack(pictures), np.array(owners),
                np.array([facts_of(t) for t in things], dtype=np.float32))


def random_style(rng: random.Random) -> Style:
    def colour() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    fill = rng.choice([0.0, 1.0, rng.random(), rng.random()])
    return Style(
        "random",
        "",
        paper=colour() if rng.random() < 0.85 else None,
        line=colour() if rng.random() < 0.75 else None,
        fill=fill,
        line_from_role=rng.random() < 0.2,
        tile=4 if rng.random() < 0.25 else 1,
    )


def style_family(rng: random.Random) -> list[Style]:
    """A random style, and variations that change one or two of its traits."""
    members = [random_style(rng)]
    while len(members) < FAMILY:
        other = random_style(rng)
        changed = rng.sample(("paper", "line", "fill", "line_from_role", "tile"), rng.choice([1, 2]))
        candidate = replace(members[0], **{trait: getattr(other, trait) for trait in changed})
        if all(_styles_differ(candidate, member) for member in members):
            members.append(candidate)
    return members


def _styles_differ(a: Style, b: Style) -> bool:
    def far(p, q) -> bool:
        return (p is None) != (q is None) or (p is not None
                                              and sum(abs(i - j) for i, j in zip(p, q, strict=True)) > 90)

    lined = not (a.line_from_role and b.line_from_role)  # a line with its role's colour does not show its own
    filled = a.paper is not None and b.paper is not None and abs(a.fill - b.fill) > 0.25
    is_other_kind = a.line_from_role != b.line_from_role or a.tile != b.tile
    return is_other_kind or far(a.paper, b.paper) or filled or (lined and far(a.line, b.line))


def render_styles(families: int, views: int, seed: int) -> Pool:
    """Renders the five pretraining styles (many views each), then families of random styles.

    Every picture has another content.
    """
    rng = random.Random(seed)
    styles = list(scenes.STYLES.values()) + [s for _ in range(families) for s in style_family(rng)]
    pictures, owners = [], []
    for i, style in enumerate(styles):
        for _ in range(12 * views if i < len(scenes.STYLES) else views):
            things = tuple(scenes.random_thing(rng) for _ in range(1 if rng.random() < 0.8 else 2))
            pictures.append(scenes.render(scenes.random_scene(rng, things, style)))
            owners.append((i, -1))
    return Pool(np.stack(pictures), np.array(owners), np.zeros((len(styles), 0), dtype=np.float32))


def cached(file: Path, make) -> Pool:
    if not file.exists():
        pool = make()
        np.savez(file, pictures=pool.pictures, owners=pool.owners, facts=pool.facts)
    with np.load(file) as stored:
        return Pool(stored["pictures"], stored["owners"], stored["facts"])


def _cosine_basis() -> Tensor:
    """Orthonormal cosine transform of eight samples, `[8, 8]` (JPEG's)."""
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    basis = 0.5 * torch.cos((2 * n + 1) * k * torch.pi / 16)
    basis[0] /= 2**0.5
    return basis


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Degrades pictures `[B, 3, H, W]` in -1..1 like an autoencoder: blur, blocks, colours, noise."""
    count = len(images)

    def share(low: float, high: float, likelihood: float) -> Tensor:
        draw = low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)
        return draw * (torch.rand(count, 1, 1, 1, generator=generator) < likelihood)

    down, right = (int(torch.randint(0, 3, (), generator=generator)) for _ in range(2))
    height, width = images.shape[2:]
    x = F.pad(images, (1, 1, 1, 1), mode="replicate")[..., down : down + height, right : right + width]
    x = torch.lerp(x, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), share(0.2, 1.0, 0.5))
    coarse, basis = torch.rand(count, generator=generator) < 0.3, _cosine_basis()
    if coarse.any():
        step = 0.03 + 0.2 * float(torch.rand((), generator=generator))
        # [b, 3, rows, columns, 8, 8]
        blocks = x[coarse].unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
        codes = ((basis @ blocks @ basis.T) / step).round() * step
        x[coarse] = (basis.T @ codes @ basis).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    gain = 1 + 0.06 * torch.randn(count, 3, 1, 1, generator=generator)
    x = x * gain + 0.04 * torch.randn(count, 3, 1, 1, generator=generator)
    return x + share(0.0, 0.1, 0.5) * torch.randn(x.shape, generator=generator)


def contrast(features: Tensor, owners: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020) of unit features `[B, D]`.

    Pictures with a common owner `[B, 2]` are positives.
    """
    is_equal = owners[:, None, :, None] == owners[None, :, None, :]
    same = (is_equal & (owners >= 0)[:, None, :, None]).flatten(2).any(-1)
    itself = torch.eye(len(features), dtype=torch.bool)
    logits = (features @ features.T / temperature).masked_fill(itself, -1e9)
    matches = (same & ~itself).float()
    likelihood = (F.log_softmax(logits, dim=1) * matches).sum(1) / matches.sum(1).clamp(min=1)
    return -likelihood[matches.any(1)].mean()


def swap_table(tokenizer) -> Tensor:
    """The group of every token id `[vocabulary]`, -1 for none. Skips kinds of two words."""
    table = torch.full((len(tokenizer),), -1)
    for group, words in enumerate(SWAPPED):
        token_ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
        table[[ids[0] for ids in token_ids if len(ids) == 1]] = group
    return table


def with_wrong_word(ids: Tensor, table: Tensor, generator: torch.Generator) -> Tensor:
    """Makes captions `[B, 77]` wrong by replacing one colour, kind or pattern of each.

    Captions without such a word do not change.
    """
    place = torch.rand(ids.shape, generator=generator).masked_fill(table[ids] < 0, -1).argmax(1, keepdim=True)
    old = ids.gather(1, place)
    eligible = (table == table[old]) & (torch.arange(len(table)) != old)  # [B, vocabulary]
    new = torch.rand(eligible.shape, generator=generator).masked_fill(~eligible, -1).argmax(1, keepdim=True)
    return ids.scatter(1, place, torch.where(table[old] < 0, old, new))


def caption_loss(pictures: Tensor, texts: Tensor, wrong: Tensor, untrue: Tensor) -> Tensor:
    """CLIP's loss of features `[B, D]`.

    Captions with a wrong word are additional negatives of their pictures where `untrue` `[B]`.
    """
    logits, target = pictures @ texts.T / TEXT_TEMPERATURE, torch.arange(len(pictures))
    spoilt = ((pictures * wrong).sum(1, keepdim=True) / TEXT_TEMPERATURE).masked_fill(~untrue[:, None], -1e9)
    return 0.5 * (F.cross_entropy(torch.cat([logits, spoilt], dim=1), target)
                  + F.cross_entropy(logits.T, target))


def attributes_loss(outputs: Tensor, facts: Tensor) -> Tensor:
    """Loss of predicted attributes: `outputs` `[B, 27]` for `facts` `[B, 15]`.

    It speeds up early training of the trunk.
    """
    error = (outputs[:, :12] - facts[:, :12]).square().unflatten(1, (4, 3)).mean(2)
    # without a pattern there is no pattern colour
    shown = torch.cat([torch.ones(len(facts), 2), (facts[:, 13:] > 0).float()], dim=1)
    kinds, patterns, accessories = outputs[:, 12:].split((8, 4, 3), dim=1)
    columns = ((12, kinds), (13, patterns), (14, accessories))
    classes = sum(F.cross_entropy(x, facts[:, i].long()) for i, x in columns)
    return 5 * (error * shown).sum() / shown.sum() + 0.25 * classes


def pick(groups: list[np.ndarray], families: np.ndarray, views: int, offset: int,
         rng: np.random.Generator) -> np.ndarray:
    """Picks `views` pictures of every member of the chosen families, whose members start at `offset`."""
    members = [offset + FAMILY * f + k for f in families for k in range(FAMILY)]
    return np.concatenate([rng.choice(groups[m], views, replace=False) for m in members])


def train(tokenizer, pictures: np.ndarray, captions: list[list[str]], folder: Path, steps: int,
          seed: int = 0) -> MetricEncoder:
    """Trains on the pretraining pairs. `folder` stores the rendered pools and the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    things = cached(folder / "individuals.npz", lambda: render_individuals(750, 4, seed + 71))
    styles = cached(folder / "styles.npz", lambda: render_styles(150, 4, seed + 72))
    groups, style_groups, known = things.by_owner(), styles.by_owner(), len(scenes.STYLES)
    ids, table = tokenize(tokenizer, captions), swap_table(tokenizer)
    torch.manual_seed(seed)
    encoder = MetricEncoder({"vocabulary": len(tokenizer), "end": tokenizer.eos_token_id})
    scaffold = nn.Linear(encoder.pooled_width, 27)
    run = Run(nn.ModuleDict({"encoder": encoder, "scaffold": scaffold}), folder / "encoder.pt", steps,
              lr=3e-3)
    generator, rng = torch.Generator().manual_seed(seed + run.start), np.random.default_rng(seed + run.start)
    for _ in run:
        shown = pick(groups, rng.choice(len(groups) // FAMILY, 12, replace=False), 3, 0, rng)
        drawn = pick(style_groups, rng.choice((len(style_groups) - known) // FAMILY, 5, replace=False), 3,
                     known, rng)
        drawn = np.concatenate([drawn,
                                *(rng.choice(style_groups[i], 3, replace=False) for i in range(known))])
        told = rng.integers(0, len(pictures), 128)
        shows = np.concatenate([things.pictures[shown], styles.pictures[drawn], pictures[told]])
        batch = disturb(to_tensor(shows), generator)
        with torch.autocast("cpu", torch.bfloat16):
            pooled, texture = encoder.pooled_and_texture(batch)
        a, b = len(shown), len(shown) + len(drawn)
        true = ids[told, rng.integers(0, ids.shape[1], len(told))].long()
        wrong = with_wrong_word(true, table, generator)
        texts, spoilt = encoder.text_features(torch.cat([true, wrong])).chunk(2)
        owners = torch.from_numpy(things.owners[shown])
        alone = owners[:, 1] < 0
        loss = contrast(F.normalize(encoder.object_head(pooled[:a]), dim=1), owners)
        loss = loss + contrast(F.normalize(encoder.style_head(texture[a:b]), dim=1),
                               torch.from_numpy(styles.owners[drawn]))
        loss = loss + caption_loss(F.normalize(encoder.picture_head(pooled[b:]), dim=1), texts, spoilt,
                                   (true != wrong).any(1))
        run.after(loss + attributes_loss(scaffold(pooled[:a][alone]),
                                         torch.from_numpy(things.facts)[owners[alone, 0]]))
    run.ema.copy_into_modules()
    return encoder.eval()
