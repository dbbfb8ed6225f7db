"""A mask of what a photo shows, without a model: regions that differ from the photo's border.

Zhu, Liang, Wei and Sun, "Saliency Optimization from Robust Background Detection" (CVPR 2014), on superpixels
of SLIC (Achanta et al., 2012). A region is background if much of its outline lies on the border of the photo.
The method knows no objects: it fails where a subject touches the border, or looks like its surroundings.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFilter
from torch import Tensor

SIDE = 160          # the longer side of the picture that is analysed
SUPERPIXELS = 250
COMPACTNESS = 12.0      # SLIC's weight of places against colours
ROUNDS = 8
COLOUR_SIGMA, BORDER_SIGMA, PLACE_SIGMA = 10.0, 1.0, 0.25      # of the paper
SMOOTHNESS = 0.1        # the paper's mu
BLUR = 1.5              # pixels of the analysed picture, softens the steps between superpixels
SOFTNESS = 0.2          # saliency from black to white around the threshold
FAINTEST = 1.0          # contrast, a weighted sum of colour differences
SMALLEST, LARGEST = 0.02, 0.9      # shares of the picture that a subject can cover

_LAB = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")


def lab(picture: Image.Image) -> np.ndarray:
    """CIELAB colours `[H, W, 3]`: L in 0..100, a and b around 0."""
    levels = np.asarray(ImageCms.applyTransform(picture, _LAB)).astype(np.float32)
    lightness, chroma = levels[..., :1] * (100 / 255), levels[..., 1:]
    return np.concatenate([lightness, np.where(chroma > 127, chroma - 256, chroma)], axis=-1)


def superpixels(colours: np.ndarray) -> np.ndarray:
    """Labels `[H, W]` of about `SUPERPIXELS` regions of similar colour and place (SLIC without its last step,
    which joins stray pixels)."""
    height, width = colours.shape[:2]
    step = (height * width / SUPERPIXELS) ** 0.5
    rows, columns = (np.linspace(0, side - 1, max(2, round(side / step))).round().astype(int)
                     for side in (height, width))
    places = np.moveaxis(np.mgrid[:height, :width], 0, -1).astype(np.float32) * (COMPACTNESS / step)
    points = np.concatenate([colours, places], axis=-1).reshape(-1, 5)
    centres = points.reshape(height, width, 5)[np.ix_(rows, columns)].reshape(-1, 5)
    for _ in range(ROUNDS):
        distances = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
        labels = distances.argmin(1)
        counts = np.bincount(labels, minlength=len(centres))[:, None]
        sums = np.stack([np.bincount(labels, points[:, i], len(centres)) for i in range(5)], axis=1)
        centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres).astype(np.float32)
    return np.unique(labels, return_inverse=True)[1].reshape(height, width)


def _geodesic(colours: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Lengths of the shortest ways between superpixels, in colour differences of neighbours (Floyd and
    Warshall). All superpixels on the border are neighbours."""
    count = len(colours)
    apparent = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    border = on_border(labels)
    near = _touching(labels) | (border[:, None] & border[None])
    ways = np.where(near, apparent, np.inf)
    np.fill_diagonal(ways, 0)
    for middle in range(count):
        np.minimum(ways, ways[:, middle : middle + 1] + ways[middle], out=ways)
    return ways


