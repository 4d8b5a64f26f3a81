"""Large-scale jitter: every image becomes a square, its objects stay where they are in it."""

import functools

import numpy
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks

pytest.importorskip("detectron2")

from detection import config as configs
from detection.data.seeding import Stream, seed_libraries
from detection.data.training_data import training_mapper

SETTINGS = ["INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.SIZE", "64", "INPUT.RANDOM_FLIP", "none"]


@pytest.fixture
def record(tmp_path):
    """An image of 80 x 40 pixels with a white rectangle, whose outline is annotated."""
    pixels = numpy.zeros((40, 80, 3), numpy.uint8)
    pixels[10:30, 20:60] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    outline = [20.0, 10.0, 60.0, 10.0, 60.0, 30.0, 20.0, 30.0]
    annotation = {"bbox": [20.0, 10.0, 40.0, 20.0], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    return {
        "file_name": str(tmp_path / "a.png"), "height": 40, "width": 80, "image_id": 1,
        "annotations": [{**annotation, "segmentation": [outline]}],
    }  # fmt: skip


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_an_image_is_padded_or_cut_out(scale, record):
    """The longer side becomes 32 or 128 of a square of 64."""
    bounds = ["INPUT.LSJ.MIN_SCALE", str(scale), "INPUT.LSJ.MAX_SCALE", str(scale)]
    mapper = training_mapper(configs.load("shapes_R18_FPN", [*SETTINGS, *bounds]))
    found = mapper(record)
    assert found["image"].shape == (3, 64, 64)
    (box,) = found["instances"].gt_boxes.tensor.round().int().tolist()
    left, top, right, bottom = box
    if scale == 0.5:  # 32 x 16 pixels in the upper left corner, the rest is grey
        assert box == [8, 4, 24, 12]
        assert (found["image"][:, 16:] == 128).all()
        assert (found["image"][:, :, 32:] == 128).all()
    inside = found["image"][:, top + 2 : bottom - 2, left + 2 : right - 2]
    assert inside.numel()
    assert (inside == 255).all()


def test_the_factor_is_drawn_between_its_bounds(record):
    mapper = training_mapper(configs.load("shapes_R18_FPN", SETTINGS))
    widths = []
    for position in range(60):
        seed_libraries(0, Stream.IMAGE, position)
        image = mapper(record)["image"]
        padded = (image == 128).all(0)
        widths.append(64 - int(padded.all(0).sum()))
    assert torch.tensor(widths).unique().numel() > 20
    assert min(widths) < 16
    assert max(widths) == 64


def test_masks_that_are_resized_can_be_written_to(record, monkeypatch):
    """Pillow's are read-only, and PyTorch warns of undefined behaviour, by default once in a process."""
    mapper = training_mapper(
        configs.load("shapes_R18_FPN", ["INPUT.MASK_FORMAT", "bitmask", "INPUT.RANDOM_FLIP", "none"])
    )
    (annotation,) = record["annotations"]
    mask = numpy.zeros((40, 80), numpy.uint8, order="F")
    mask[10:30, 20:60] = 1
    annotation["segmentation"] = coco_masks.encode(mask)
    monkeypatch.setattr(torch, "from_numpy", functools.partial(_refuse_read_only, torch.from_numpy))
    found = mapper(record)["instances"]
    assert found.gt_masks.tensor.float().mean() == pytest.approx(0.25, abs=0.02)


def _refuse_read_only(convert, array):
    assert array.flags.writeable
    return convert(array)
