"""Checks of datasets with a file of annotations for each image: VOC, Cityscapes, and labels of pixels.

Each finds out before a run what Detectron2's reader, the model or the evaluation would stumble over later.
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from detection.data import optional_packages
from detection.data.requirements import Needs
from foundation.errors import UserError

# Of an object in VOC's XML: what the reader takes, and what the evaluation takes besides.
VOC_READ = ("name", "bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")
VOC_EVALUATED = (*VOC_READ, "pose", "truncated", "difficult")
TRAIN_IDS = "python -m cityscapesscripts.preparation.createTrainIdLabelImgs"
LABELS_READ = 8  # files of labels whose values are looked at; to read them all would take minutes


def check_voc(name: str, metadata: Any, needs: Needs) -> None:
    """Boxes in VOC's layout.

    Args:
        name: of the dataset, for messages.
        metadata: Detectron2's, with `dirname`, `split` and `thing_classes`.
        needs: of the model.

    Raises:
        UserError: something is missing or not as the format has it; the message names the path.
    """
    folder = Path(metadata.dirname)
    chosen = folder / "ImageSets" / "Main" / f"{metadata.split}.txt"
    layout = f"{chosen}, {folder}/JPEGImages/*.jpg and {folder}/Annotations/*.xml"
    _check_there(name, [chosen, folder / "JPEGImages", folder / "Annotations"], layout)
    if needs.masks:
        raise UserError(f"dataset {name} has boxes only: set MODEL.MASK_ON False")
    if needs.keypoints:
        raise UserError(f"dataset {name} has no keypoints: set MODEL.KEYPOINT_ON False")
    _check_classes(name, len(metadata.thing_classes), needs)
    ids = read_list(chosen)
    _check_files(name, ids, folder / "JPEGImages", ".jpg", layout)
    _check_files(name, ids, folder / "Annotations", ".xml", layout)
    for one in ids:
        _check_xml(folder / "Annotations" / f"{one}.xml", metadata.thing_classes, needs.evaluated)


def check_cityscapes(name: str, metadata: Any, needs: Needs) -> None:
    """Cityscapes' folders of cities, for instances or for semantic segmentation. As `check_voc`.

    Raises:
        UserError: something is missing or not as the format has it; the message names the path.
    """
    optional_packages.provide_cityscapes(name)
    images, labels = Path(metadata.image_dir), Path(metadata.gt_dir)
    wanted = ["instanceIds.png", "labelIds.png", "polygons.json", *["labelTrainIds.png"] * needs.semantic]
    layout = f"{images}/CITY/*_leftImg8bit.png and {labels}/CITY/*_gtFine_{{{','.join(wanted)}}}"
    _check_there(name, [images, labels], layout)
    _check_classes(name, len(metadata.stuff_classes if needs.semantic else metadata.thing_classes), needs)
    if needs.keypoints:
        raise UserError(f"dataset {name} has no keypoints: set MODEL.KEYPOINT_ON False")
    total = 0
    for city in sorted(images.iterdir()):
        total += _check_city(name, city, labels / city.name, wanted, layout)
    if not total:
        raise UserError(f"dataset {name}: there is no image in {images}/; expected are {layout}")


def check_semantic(name: str, metadata: Any, needs: Needs) -> None:
    """A folder of images and one of labels, a class for each pixel. As `check_voc`.

    Args:
        name: of the dataset, for messages.
        metadata: with `image_root`, `sem_seg_root`, `stuff_classes`, `ignore_label`, and `image_list` where a file
            names the images that count.
        needs: of the model.

    Raises:
        UserError: something is missing or not as the format has it; the message names the path.
    """
    images, labels = Path(metadata.image_root), Path(metadata.sem_seg_root)
    listed = metadata.get("image_list")
    layout = f"{images}/*.jpg, {labels}/*.png" + (f" and their names in {listed}" if listed else "")
    _check_there(name, [images, labels, *([Path(listed)] if listed else [])], layout)
    _check_classes(name, len(metadata.stuff_classes), needs)
    ids = read_list(Path(listed)) if listed else sorted(path.stem for path in labels.glob("*.png"))
    if not ids:
        raise UserError(f"dataset {name}: there is no image in {listed or labels}; expected are {layout}")
    _check_files(name, ids, images, ".jpg", layout)
    _check_files(name, ids, labels, ".png", layout)
    for one in ids[:LABELS_READ]:
        with Image.open(labels / f"{one}.png") as picture:
            check_labels(numpy.asarray(picture), labels / f"{one}.png", needs.classes, metadata.ignore_label)


def check_labels(values: numpy.ndarray, path: Path, classes: int, ignored: int) -> None:
    """See that each pixel's label is a class or the ignored one.

    Args:
        values: (H, W) labels.
        path: of the file, for the message.
        classes: labels must be below this.
        ignored: the label of pixels that do not count.

    Raises:
        UserError: they are not.
    """
    if values.ndim != 2:
        raise UserError(f"{path} has {values.ndim} dimensions: labels must be an image with one channel or a palette")
    wrong = values[(values >= classes) & (values != ignored)]
    if wrong.size:
        right = f"labels must be 0 to {classes - 1}, or {ignored} to be ignored"
        raise UserError(f"{path} has the label {wrong[0]}: {right}")


def read_list(path: Path) -> list[str]:
    """The first word of each line: what VOC's lists of images hold."""
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def _check_there(name: str, paths: Iterable[Path], layout: str) -> None:
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    for path in paths:
        if not path.exists():
            raise UserError(
                f"dataset {name}: {path} does not exist; expected are {layout}; the variable DETECTRON2_DATASETS"
                f" names the folder of datasets (now {root!r})"
            )