def on_border(labels: np.ndarray) -> np.ndarray:
    """Which superpixels touch the border of the picture."""
    found = np.zeros(labels.max() + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        found[edge] = True
    return found


def _kernel(distances: np.ndarray, sigma: float) -> np.ndarray:
    return np.exp(-(distances**2) / (2 * sigma**2))


def region_saliency(colours: np.ndarray, places: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Saliency 0..1 of every superpixel; 0 everywhere if nothing differs from the border.

    Args:
        colours: Mean CIELAB colours, `[N, 3]`.
        places: Mean row and column as shares of the picture, `[N, 2]`.
        labels: Superpixel of every pixel, `[H, W]`.
    """
    apparent = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    likeness = _kernel(_geodesic(colours, labels), COLOUR_SIGMA)      # equation 2
    border_share = likeness @ on_border(labels) / np.sqrt(likeness.sum(1))      # equation 4
    background = 1 - _kernel(border_share, BORDER_SIGMA)      # equation 7
    near = _kernel(np.linalg.norm(places[:, None] - places[None], axis=-1), PLACE_SIGMA)
    contrast = (apparent * near) @ background      # equation 6
    if contrast.max() < FAINTEST:
        return np.zeros(len(colours))
    contrast = contrast / contrast.max()
    smooth = np.where(_touching(labels), _kernel(apparent, COLOUR_SIGMA) + SMOOTHNESS, 0)
    system = np.diag(background + contrast + smooth.sum(1)) - smooth      # equation 9, its normal equations
    solved = np.linalg.solve(system + 1e-6 * np.eye(len(system)), contrast)
    return np.clip((solved - solved.min()) / max(np.ptp(solved), 1e-6), 0, 1)


def _touching(labels: np.ndarray) -> np.ndarray:
    """Which superpixels are neighbours, `[N, N]`."""
    count = labels.max() + 1
    near = np.zeros((count, count), bool)
    for one, other in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        near[one.ravel(), other.ravel()] = near[other.ravel(), one.ravel()] = True
    np.fill_diagonal(near, False)
    return near


def otsu(values: np.ndarray, weights: np.ndarray) -> float:
    """The threshold that divides values 0..1 into the two most different groups (Otsu, 1979)."""
    counts, edges = np.histogram(values, 64, (0, 1), weights=weights)
    below, middle = np.cumsum(counts), (edges[1:] + edges[:-1]) / 2
    sums, whole = np.cumsum(counts * middle), (counts * middle).sum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (whole - sums) / above) ** 2
    return float(edges[1:][np.nan_to_num(between).argmax()])


def _without_holes(soft: np.ndarray) -> np.ndarray:
    """Fills what the subject encloses: dark parts that no other dark parts join to the border."""
    framed = Image.fromarray(np.pad((soft >= 0.5).astype(np.uint8), 1)).copy()      # floodfill needs its own
    ImageDraw.floodfill(framed, (0, 0), 2)
    return np.where(np.asarray(framed)[1:-1, 1:-1] == 0, 1.0, soft)


def _soft_mask(small: Image.Image) -> np.ndarray:
    """The mask of a small picture, `[H, W]` in 0..1."""
    colours = lab(small)
    labels = superpixels(colours)
    flat, sizes = labels.ravel(), np.bincount(labels.ravel())
    grid = np.mgrid[:labels.shape[0], :labels.shape[1]] / np.array(labels.shape)[:, None, None]
    means, places = (np.stack([np.bincount(flat, values.ravel()) / sizes for values in parts], axis=1)
                     for parts in (np.moveaxis(colours, -1, 0), grid))
    saliency = region_saliency(means, places, labels)
    if not saliency.any():
        return saliency[labels]
    level = otsu(saliency, sizes.astype(float))
    return _without_holes(np.clip((saliency - level) / SOFTNESS + 0.5, 0, 1)[labels])


def subject_mask(levels: Tensor) -> Tensor | None:
    """The mask of a photo's subject.

    Args:
        levels: The photo, `[3, H, W]`, 8 bits.

    Returns:
        `[1, H, W]`, 8 bits, white where the subject is. None if what was found is too small or too large for
        a subject.
    """
    picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    soft = _soft_mask(small)
    if not SMALLEST <= soft.mean() <= LARGEST:
        return None
    mask = Image.fromarray((soft * 255).round().astype(np.uint8)).filter(ImageFilter.GaussianBlur(BLUR))
    return torch.from_numpy(np.array(mask.resize(picture.size, Image.Resampling.BICUBIC))).unsqueeze(0)
