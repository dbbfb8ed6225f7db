"""Scores of neurons: how strongly a concept, or any prompt, depends on an entry of a weight.

CNS (Liao et al., ICCV 2025, arXiv 2510.02296) selects neurons by a score that was not available to us. In
CNS, base neurons respond strongly to the concept's pictures, and general neurons are active over a diverse
calibration set. We therefore define two scores: "gradient" depends on the pictures, "activation" on the text
alone. The calibration prompts are also ours.

Weights are read through `Backbone.project`, and gradients at the outputs of projections. This works with
every host, and no frozen weight needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..attention.gradients import GradientHook
from ..bank.prompts import NO_CONCEPTS
from ..conditioning.encoding import encode_prompts
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.context import Context
from ..model.deltas import DeltaKey
from ..model.processor import AttentionProcessor
from ..model.sites import SiteLayout
from ..model.solver import FirstOrder, denoise, guided
from .neurons import NeuronSelection, Votes

SCORES = ("gradient", "activation")
_THINGS = ("dog", "cat", "horse", "bird", "fish", "car", "bicycle", "boat", "chair", "teacup", "clock",
           "guitar", "tree", "flower", "mountain", "castle", "bridge", "robot", "child", "old man",
           "woman reading", "bowl of fruit", "slice of cake", "backpack", "toy duck", "teddy bear",
           "lighthouse", "train", "airplane", "butterfly", "city street", "wooden house")
_SCENES = ("a photo of a {}", "a painting of a {}", "a {} on a beach", "a {} in the snow",
           "a drawing of a {}", "a {} at night", "a {} in a room", "a {} in a meadow")
# our choice; the paper's are unknown
CALIBRATION = tuple(_SCENES[i % len(_SCENES)].format(thing) for i, thing in enumerate(_THINGS))


def key_value_weights(layout: SiteLayout) -> list[DeltaKey]:
    """W_k and W_v of every site, the weights that CNS selects from."""
    return [(site.index, projection) for site in layout.sites for projection in ("to_k", "to_v")]


@torch.inference_mode(False)
@torch.no_grad()
def weight_of(backbone: Backbone, key: DeltaKey) -> Tensor:
    """A projection's weight as currently applied by the host, `[a, b]` float32, computed from its outputs for
    unit vectors.
    """
    site, width = backbone.layout.sites[key[0]], backbone.layout.sites[key[0]].shape(key[1])[1]
    probe = torch.cat([torch.zeros(1, width), torch.eye(width)]).unsqueeze(0).to(backbone.device)
    output = backbone.project(site, key[1], probe)[0].float()
    return (output[1:] - output[0]).T.contiguous()      # minus the bias


@torch.inference_mode(False)
@torch.no_grad()
def activation_scores(backbone: Backbone, context: Context, positions: Sequence[Sequence[int]],
                      keys: Sequence[DeltaKey] | None = None) -> dict[DeltaKey, Tensor]:
    """Computes `S_ij = |W_ij| ||X_j||_2`, the score of weight pruning (Wanda, Sun et al. 2024), from text
    alone.

    Args:
        context: The prompts. X are the inputs of a weight at the chosen positions of all prompts.
        positions: Token positions in each prompt.
        keys: The weights to score; None = W_k and W_v of every site.

    Returns:
        Weight -> `[a, b]` float32.

    Raises:
        ConceptError: `keys` has other projections, whose inputs depend on the picture.
    """
    scores = {}
    for key in keys or key_value_weights(backbone.layout):
        if key[1] not in ("to_k", "to_v"):
            raise ConceptError(f"the activation score was asked of {key[1]}; allowed: to_k, to_v")
        x = context.at(backbone.layout.sites[key[0]]).float()
        chosen = torch.cat([row[list(places)] for row, places in zip(x, positions, strict=True)])
        scores[key] = weight_of(backbone, key).abs() * chosen.norm(dim=0).to(backbone.device)
    return scores


class GradientProcessor(GradientHook):
    """Accumulates the loss's gradient with respect to frozen weights.

    Computes `dL/dW = sum g x^T` from the gradient g at a projection's output and the input x. Only a backward
    pass through the activations is needed.

    Args:
        keys: The weights.
        inner: Another processor for the same sites.

    Attributes:
        sums: Weight -> `[a, b]` float32.
        rows: Weight of each sample of the batch `[B]`, None = 1.
    """

    def __init__(self, keys: Sequence[DeltaKey], inner: AttentionProcessor | None = None) -> None:
        super().__init__(keys, inner or AttentionProcessor())
        self.rows: Tensor | None = None
        self.sums: dict[DeltaKey, Tensor] = {}

    @torch.no_grad()
    def note(self, key: DeltaKey, x: Tensor, gradient: Tensor) -> None:
        g = gradient.float()
        if self.rows is not None:
            g = g * self.rows.to(g.device, torch.float32).view(-1, 1, 1)
        product = g.flatten(0, 1).T @ x.expand(len(g), -1, -1).float().flatten(0, 1)
        # otherwise the loss scale was too high for fp16, and the step is skipped
        if torch.isfinite(product).all():
            self.sums[key] = product if key not in self.sums else self.sums[key].add_(product)

    def scores(self, backbone: Backbone) -> dict[DeltaKey, Tensor]:
        """The scores by the gradients so far."""
        return removal_scores(backbone, self.sums)


def removal_scores(backbone: Backbone, gradients: Mapping[DeltaKey, Tensor]) -> dict[DeltaKey, Tensor]:
    """`S_ij = |W_ij sum dL/dW_ij|`: the first-order change of the loss if an entry is removed.

    Args:
        gradients: Weight -> summed gradient `[a, b]`.
    """
    return {key: (weight_of(backbone, key) * gradient).abs() for key, gradient in gradients.items()}


@torch.inference_mode(False)
def gradient_scores(backbone: Backbone, latents: Tensor, context: Context, generator: torch.Generator,
                    draws: int = 64, batch: int = 4, keys: Sequence[DeltaKey] | None = None,
                    progress: Callable[[int, int], None] | None = None) -> dict[DeltaKey, Tensor]:
    """Computes `S_ij = |W_ij sum_{t,n} dL/dW_ij|`, where L is the denoising loss of pictures.

    Args:
        latents: Clean latents of the pictures, `[n, C, h, w]`.
        context: One row per picture, or one for all.
        generator: Draws timesteps and noise.
        draws: Number of pairs of timestep and noise, spread over the pictures.
        batch: Draws per batch.
        keys: The weights to score; None = W_k and W_v of every site.
        progress: Called with the numbers of finished and of all draws; may raise.

    Returns:
        Weight -> `[a, b]` float32.
    """
    latents, schedule = latents.clone().to(backbone.device), backbone.schedule
    fixed = Context(context.hidden.detach().clone(),
                    None if context.pooled is None else context.pooled.detach().clone(),
                    lengths=context.lengths)
    processor = GradientProcessor(keys or key_value_weights(backbone.layout))
    for start in range(0, draws, batch):
        rows = [i % len(latents) for i in range(start, min(start + batch, draws))]
        clean = latents[rows]
        contexts = Context.cat([fixed if len(fixed) == 1 else fixed[i:i + 1] for i in rows])
        t = torch.randint(len(schedule), (len(rows),), generator=generator).to(latents.device)
        noise = torch.randn(clean.shape, generator=generator).to(latents.device)
        with torch.enable_grad():
            output = backbone.predict(schedule.add_noise(clean, noise, t), t, contexts, processor)
            (output - schedule.target(clean, noise, t)).square().mean((1, 2, 3)).sum().backward()
        if progress is not None:
            progress(min(start + batch, draws), draws)
    return processor.scores(backbone)


def text_positions(backbone: Backbone, prompts: Sequence[str]) -> list[list[int]]:
    """Token positions of the text of each plain prompt, without begin, end and padding."""
    encoder = backbone.text[0]
    if not encoder.takes_vectors:      # whole prompts have no begin
        return [list(range(len(encoder.ids(prompt)))) for prompt in prompts]
    return [list(range(1, 1 + min(len(encoder.ids(prompt)), encoder.length - 2))) for prompt in prompts]


def encode_plain(backbone: Backbone, prompts: Sequence[str]) -> Context:
    """Encodes prompts without placeholders."""
    return encode_prompts(backbone, NO_CONCEPTS.parse_all(prompts), {})


@torch.inference_mode(False)
@torch.no_grad()
def imagine(backbone: Backbone, prompt: str, size: tuple[int, int], generator: torch.Generator,
            steps: int = 8, cfg: float = 5.0) -> Tensor:
    """Samples a picture of a prompt from the base in few steps, as latents `[1, C, h, w]`. size: (h, w).
    """
    both = encode_plain(backbone, ["", prompt])
    noise = torch.randn(1, backbone.latent_channels, *size, generator=generator).to(backbone.device)

    def estimate(x: Tensor, t: int, _progress: float) -> Tensor:
        return guided(backbone, x, t, both[0:1], both[1:2], cfg)

    return denoise(FirstOrder(backbone.schedule, steps), noise, estimate)


def general_neurons(backbone: Backbone, generator: torch.Generator, prompts: Sequence[str] = CALIBRATION,
                    score: str = "gradient", share: float = 0.1, quorum: float = 0.5, unit: str = "weight",
                    size: tuple[int, int] = (64, 64), draws: int = 4, keys: Sequence[DeltaKey] | None = None,
                    progress: Callable[[int, int], None] | None = None) -> NeuronSelection:
    """Finds M_gen of a base by the votes of calibration prompts. It does not depend on concepts.

    Args:
        generator: Draws all random numbers.
        prompts: The calibration prompts, at least one.
        score: "gradient", from pictures of the prompts sampled from the base, or "activation", from text
            alone.
        share, quorum, unit: See Votes.
        size: (h, w) of the latents.
        draws: Gradients per prompt.
        keys: The weights to score; None = W_k and W_v of every site.
        progress: Called with the numbers of finished and of all prompts; may raise.

    Raises:
        ConceptError: The score is unknown, or there are no prompts.
    """
    if score not in SCORES or not prompts:
        raise ConceptError(f"the score is {score!r} over {len(prompts)} calibration prompts; allowed: "
                           f"{' or '.join(SCORES)}, 1 or more")
    votes = Votes(share, quorum, unit)
    for i, prompt in enumerate(prompts):
        context = encode_plain(backbone, [prompt])
        if score == "activation":
            votes.add(activation_scores(backbone, context, text_positions(backbone, [prompt]), keys))
        else:
            latents = imagine(backbone, prompt, size, generator)
            votes.add(gradient_scores(backbone, latents, context, generator, draws, draws, keys))
        if progress is not None:
            progress(i + 1, len(prompts))
    return votes.general()
