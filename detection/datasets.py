"""The datasets of the recipes: registered with Detectron2, and checked before a run starts.

COCO and its relatives are built into Detectron2 and lie under the folder `DETECTRON2_DATASETS` (by default
`datasets`). `shapes_train` and `shapes_val` are this project's own, rendered when first asked for.
"""

import difflib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy

import detection.compat  # noqa: F401
from cli.errors import UserError

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

SHAPES = {"shapes_train": "train", "shapes_val": "val"}


def register(names: Iterable[str]) -> None:
    """Make the datasets known to Detectron2; the embedded ones are rendered if they are not there yet.

    Raises:
        UserError: there is no dataset of that name; the nearest names are given.
    """
    for name in names:
        if name in DatasetCatalog.list():
            continue
        if name not in SHAPES:
            near = difflib.get_close_matches(name, [*DatasetCatalog.list(), *SHAPES], n=3, cutoff=0.3)
            raise UserError(f"there is no dataset {name!r}; nearest: {', '.join(near)}")
        from shapes import ensure_rendered

        split = SHAPES[name]
        scenes = ensure_rendered() / "scenes"
        annotations = scenes / "annotations" / f"instances_{split}.json"
        register_coco_instances(name, {}, str(annotations), str(scenes / split))


def check(name: str, classes: int) -> None:
    """See that a registered dataset in COCO's format is all there, and has as many classes as the model.

    Raises:
        UserError: something is missing or not as the format has it; the message names the path.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco":
        raise UserError(f"dataset {name!r} is not in COCO's format, the only one that is supported so far")
    annotations, images = Path(metadata.json_file), Path(metadata.image_root)
    for path, there in ((annotations, annotations.is_file()), (images, images.is_dir())):
        if not there:
            raise UserError(f"dataset {name}: {path} does not exist; {_layout(annotations, images)}")
    content = _read_json(annotations)
    _check_content(content, annotations)
    if len(content["categories"]) != classes:
        raise UserError(
            f"{annotations} has {len(content['categories'])} categories, but MODEL.ROI_HEADS.NUM_CLASSES is {classes}"
        )
    _check_images([record["file_name"] for record in content["images"]], images, annotations)


def class_names(name: str, classes: int) -> list[str]:
    """Names of the model's classes, in its order; plain numbers where the dataset is not known here."""
    if name in SHAPES:
        from shapes import CLASSES

        return list(CLASSES)
    names = MetadataCatalog.get(name).get("thing_classes", [])
    return list(names) if len(names) == classes else [f"class {index}" for index in range(classes)]


def subset(size: int, fraction: float, seed: int) -> list[int]:
    """Indices, ascending, of a share of `size` images, at least one.

    With the same seed, a smaller share is a part of a larger one.
    """
    order = numpy.random.default_rng(seed).permutation(size)
    return sorted(order[: max(1, round(size * fraction))].tolist())


def _layout(annotations: Path, images: Path) -> str:
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    return (
        f"expected are {annotations} and the JPEGs in {images}/; datasets lie under the folder that the"
        f" variable DETECTRON2_DATASETS names (now {root!r})"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error


def _check_content(content: Any, path: Path) -> None:
    required = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for key, fields in required.items():
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
    for field, key in (("image_id", "images"), ("category_id", "categories")):
        known = {record["id"] for record in content[key]}
        for index, record in enumerate(content["annotations"]):
            if record[field] not in known:
                raise UserError(f"{path}: annotations[{index}] has {field} {record[field]}, which {key!r} lacks")


def _check_images(names: Sequence[str], folder: Path, annotations: Path) -> None:
    there: dict[str, set[str]] = {}  # a listing per folder: asking for each file takes minutes on COCO
    missing = []
    for name in names:
        parent, base = os.path.split(name)
        if parent not in there:
            place = folder / parent
            there[parent] = set(os.listdir(place)) if place.is_dir() else set()
        if base not in there[parent]:
            missing.append(name)
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} images that {annotations} lists are not in {folder}/, the"
            f" first being {missing[0]}"
        )