def _check_classes(name: str, found: int, needs: Needs) -> None:
    if found != needs.classes:
        raise UserError(f"dataset {name} has {found} classes, but {needs.key} is {needs.classes}")


def _check_files(name: str, ids: Sequence[str], folder: Path, suffix: str, layout: str) -> None:
    there = set(os.listdir(folder))
    missing = [one + suffix for one in ids if one + suffix not in there]
    if missing:
        raise UserError(
            f"dataset {name}: {len(missing)} of {len(ids)} files are not in {folder}/, the first being {missing[0]};"
            f" expected are {layout}"
        )


def _check_xml(path: Path, classes: Sequence[str], evaluated: bool) -> None:
    try:
        tree = ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: not valid XML: {error}") from error
    for field in ("size/width", "size/height"):
        if tree.findtext(f"./{field}") is None:
            raise UserError(f"{path}: there is no {field}")
    for index, found in enumerate(tree.findall("object")):
        for field in VOC_EVALUATED if evaluated else VOC_READ:
            if found.findtext(field) is None:
                raise UserError(f"{path}: object {index} has no {field}")
        if found.findtext("name") not in classes:
            raise UserError(f"{path}: object {index} is a {found.findtext('name')!r}, which is none of VOC's classes")


def _check_city(name: str, city: Path, labels: Path, wanted: Sequence[str], layout: str) -> int:
    if not city.is_dir():
        raise UserError(f"dataset {name}: {city} is no folder of a city, and would stop the reader: remove it")
    there = set(os.listdir(labels)) if labels.is_dir() else set()
    pictures = sorted(city.iterdir())
    for picture in pictures:
        if not picture.name.endswith("_leftImg8bit.png"):
            raise UserError(f"dataset {name}: {picture} is no *_leftImg8bit.png, and would stop the reader: remove it")
        core = picture.name.removesuffix("leftImg8bit.png")
        for suffix in wanted:
            if f"{core}gtFine_{suffix}" not in there:
                how = f"; CITYSCAPES_DATASET={city.parents[2]} {TRAIN_IDS} makes it" * (suffix == "labelTrainIds.png")
                missing = labels / f"{core}gtFine_{suffix}"
                raise UserError(f"dataset {name}: {missing} does not exist; expected are {layout}{how}")
    return len(pictures)
