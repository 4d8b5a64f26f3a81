"""Pasted objects: pixels, masks, boxes and classes, by hand."""

import json

import numpy
import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection import train_net
from detection.data import loading, training_data
from detection.data.copy_paste import CopyPaste
from foundation.errors import UserError

# isort: split
from detectron2.structures import Boxes, Instances, PolygonMasks

SIZE = 40


def mapped(colour, *objects):
    """An image of one colour with rectangles (class, left, top, right, bottom) as polygons."""
    instances = Instances((SIZE, SIZE))
    instances.gt_boxes = Boxes(torch.tensor([each[1:] for each in objects], dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor([each[0] for each in objects], dtype=torch.int64)
    outlines = [[[a, b, c, b, c, d, a, d]] for _, a, b, c, d in objects]
    instances.gt_masks = PolygonMasks([[numpy.array(each[0], float)] for each in outlines])
    return {"image": torch.full((3, SIZE, SIZE), colour, dtype=torch.uint8), "instances": instances, "name": colour}


@pytest.fixture
def paste(monkeypatch):
    """Pastes objects, all or by a list of random numbers, of a white image onto a black one."""

    def call(below, above, draws=None):
        monkeypatch.setattr(numpy.random, "random", lambda count: numpy.array(draws or [0.0] * count))
        source = iter([mapped(0, *below), mapped(255, *above)])
        return CopyPaste(lambda _: next(source), [{}])({})

    return call


def test_what_is_covered_leaves_masks_and_boxes(paste):
    found = paste([(0, 0, 0, 20, 10), (1, 30, 30, 38, 38)], [(2, 10, 0, 30, 20)])
    instances = found["instances"]
    assert instances.gt_classes.tolist() == [0, 1, 2]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 10, 10], [30, 30, 38, 38], [10, 0, 30, 20]]
    assert instances.gt_masks.tensor.sum(dim=(1, 2)).tolist() == [100, 64, 400]
    assert (instances.gt_masks.tensor.sum(dim=0) <= 1).all()  # no pixel belongs to two objects
    assert (found["image"][:, :20, 10:30] == 255).all()
    assert int((found["image"] == 255).sum()) == 3 * 400
    assert found["name"] == 0  # the rest of the record is that of the image below


def test_hidden_objects_are_dropped(paste):
    below = [(0, 0, 0, 20, 10), (1, 5, 5, 9, 9), (2, 0, 20, 10, 30)]
    found = paste(below, [(3, 0, 0, 19, 10), (4, 0, 20, 8, 30)])["instances"]
    # Of the first 1 of 20 columns is left, of the second nothing, of the third a fifth.
    assert found.gt_classes.tolist() == [2, 3, 4]
    assert found.gt_boxes.tensor[0].tolist() == [8, 20, 10, 30]


def test_a_random_subset_is_pasted_or_none(paste):
    above = [(1, 0, 0, 5, 5), (2, 10, 0, 15, 5), (3, 20, 0, 25, 5)]
    found = paste([(0, 30, 30, 35, 35)], above, [0.7, 0.2, 0.9])
    assert found["instances"].gt_classes.tolist() == [0, 2]
    assert paste([(0, 30, 30, 35, 35)], above, [0.7, 0.6, 0.9])["instances"].gt_classes.tolist() == [0]
    assert paste([], [])["instances"].gt_masks.tensor.shape == (0, SIZE, SIZE)
    assert paste([], above)["instances"].gt_classes.tolist() == [1, 2, 3]


def test_images_without_objects(tiny_overrides):
    pairs = ["INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.SIZE", "64", "INPUT.LSJ.COPY_PASTE", "True", "MODEL.DEVICE", "cpu"]
    config, _ = configs.for_one_process(configs.load("shapes_R18_FPN", [*tiny_overrides, *pairs]))
    images = training_data.read(config)
    bare = {**images.records[0], "annotations": [{**images.records[0]["annotations"][0], "iscrowd": 1}]}
    mapper = training_data.ImageMapper(config, is_train=True)
    assert len(mapper(bare)["instances"]) == len(CopyPaste(mapper, [bare])(bare)["instances"]) == 0
    assert len(CopyPaste(mapper, [bare])(images.records[1])["instances"]) > 0


def test_training_images_have_objects_of_others(tiny_overrides):
    pairs = ["INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.SIZE", "64", "INPUT.LSJ.COPY_PASTE", "True", "MODEL.DEVICE", "cpu"]
    config, _ = configs.for_one_process(configs.load("shapes_R18_FPN", [*tiny_overrides, *pairs]))
    images = training_data.read(config)

    def first(count):
        batches = iter(training_data.build_batches(config, images, loading.ProcessBatch(), config.SEED, workers=0))
        return [record for _ in range(count) for record in next(batches)]

    found, again = first(6), first(6)
    assert max(len(record["instances"]) for record in found) > 2  # an image has two
    for one, two in zip(found, again, strict=True):
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["instances"].gt_masks.tensor, two["instances"].gt_masks.tensor)


@pytest.mark.parametrize("pairs", [[], ["INPUT.LSJ.ENABLED", "True", "MODEL.MASK_ON", "False"]])
def test_it_needs_jitter_and_masks(pairs):
    with pytest.raises(UserError, match=r"INPUT\.LSJ\.COPY_PASTE pastes masks of images of one size: it needs"):
        configs.load("shapes_R18_FPN", ["INPUT.LSJ.COPY_PASTE", "True", *pairs])


@pytest.mark.slow
def test_a_run_with_pasted_objects(tiny_overrides, tmp_path):
    """The heads train on bitmaps, and a resumed run sees the same images."""
    pairs = ["INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.SIZE", "64", "INPUT.LSJ.COPY_PASTE", "True"]
    fixed = ["--config", "shapes_R18_FPN", "--num-gpus", "0", *tiny_overrides, *pairs, "TEST.PRECISE_BN.NUM_ITER", "1"]
    losses = []
    for folder, steps in (("whole", [4]), ("resumed", [2, 4])):
        for until in steps:
            output = ["--output", str(tmp_path / folder), "SOLVER.MAX_ITER", str(until)]
            train_net.main([*fixed, *output, *(["--resume"] if until != steps[0] else [])])
        records = map(json.loads, (tmp_path / folder / "metrics.json").read_text().splitlines())
        losses.append([record["total_loss"] for record in records if record.get("total_loss")][-1])
    assert losses[0] == losses[1]
