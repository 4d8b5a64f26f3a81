"""Polygons against the masks they were traced from, by pycocotools' own rasteriser."""

import numpy as np
import pytest

from shapes.lighting import covered
from shapes.outlines import CLASSES, class_outline
from shapes.polygons import MAX_POINTS, bounding_box, trace
from shapes.render import generator
from shapes.scene import compose

mask_utils = pytest.importorskip("pycocotools.mask")
SIZE = (90, 70)  # width, height


def _disc(centre, radius):
    x, y = np.meshgrid(np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5)
    distance = np.hypot(x - centre[0], y - centre[1])
    return np.clip(radius - distance + 0.5, 0, 1).astype(np.float32)


def _rasterised(parts):
    runs = mask_utils.frPyObjects([part.ravel().tolist() for part in parts], SIZE[1], SIZE[0])
    return mask_utils.decode(mask_utils.merge(runs)).astype(bool)


def _iou(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize("name", CLASSES)
def test_the_rasterised_polygon_is_the_mask(name):
    rng = np.random.default_rng(3)
    for side in (14, 25, 40):
        coverage = covered(class_outline(name, rng) * side + [45, 35], (0, 0, *SIZE))
        parts = trace(coverage)
        assert _iou(_rasterised(parts), coverage >= 0.5) >= 0.9
        assert all(3 <= len(part) <= MAX_POINTS for part in parts)


def test_polygons_of_objects_that_hide_one_another_are_their_visible_masks():
    for index in range(12):
        names = ["ellipse", "star", "crescent", "cross"]
        scene = compose(generator(0, "scenes/val", index), (160, 160), names, scale=(0.2, 0.4), clutter=0)
        for placed in scene.objects:
            runs = mask_utils.frPyObjects([part.ravel().tolist() for part in trace(placed.coverage)], 160, 160)
            assert _iou(mask_utils.decode(mask_utils.merge(runs)).astype(bool), placed.coverage >= 0.5) >= 0.9


def test_coordinates_are_those_of_coco():
    """A block of whole pixels, columns 10 to 19 and rows 5 to 11, is the rectangle x 10..20, y 5..12."""
    coverage = np.zeros(SIZE[::-1], dtype=np.float32)
    coverage[5:12, 10:20] = 1
    parts = trace(coverage)
    assert bounding_box(parts) == [10, 5, 10, 7]
    assert np.array_equal(_rasterised(parts), coverage > 0)


def test_an_object_cut_in_two_has_two_parts():
    coverage = _disc((45, 35), 25)
    coverage[:, 40:50] = 0
    parts = trace(coverage)
    assert len(parts) == 2
    assert _iou(_rasterised(parts), coverage >= 0.5) >= 0.95


def test_a_hole_stays_empty():
    coverage = _disc((45, 35), 28) * (1 - _disc((48, 33), 10)) * (1 - _disc((30, 40), 5))
    parts = trace(coverage)
    assert _iou(_rasterised(parts), coverage >= 0.5) >= 0.93
    assert not _rasterised(parts)[33, 48]
    assert not _rasterised(parts)[40, 30]


def test_what_touches_the_border_stays_inside():
    parts = trace(_disc((2, 68), 20))
    points = np.concatenate(parts)
    assert points.min() >= 0
    assert (points <= SIZE).all()


def test_specks_are_left_out():
    coverage = _disc((45, 35), 20)
    coverage[2, 2] = 1
    assert len(trace(coverage)) == 1


def test_nothing_gives_nothing():
    assert trace(np.zeros(SIZE[::-1], dtype=np.float32)) == []
