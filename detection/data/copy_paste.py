"""Simple copy-paste (Ghiasi et al. 2021): objects of one training image are put onto another.

Both images have been through the augmentations, large-scale jitter among them, so that they are squares of one size.
Each object of the second image is pasted with a probability of a half, where it is, without blending. What it covers is
taken out of the masks of the first image, whose boxes follow; an object of which little is left is dropped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask

LEAST_LEFT = 0.1  # of the pixels of an object, for it to stay

Record = dict[str, Any]


class CopyPaste:
    """Maps a record as `mapper` does, and pastes objects of another one.

    Args:
        mapper: gives `image` (3, H, W) of one size, and `instances` with masks.
        records: of which the other is drawn.
    """

    def __init__(self, mapper: Callable[[Record], Record], records: Sequence[Record]) -> None:
        self._mapper, self._records = mapper, records

    def __call__(self, record: Record) -> Record:
        """The record with `image` and `instances`, whose masks are bitmaps.

        Raises:
            UserError: one of the two images cannot be read.
        """
        below = self._mapper(record)
        above = self._mapper(self._records[numpy.random.randint(len(self._records))])
        chosen = torch.from_numpy(numpy.random.random(len(above["instances"])) < 0.5)
        pasted = _with_bitmaps(above["instances"])[chosen]
        cover = pasted.gt_masks.tensor.any(dim=0)
        below["image"] = torch.where(cover, above["image"], below["image"])
        below["instances"] = Instances.cat([uncovered(_with_bitmaps(below["instances"]), cover), pasted])
        return below


def uncovered(instances: Instances, cover: torch.Tensor) -> Instances:
    """Instances without the pixels of `cover` (H, W), with boxes that fit; those that it nearly hides are dropped."""
    whole = instances.gt_masks.tensor
    left = whole & ~cover
    stay = left.sum(dim=(1, 2)) >= LEAST_LEFT * whole.sum(dim=(1, 2)).clamp(min=1)
    changed = stay & (left != whole).any(dim=2).any(dim=1)
    masks = BitMasks(left)
    boxes = instances.gt_boxes.tensor.clone()
    boxes[changed] = masks.get_bounding_boxes().tensor[changed]
    instances.gt_masks, instances.gt_boxes = masks, Boxes(boxes)
    return instances[stay]


def _with_bitmaps(instances: Instances) -> Instances:
    """The same instances; polygons become bitmaps."""
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        height, width = instances.image_size
        bitmaps = [torch.from_numpy(polygons_to_bitmask(polygons, height, width)) for polygons in masks.polygons]
        instances.gt_masks = BitMasks(torch.stack(bitmaps) if bitmaps else torch.zeros(0, height, width))
    return instances
