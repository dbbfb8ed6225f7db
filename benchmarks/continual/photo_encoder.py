"""How well a metric encoder tells the photos of concepts apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...core.data.assignment import Assignment
from ...core.evaluation.inspection import crop_of
from ...core.evaluation.metrics import area_under_curve
from ...core.evaluation.protocol import Encoder


def _features(encoder: Encoder, pictures: Sequence[Tensor], kind: str) -> Tensor:
    return torch.cat([encoder.features(picture.unsqueeze(0), kind) for picture in pictures])


def _share(values: Tensor) -> float | None:
    return float(values.float().mean()) if values.numel() else None


def _auc(cosines: Tensor, same: Tensor, different: Tensor) -> float | None:
    return (area_under_curve(cosines[same], cosines[different]) if same.any() and different.any() else None)


def told_apart(encoder: Encoder, tasks: Sequence[Assignment]) -> dict:
    """Figures of whole photos, as JSON.

    `identified`: photos whose mean cosine with the other photos of their own concept is above that with each
    other concept's, of `photos`. `auc`: that two photos of one concept are more similar than two of different
    ones; `auc_of_one_noun`: of pairs with one class noun only. `as_its_crop`: share of pairs with one class
    noun, of one thing and of two things, that are as similar as photos and their own crops, the rule of the
    warning about thumbnails (`evaluation.collisions`). None where there are no such pairs.
    """
    photos = [photo.pixels for task in tasks for photo in task.pictures]
    kinds = [task.kind for task in tasks for _ in task.pictures]
    features = torch.cat([_features(encoder, [photo], kind) for photo, kind in zip(photos, kinds,
                                                                                 strict=True)])
    crops = torch.cat([_features(encoder, [crop_of(photo)], kind) for photo, kind in zip(photos, kinds,
                                                                                       strict=True)])
    owner = torch.tensor([i for i, task in enumerate(tasks) for _ in task.pictures])
    numbers: dict[str, int] = {}
    nouns = torch.tensor([numbers.setdefault(task.class_noun, len(numbers)) for task in tasks])[owner]
    cosines, others = features @ features.T, ~torch.eye(len(owner), dtype=torch.bool)
    mine = torch.stack([(cosines * others)[:, owner == i].sum(1) / (others[:, owner == i]).sum(1)
                        for i in range(len(tasks))], dim=1)
    same = (owner[:, None] == owner) & others
    different, one_noun = owner[:, None] != owner, nouns[:, None] == nouns
    own_crop = (features * crops).sum(1)
    alike = cosines >= (own_crop[:, None] + own_crop) / 2
    is_object = torch.tensor([kind == "object" for kind in kinds])
    compared = one_noun & is_object & is_object[:, None]
    return {"concepts": len(tasks), "photos": len(owner),
            "identified": int((mine.argmax(1) == owner).sum()),
            "auc": _auc(cosines, same, different),
            "auc_of_one_noun": _auc(cosines, same & compared, different & compared),
            "as_its_crop": {"one thing": _share(alike[same & compared]),
                            "two things": _share(alike[different & compared])}}


def lines_of(result: Mapping) -> list[str]:
    def shown(value: float | None) -> str:
        return "no pairs" if value is None else f"{value:.3f}"

    return [f"identified, leaving one out: {result['identified']} of {result['photos']} photos of "
            f"{result['concepts']} concepts",
            f"AUC of all pairs {shown(result['auc'])}, of pairs with one class noun "
            f"{shown(result['auc_of_one_noun'])}",
            *(f"pairs of {what} as similar as a photo and its crop: {shown(share)}"
              for what, share in result["as_its_crop"].items())]
