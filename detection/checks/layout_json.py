"""Checks of datasets whose annotations are one JSON file: COCO's instances and keypoints, and LVIS.

Each finds out before a run what Detectron2's reader, the model or the evaluation would stumble over later.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detection.checks.content import missing_files
from detection.data.requirements import Needs
from foundation.errors import UserError

Fields = Mapping[str, Sequence[str]]
COCO_FIELDS: Fields = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
LVIS_FIELDS: Fields = {
    "images": ("id", "coco_url", "height", "width", "neg_category_ids", "not_exhaustive_category_ids"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation", "area"),
    "categories": ("id", "name", "frequency"),
}


def check_coco(name: str, metadata: Any, needs: Needs) -> None:
    """A dataset in COCO's format.

    Args:
        name: of the dataset, for messages.
        metadata: Detectron2's, with `json_file` and `image_root`.
        needs: of the model.

    Raises:
        UserError: something is missing or not as the format has it; the message names the path.
    """
    annotations, images = Path(metadata.json_file), Path(metadata.image_root)
    content = _read(name, annotations, images, f"{annotations} and the images in {images}/", COCO_FIELDS)
    _check_classes(len(content["categories"]), annotations, needs)
    _check_images((record["file_name"] for record in content["images"]), images, annotations)
    if needs.masks:
        _check_masks(content["annotations"], annotations, needs.polygons)
    if needs.keypoints:
        _check_keypoints(content["annotations"], annotations, metadata.get("keypoint_names"), needs.keypoints)


def check_lvis(name: str, metadata: Any, needs: Needs) -> None:
    """A dataset in LVIS's format, whose images are those of COCO. As `check_coco`.

    Raises:
        UserError: something is missing or not as the format has it; the message names the path.
    """
    annotations, images = Path(metadata.json_file), Path(metadata.image_root)
    layout = f"{annotations} and COCO's folders {images}/train2017 and {images}/val2017"
    content = _read(name, annotations, images, layout, LVIS_FIELDS)
    _check_classes(len(content["categories"]), annotations, needs)
    _check_images(("/".join(record["coco_url"].split("/")[-2:]) for record in content["images"]), images, annotations)
    if needs.masks:
        _check_masks(content["annotations"], annotations, needs.polygons)
    if needs.keypoints:
        raise UserError(f"dataset {name} has no keypoints: set MODEL.KEYPOINT_ON False")


def read_categories(annotations: Path) -> list[str]:
    """Names of the classes of a file in COCO's format, in the order of the model's classes: by their ids.

    Raises:
        UserError: the file is missing, or not in the format.
    """
    if not annotations.is_file():
        raise UserError(f"{annotations} does not exist")
    content = _read_json(annotations)
    _check_records(content, annotations, "categories", COCO_FIELDS["categories"])
    return [record["name"] for record in sorted(content["categories"], key=lambda record: record["id"])]


def _read(name: str, annotations: Path, images: Path, layout: str, fields: Fields) -> Any:
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    under = annotations.is_relative_to(root)
    where = f"; the variable DETECTRON2_DATASETS names the folder of datasets (now {root!r})" if under else ""
    for path, there in ((annotations, annotations.is_file()), (images, images.is_dir())):
        if not there:
            raise UserError(f"dataset {name}: {path} does not exist; expected are {layout}{where}")
    content = _read_json(annotations)
    for key in fields:
        _check_records(content, annotations, key, fields[key])
    for field, key in (("image_id", "images"), ("category_id", "categories")):
        known = {record["id"] for record in content[key]}
        for index, record in enumerate(content["annotations"]):
            if record[field] not in known:
                raise UserError(f"{annotations}: annotations[{index}] has {field} {record[field]}, which {key!r} lacks")
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error


def _check_records(content: Any, path: Path, key: str, fields: Sequence[str]) -> None:
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise UserError(f"{path}: not COCO's instances format: there is no list {key!r}")
    if not records:
        raise UserError(f"{path}: the list {key!r} is empty")
    for index, record in enumerate(records):
        missing = [field for field in fields if not isinstance(record, dict) or field not in record]
        if missing:
            raise UserError(f"{path}: {key}[{index}] has no {missing[0]!r}")
    if len({record["id"] for record in records}) != len(records):
        raise UserError(f"{path}: an id occurs twice in {key!r}")


def _check_classes(found: int, path: Path, needs: Needs) -> None:
    if found != needs.classes:
        raise UserError(f"{path} has {found} categories, but {needs.key} is {needs.classes}")


def _check_images(names: Iterable[str], folder: Path, annotations: Path) -> None:
    listed = list(names)
    missing = missing_files(listed, folder)
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(listed)} images that {annotations} lists are not in {folder}/, the"
            f" first being {missing[0]}"
        )


def _check_masks(records: Sequence[Mapping[str, Any]], path: Path, polygons: bool) -> None:
    """Crowds are left out: training does not use them, and theirs are run lengths in COCO itself."""
    objects = [record for record in records if not record.get("iscrowd", 0)]
    without = _indices(objects, lambda record: not record.get("segmentation"))
    if without:
        raise UserError(
            f"{path}: {len(without)} of {len(objects)} objects have no 'segmentation', the first being that with id"
            f" {objects[without[0]]['id']}; set MODEL.MASK_ON False to learn boxes only"
        )
    runs = _indices(objects, lambda record: isinstance(record["segmentation"], Mapping)) if polygons else []
    if runs:
        raise UserError(
            f"{path}: {len(runs)} of {len(objects)} masks are run lengths and not polygons, the first being that"
            f" with id {objects[runs[0]]['id']}; set INPUT.MASK_FORMAT bitmask"
        )


def _check_keypoints(
    records: Sequence[Mapping[str, Any]], path: Path, names: Sequence[str] | None, expected: int
) -> None:
    if not names:
        raise UserError(f"{path}: no names of keypoints are registered with it: set MODEL.KEYPOINT_ON False")
    if len(names) != expected:
        raise UserError(
            f"{path} has {len(names)} keypoints an object, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {expected}"
        )
    wrong = _indices(records, lambda record: len(record.get("keypoints", ())) != 3 * expected)
    if wrong:
        raise UserError(
            f"{path}: annotations[{wrong[0]}] has no 'keypoints' of {3 * expected} numbers: x, y and visibility of"
            f" {expected} points"
        )


def _indices(records: Sequence[Mapping[str, Any]], fails: Callable[[Mapping[str, Any]], bool]) -> list[int]:
    return [index for index, record in enumerate(records) if fails(record)]
