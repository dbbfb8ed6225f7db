"""How well an encoder tells the photos of concepts apart: figures of made features."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.benchmarks.continual.photo_encoder import lines_of, told_apart
from continual_concepts.core.data.assignment import Assignment
from continual_concepts.core.data.pictures import Picture


class Means:
    """Features of a picture: its mean colour."""

    reads_texts = False

    def features(self, images, kind):
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=1)


def concept(name, noun, *colours, kind="object"):
    pictures = tuple(Picture(torch.tensor(colour).view(3, 1, 1).expand(3, 8, 8)) for colour in colours)
    none = torch.zeros(0, 3, 8, 8)
    return Assignment(name, noun, kind, pictures, none, none, (), ())


RED, REDDISH, BLUE, BLUISH = (1.0, 0, 0), (1.0, 0.2, 0), (0, 0, 1.0), (0, 0.2, 1.0)


def test_two_dogs_of_two_colours_are_told_apart():
    found = told_apart(Means(), [concept("rex", "dog", RED, REDDISH), concept("bo", "dog", BLUE, BLUISH)])
    assert found["identified"] == found["photos"] == 4
    assert found["auc"] == found["auc_of_one_noun"] == 1
    assert found["as_its_crop"] == {"one thing": 0, "two things": 0}


def test_two_of_one_colour_are_not():
    found = told_apart(Means(), [concept("rex", "dog", RED, BLUE), concept("bo", "dog", RED, BLUE)])
    assert found["identified"] == 0 and found["auc"] == pytest.approx(0.25)
    assert found["as_its_crop"] == {"one thing": 0, "two things": 0.5}


def test_styles_and_other_nouns_are_no_pairs():
    found = told_apart(Means(), [concept("rex", "dog", RED, REDDISH),
                                 concept("ink", "dog", BLUE, BLUISH, kind="style")])
    assert found["auc"] == 1 and found["as_its_crop"]["two things"] is None
    assert "no pairs" in lines_of(found)[-1]
