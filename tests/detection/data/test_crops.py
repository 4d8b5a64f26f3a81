"""Crops of training images in pixels: objects stay where they are in them."""

import numpy
import pytest
from PIL import Image
from pycocotools import mask as coco_masks

pytest.importorskip("detectron2")

from detection import config as configs
from detection.data.seeding import Stream, seed_libraries
from detection.data.training_data import training_mapper

LEFT, TOP, RIGHT, BOTTOM = 12, 6, 40, 20


@pytest.fixture(params=["polygon", "bitmask"])
def crop(request, tmp_path):
    """Crops an image of 80 x 40 pixels, which is black but for a white rectangle, the object; by type, size, seed."""
    mask = numpy.zeros((40, 80), numpy.uint8, order="F")
    mask[TOP:BOTTOM, LEFT:RIGHT] = 1
    Image.fromarray(mask * 255).save(tmp_path / "a.png")
    outline = [[LEFT, TOP, RIGHT, TOP, RIGHT, BOTTOM, LEFT, BOTTOM]]
    annotation = {
        "bbox": [LEFT, TOP, RIGHT, BOTTOM], "bbox_mode": 0, "category_id": 0, "iscrowd": 0,
        "segmentation": coco_masks.encode(mask) if request.param == "bitmask" else outline,
    }  # fmt: skip
    record = {"file_name": str(tmp_path / "a.png"), "height": 40, "width": 80, "annotations": [annotation]}
    pairs = ["INPUT.CROP.ENABLED", "True", "INPUT.MASK_FORMAT", request.param, "INPUT.MIN_SIZE_TRAIN", "(0,)"]

    def call(kind, size, seed):
        chosen = ["INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", size, "INPUT.RANDOM_FLIP", "none"]
        mapper = training_mapper(configs.load("shapes_R18_FPN", [*pairs, *chosen]))
        seed_libraries(0, Stream.IMAGE, seed)
        mapped = mapper(record)
        return mapped["image"][0].numpy(), mapped["instances"]

    return call


@pytest.mark.parametrize(("kind", "size"), [("absolute", "[16, 24]"), ("absolute_range", "[10, 30]")])
def test_an_object_stays_where_it_is_in_a_crop(kind, size, crop):
    found = set()
    for seed in range(12):
        image, objects = crop(kind, size, seed)
        height, width = image.shape
        if kind == "absolute":
            assert (height, width) == (16, 24)
        else:
            assert 10 <= min(height, width) <= max(height, width) <= 30
        assert objects.image_size == (height, width)
        white = numpy.argwhere(image == 255)
        assert len(objects) == bool(len(white))
        found.add(len(objects))
        for box in objects.gt_boxes.tensor.tolist():
            (top, left), (bottom, right) = white.min(axis=0), white.max(axis=0) + 1
            assert box == [left, top, right, bottom]
    assert found == {0, 1}


@pytest.mark.parametrize("kind", ["absolute", "absolute_range"])
def test_a_crop_larger_than_the_image_is_the_image(kind, crop):
    image, objects = crop(kind, "[160, 160]", 0)
    assert image.shape == (40, 80)
    assert objects.gt_boxes.tensor.tolist() == [[LEFT, TOP, RIGHT, BOTTOM]]
