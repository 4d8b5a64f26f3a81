"""Outlines: what a class is, and that size is not part of it."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image, ImageDraw

from shapes import CLASSES
from shapes.outlines import area, blob_outline, class_outline, stick_outline


@pytest.mark.parametrize("name", CLASSES)
def test_every_outline_has_area_one_around_the_origin(name):
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = class_outline(name, rng)
        assert area(points) == pytest.approx(1.0)
        assert_allclose(_centroid(points), 0, atol=0.02)
        assert np.abs(points).max() < 2, "an object must fit into a picture"


@pytest.mark.parametrize("outline", [blob_outline, stick_outline])
def test_clutter_has_area_one(outline):
    assert area(outline(np.random.default_rng(0))) == pytest.approx(1.0)


@pytest.mark.parametrize("name", CLASSES)
def test_an_outline_does_not_cross_itself(name):
    """The area that is filled equals the area by the shoelace formula only if no edge crosses another."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        assert _filled(class_outline(name, rng)) == pytest.approx(1.0, abs=0.03)


def test_members_of_a_class_differ():
    rng = np.random.default_rng(2)
    one, other = class_outline("star", rng), class_outline("star", rng)
    assert np.abs(one - other).max() > 0.05


def test_area_of_a_unit_square_does_not_depend_on_its_direction():
    square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    assert area(square) == area(square[::-1]) == 1.0


def _filled(points, scale=100):
    image = Image.new("L", (400, 400))
    ImageDraw.Draw(image).polygon([(x, y) for x, y in points * scale + 199.5], fill=1)
    return np.asarray(image, dtype=np.float64).sum() / scale**2


def _centroid(points, scale=100):
    image = Image.new("L", (400, 400))
    ImageDraw.Draw(image).polygon([(x, y) for x, y in points * scale + 199.5], fill=1)
    y, x = np.nonzero(np.asarray(image))
    return np.array([x.mean() - 199.5, y.mean() - 199.5]) / scale
