"""Targets of the mask head equal Detectron2's, which pycocotools rasterises, bit for bit."""

import numpy
import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection.data import training_data
from detection.data.loading import ProcessBatch
from detection.data.polygons import RegionPolygons, _steps_before
from detection.training import model as modeling

# isort: split
from detectron2.structures import Instances, PolygonMasks
from detectron2.utils.events import EventStorage

REGIONS = 80


def blob(random, corners):
    angles, radius = numpy.sort(random.random(corners)) * 2 * numpy.pi, random.uniform(0.3, 1, corners)
    outline = numpy.stack([numpy.cos(angles), numpy.sin(angles)], axis=1) * radius[:, None]
    return outline * random.uniform(0.5, 200) + random.uniform(0, 600, 2)


OUTLINES = {
    "blob": blob,
    "self-intersecting": lambda random, corners: random.uniform(-50, 700, (corners, 2)),
    "whole numbers": lambda random, corners: random.integers(0, 30, (corners, 2)) + random.integers(0, 600, 2),
    "repeated corners": lambda random, corners: numpy.repeat(random.uniform(0, 600, (corners, 2)), 3, axis=0),
    "upright line": lambda random, corners: numpy.stack(
        [numpy.full(corners, random.uniform(0, 600)), random.uniform(0, 600, corners)], axis=1
    ),
    "level line": lambda random, corners: numpy.stack(
        [random.uniform(0, 600, corners), numpy.full(corners, random.uniform(0, 600))], axis=1
    ),
    "tiny": lambda random, corners: random.uniform(0, 0.5, (corners, 2)) + random.uniform(0, 600, 2),
    "far outside": lambda random, corners: random.uniform(-2000, 3000, (corners, 2)),
}


@pytest.mark.parametrize("side", [1, 14, 28])
@pytest.mark.parametrize("kind", OUTLINES)
def test_targets_equal_those_of_detectron2(kind, side):
    random = numpy.random.default_rng(side)
    for _ in range(3):
        objects = [
            [OUTLINES[kind](random, int(random.integers(3, 40))).reshape(-1) for _ in range(parts)]
            for parts in (0, 1, 1, 1, 2, 3, 7)
        ]
        chosen = random.integers(0, len(objects), REGIONS)
        middles = [numpy.concatenate(parts or [numpy.zeros(6)]).reshape(-1, 2).mean(axis=0) for parts in objects]
        sides = numpy.exp(random.uniform(numpy.log(1), numpy.log(400), (2, REGIONS, 2)))
        corners = numpy.stack(middles)[chosen] + sides * [[[-0.5]], [[0.5]]]
        boxes = torch.from_numpy(numpy.concatenate(corners, axis=1)).float()
        boxes[::3] = boxes[::3].round()  # corners of boxes on those of pixels
        expected = PolygonMasks(objects)[torch.from_numpy(chosen)].crop_and_resize(boxes, side)
        found = RegionPolygons(objects)[torch.from_numpy(chosen)].crop_and_resize(boxes, side)
        assert found.dtype == torch.bool
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("start", "run", "rise"), [(0, 5, 10), (20, -5, 10), (3, 7, 9), (220, -5, 2460), (256, -10, 572), (77, -11, 2178)]
)
def test_steep_edges_pass_columns_where_their_points_do(start, run, rise):
    """The last three: points whose rounding is not that of the quotient that they are found by."""
    slope = run / rise
    points = (start + slope * numpy.arange(rise + 1) + 0.5).astype(int)
    passed = numpy.flatnonzero(numpy.diff(points))
    beyond = numpy.maximum(points[passed], points[passed + 1])
    found = _steps_before(beyond, numpy.full(len(beyond), start), numpy.full(len(beyond), slope))
    assert found.tolist() == passed.tolist()


def test_boxes_without_area_and_no_regions():
    objects = [[numpy.array([3.0, 3, 9, 3, 9, 8, 3, 8])]]
    boxes = torch.tensor([[4.0, 4, 4, 4], [8.95, 2, 9, 10], [9, 9, 3, 3]])
    expected = PolygonMasks(objects * 3).crop_and_resize(boxes, 14)
    assert expected.any()
    assert torch.equal(RegionPolygons(objects * 3).crop_and_resize(boxes, 14), expected)
    uneven = [[], objects[0] * 2]  # as many polygons as objects
    expected = PolygonMasks(uneven).crop_and_resize(boxes[:2], 14)
    assert torch.equal(RegionPolygons(uneven).crop_and_resize(boxes[:2], 14), expected)
    assert RegionPolygons(objects)[[]].crop_and_resize(boxes[:0], 14).shape == (0, 14, 14)
    assert RegionPolygons([]).crop_and_resize(boxes[:0], 14).shape == (0, 14, 14)
    with pytest.raises(ValueError, match="3 boxes for 1 objects"):
        RegionPolygons(objects).crop_and_resize(boxes, 14)


@pytest.mark.parametrize(
    "item", [1, slice(1, 3), [2, 0, 2], torch.tensor([1, 1, 2]), torch.tensor([True, False, True])], ids=str
)
def test_indexing_selects_what_detectron2s_selects(item):
    objects = [[numpy.arange(6.0) + 10 * number] * (number + 1) for number in range(3)]
    expected, found = PolygonMasks(objects), RegionPolygons(objects)
    expected, found = expected[item], found[item]
    assert len(found) == len(expected)
    assert "num_instances" in repr(found)
    for theirs, ours in zip(expected, found, strict=True):
        assert [each.tolist() for each in ours] == [each.tolist() for each in theirs]
    assert torch.equal(found.area(), expected.area())
    assert torch.equal(found.get_bounding_boxes().tensor, expected.get_bounding_boxes().tensor)
    assert torch.equal(found.nonempty(), expected.nonempty())


@pytest.mark.parametrize("recipe", ["shapes_R18_FPN", "shapes_R50_C4"])
def test_losses_of_a_detector_equal_those_with_detectron2s_polygons(recipe, tiny_overrides):
    config, _ = configs.for_one_process(configs.load(recipe, [*tiny_overrides, "MODEL.DEVICE", "cpu"]))
    batches = training_data.build_batches(config, training_data.read(config), ProcessBatch(), seed=0, workers=0)
    batch = next(iter(batches))
    assert all(isinstance(image["instances"].gt_masks, RegionPolygons) for image in batch)
    model = modeling.build(config)
    losses = []
    for polygons in (RegionPolygons, PolygonMasks):
        for image in batch:
            image["instances"].gt_masks = polygons(image["instances"].gt_masks.polygons)
        torch.manual_seed(0)
        with EventStorage():
            losses.append({name: loss.item() for name, loss in model(batch).items()})
    assert losses[0]["loss_mask"] > 0
    assert losses[0] == losses[1]


def test_instances_can_be_joined():
    one = Instances((9, 9), gt_masks=RegionPolygons([[numpy.arange(6.0)]]))
    both = Instances.cat([one, one])
    assert isinstance(both.gt_masks, RegionPolygons)
    assert len(both.gt_masks) == 2
