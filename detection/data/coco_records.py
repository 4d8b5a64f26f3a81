"""Detectron2's records and metadata of a dataset in COCO's format, from what `annotations` reads."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from detection.data.annotations import (
    Annotations,
    Record,
    category_records,
    collector_paused,
    keypoint_names,
    read_annotations,
    refuse_problems,
)
from foundation.coco_ids import id_order
from foundation.errors import UserError

LIMB_COLOUR = (102, 204, 255)  # of Detectron2's drawings
_LEFT = re.compile(r"left|(?<![a-z])l(?=[_ .-])|(?<=[_ .-])l(?![a-z])", re.IGNORECASE)


@collector_paused()
def load_coco(name: str) -> list[Record]:
    """Detectron2's records of a registered dataset in COCO's format, whose classes are noted in its metadata.

    Raises:
        UserError: the file is missing or not in the format, or a record cannot be used.
    """
    metadata = MetadataCatalog.get(name)
    read = read_annotations(Path(metadata.json_file))
    records = to_records(read, metadata.image_root)
    metadata.thing_classes = [each["name"] for each in read.categories]
    metadata.thing_dataset_id_to_contiguous_id = {each["id"]: index for index, each in enumerate(read.categories)}
    return records


def to_records(read: Annotations, image_root: str) -> list[Record]:
    """Detectron2's records of the images, in the order of their ids, as its own reader makes them.

    An object whose polygons all have fewer than three points is left out, its box too; and so is one with a negative
    width or height, of which resizing would make a box beside it.

    Raises:
        UserError: a record cannot be used.
    """
    refuse_problems(read)
    classes = {each["id"]: index for index, each in enumerate(read.categories)}
    objects: dict[Any, list[Record]] = {each["id"]: [] for each in read.images}
    for each in read.annotations:
        if each.get("segmentation") != [] and min(each["bbox"][2:]) >= 0:
            objects[each["image_id"]].append(_to_object(each, classes))
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": objects[image["id"]],
        }
        for image in sorted(read.images, key=lambda image: id_order(image["id"]))
    ]


def _to_object(annotation: Record, classes: Mapping[Any, int]) -> Record:
    kept = ("iscrowd", "bbox", "segmentation", "broken_mask")
    result = {key: annotation[key] for key in kept if key in annotation}
    if "keypoints" in annotation:
        # COCO's are indices of pixels, Detectron2's are coordinates: the centre of pixel 0 is at 0.5.
        result["keypoints"] = [
            value if place % 3 == 2 else value + 0.5 for place, value in enumerate(annotation["keypoints"])
        ]
    return {**result, "category_id": classes[annotation["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}


def note_keypoints(name: str) -> None:
    """Put the keypoints that the categories of a user's own dataset name into its metadata.

    A flip swaps points whose names differ in left and right only (left_eye and right_eye, l_hand and r_hand).
    """
    metadata = MetadataCatalog.get(name)
    try:
        categories = category_records(Path(metadata.json_file))
    except UserError:  # reported by the check of the dataset
        return
    names = keypoint_names(categories)
    if not names:
        return
    pairs = {(each, _LEFT.sub(_to_right, each)) for each in names}
    skeleton = next(each["skeleton"] for each in categories if "keypoints" in each)
    metadata.set(
        keypoint_names=names,
        keypoint_flip_map=[(left, right) for left, right in sorted(pairs) if left != right and right in names],
        keypoint_connection_rules=[(names[a - 1], names[b - 1], LIMB_COLOUR) for a, b in skeleton],
    )


def _to_right(match: re.Match[str]) -> str:
    right = "right" if len(match.group()) > 1 else "r"
    if match.group().isupper():
        return right.upper()
    return right.capitalize() if match.group()[0].isupper() else right
