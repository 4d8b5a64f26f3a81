"""Run-length codes beside pycocotools', byte for byte, and the evaluator's records beside Detectron2's."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks

from detection.evaluation import scores


def conventional(masks):
    codes = coco_masks.encode(np.asfortranarray(masks.numpy().astype(np.uint8).transpose(1, 2, 0)))
    return [{"size": code["size"], "counts": code["counts"].decode()} for code in codes]


def filled(height, width, *regions):
    """A mask of ones in some rectangles, each a pair of slices."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    for rows, columns in regions:
        mask[rows, columns] = True
    return mask


every = slice(None)
EDGES = {
    "empty": filled(5, 7),
    "full": filled(5, 7, (every, every)),
    "first pixel": filled(5, 7, (0, 0)),
    "last pixel": filled(5, 7, (4, 6)),
    "all but the first": ~filled(5, 7, (0, 0)),
    "one column": filled(5, 7, (every, 3)),
    "one row": filled(5, 7, (2, every)),
    "from a column's foot to the next one's head": filled(5, 7, (4, 2), (0, 3)),
    "foot and head of two columns apart": filled(5, 7, (4, 2), (0, 4)),
    "top and bottom rows": filled(5, 7, (0, every), (4, every)),
    "right border": filled(5, 7, (slice(1, 4), slice(5, None))),
}


@pytest.mark.parametrize("name", EDGES)
def test_edge_cases_equal_pycocotools(name):
    masks = EDGES[name][None]
    assert scores.encode(masks) == conventional(masks)


def test_all_of_an_image_at_once():
    masks = torch.stack(list(EDGES.values()))
    assert scores.encode(masks) == conventional(masks)
    assert scores.encode(masks.flip(0)) == conventional(masks)[::-1]
    assert scores.encode(masks[:0]) == []


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (40, 1), (37, 53), (480, 640)])
def test_random_masks_equal_pycocotools(height, width):
    share = torch.linspace(0, 1, 9)[:, None, None]
    masks = torch.rand(9, height, width, generator=torch.manual_seed(0)) < share
    assert scores.encode(masks) == conventional(masks)


def test_masks_need_not_be_contiguous():
    masks = torch.rand(3, 20, 30, generator=torch.manual_seed(1)) < 0.3
    turned = masks.transpose(1, 2)
    assert scores.encode(turned) == conventional(turned)
    assert scores.encode(masks[:, ::2, 3:9]) == conventional(masks[:, ::2, 3:9])


def test_pasted_masks_give_the_records_that_detectron2_gives(tmp_path):
    pytest.importorskip("detectron2")
    import json

    import foundation.detectron2_compat  # noqa: F401
    from detection.evaluation.coco import FastCOCOEvaluator

    # isort: split
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.evaluation import COCOEvaluator
    from detectron2.modeling.postprocessing import detector_postprocess
    from detectron2.structures import Boxes, Instances

    categories = [{"id": 1, "name": "a"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    register_coco_instances("pasted", {}, str(tmp_path / "a.json"), str(tmp_path))
    # Inside, over each border, over all, one pixel, thinner than a pixel, nothing left after clipping.
    boxes = [[10, 8, 30, 31], [-9, 5, 14, 20], [50, -6, 90, 99], [-5, -5, 99, 99], [20, 20, 21, 21], [7.2, 9, 7.6, 40]]
    boxes += [[90, 90, 95, 95], [5.5, 6.5, 20.5, 30.5]]
    raw = Instances((60, 80), scores=torch.linspace(1, 0.3, 8), pred_classes=torch.zeros(8, dtype=torch.int64))
    raw.pred_boxes = Boxes(torch.tensor(boxes))
    raw.pred_masks = torch.rand(8, 1, 28, 28, generator=torch.manual_seed(2))
    raw.pred_masks[0] = 0  # an empty mask
    raw.pred_masks[3] = 2  # the whole image, the corners too, where half of a cell is outside
    try:
        evaluators = [FastCOCOEvaluator("pasted"), COCOEvaluator("pasted", use_fast_impl=False)]
        pasted = detector_postprocess(raw, 120, 160)
        for evaluator in evaluators:
            evaluator.reset()
            evaluator.process([{"image_id": 4}, {"image_id": 5}], [{"instances": pasted}, {"instances": pasted[:0]}])
    finally:
        DatasetCatalog.remove("pasted")
        MetadataCatalog.remove("pasted")
    ours, theirs = (evaluator._predictions for evaluator in evaluators)
    assert ours == theirs
    areas = [int(coco_masks.area(record["segmentation"])) for record in ours[0]["instances"]]
    assert len(areas) == 7
    assert (areas[0], areas[3]) == (0, 120 * 160)
    assert pasted.has("pred_masks")
