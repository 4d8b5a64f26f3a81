"""Regions that are sampled for a whole batch equal those that Detectron2 samples image by image."""

import copy

import numpy
import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection.data.polygons import RegionPolygons
from detection.training import model as modeling
from detection.training import proposals

# isort: split
from detectron2.modeling import ROIHeads
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

SIZE = (100, 120)


@pytest.fixture(params=["shapes_R18_FPN", "shapes_R50_C4", "coco_R50_Cascade_FPN_1x_moco"])
def heads(request):
    """Detectron2's ROI heads and ours, with the same settings."""
    config, _ = configs.for_one_process(configs.load(request.param, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))
    theirs = modeling.modeling.build_model(config).roi_heads
    ours = copy.copy(theirs)
    proposals.sample_together(ours)
    return theirs, ours


def boxes_near(random, centres, count):
    corners = centres[random.integers(0, len(centres), count)] + random.normal(0, 6, (count, 4))
    return Boxes(torch.from_numpy(numpy.sort(corners.reshape(-1, 2, 2), axis=1).reshape(-1, 4)).float())


def batch(objects, candidates):
    """Objects and candidates of images, as many of each as the lists say."""
    random = numpy.random.default_rng(0)
    targets, found = [], []
    for count, regions in zip(objects, candidates, strict=True):
        centres = numpy.array([0, 0, 40, 40]) + random.uniform(0, 60, (max(count, 1), 4))
        instances = Instances(SIZE, gt_boxes=Boxes(torch.from_numpy(centres[:count]).float()))
        instances.gt_classes = torch.arange(count) % 3
        instances.gt_masks = RegionPolygons([[numpy.arange(6.0) + number] for number in range(count)])
        targets.append(instances)
        boxes = boxes_near(random, centres, regions)
        found.append(Instances(SIZE, proposal_boxes=boxes, objectness_logits=torch.arange(float(regions))))
    return targets, found


@pytest.mark.parametrize("drawn", [8, 400])  # fewer than there are, and more
@pytest.mark.parametrize("objects", [[3, 0, 5], [0, 0, 0], [1, 7, 40]])
@pytest.mark.parametrize("thresholds", [[0.5], [0.3, 0.6]])  # regions between two are not sampled
def test_regions_equal_those_of_detectron2(heads, objects, drawn, thresholds):
    results = []
    for each in heads:
        each.proposal_matcher = Matcher(thresholds, [0, 1] if len(thresholds) == 1 else [0, -1, 1])
        each.batch_size_per_image = drawn
        targets, candidates = batch(objects, [30, 50, 20])
        torch.manual_seed(3)
        with EventStorage() as storage:
            regions = each.label_and_sample_proposals(candidates, targets)
        results.append((regions, torch.rand(1), {name: value for name, (value, _) in storage.latest().items()}))
    (expected, *others), (found, *own) = results
    assert others == own
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.get_fields().keys() == theirs.get_fields().keys()
        assert ours.gt_classes.dtype == theirs.gt_classes.dtype
        for name in ("gt_classes", "objectness_logits"):
            assert torch.equal(ours.get(name), theirs.get(name))
        for name in {"proposal_boxes", "gt_boxes"} & ours.get_fields().keys():
            assert torch.equal(ours.get(name).tensor, theirs.get(name).tensor)
        if ours.has("gt_masks"):
            assert [each[0][0] for each in ours.gt_masks] == [each[0][0] for each in theirs.gt_masks]


@pytest.mark.parametrize("low_quality", [False, True])
def test_objects_matched_at_the_very_thresholds(low_quality):
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=low_quality)
    values = [0.0, 0.29, 0.3, 0.31, 0.69, 0.7, 0.71, 1.0]
    quality = torch.tensor([values, [0.3] * len(values), [0.0] * len(values)])
    for ours, theirs in zip(proposals.match(matcher, quality[:2]), matcher(quality[:2]), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(proposals.match(matcher, quality[2:]), matcher(quality[2:]), strict=True):
        assert torch.equal(ours, theirs)  # an object that no box overlaps


def test_heads_that_sample_in_their_own_way_are_left_alone():
    class Own(ROIHeads):
        def _sample_proposals(self, *_):
            raise NotImplementedError

    own = object.__new__(Own)
    proposals.sample_together(own)
    assert type(own) is Own
