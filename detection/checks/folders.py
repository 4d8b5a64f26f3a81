"""Checks of datasets with a file of labels for each image: Cityscapes, and semantic segmentation in two folders."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from detection.checks import findings as defects
from detection.checks.content import check_class_names, check_parts, map_files, missing_files, size_or_reason
from detection.checks.findings import Content, Findings, ListedImage
from detection.data import optional_packages
from detection.data.labels import check_labels, read_labels
from detection.data.requirements import Requirements
from detection.data.voc import read_list
from foundation.errors import UserError

TRAIN_IDS = "python -m cityscapesscripts.preparation.createTrainIdLabelImgs"
LABELS_READ = 8  # files whose values are looked at before training; reading them all would take minutes


def check_cityscapes(
    name: str, metadata: Any, model_classes: Sequence[str], requirements: Requirements, findings: Findings
) -> Content | None:
    """Note what is wrong with Cityscapes' folders of cities, for instances or for semantic segmentation.

    Raises:
        UserError: Cityscapes' package is not installed.
    """
    optional_packages.provide_cityscapes(name)
    images, labels = Path(metadata.image_dir), Path(metadata.gt_dir)
    wanted = ["instanceIds.png", "labelIds.png", "polygons.json", *["labelTrainIds.png"] * requirements.semantic]
    layout = f"{images}/CITY/*_leftImg8bit.png and {labels}/CITY/*_gtFine_{{{','.join(wanted)}}}"
    check_parts([images, labels], layout, findings)
    classes = metadata.stuff_classes if requirements.semantic else metadata.thing_classes
    check_class_names(classes, model_classes, requirements, findings)
    if requirements.keypoints:
        findings.add(defects.HAS_NO_KEYPOINTS, [name])
    if not images.is_dir():
        return None
    unknown, missing, listed = [], [], []
    for city in sorted(images.iterdir()):
        if not city.is_dir():
            unknown.append(f"{city} is not a folder of a city")
            continue
        there = set(os.listdir(labels / city.name)) if (labels / city.name).is_dir() else set()
        for image in sorted(city.iterdir()):
            if not image.name.endswith("_leftImg8bit.png"):
                unknown.append(f"{image} is not *_leftImg8bit.png")
                continue
            listed.append(ListedImage(f"{city.name}/{image.name}"))
            files = [image.name.removesuffix("leftImg8bit.png") + f"gtFine_{suffix}" for suffix in wanted]
            missing += [labels / city.name / file for file in files if file not in there]
    findings.add(defects.UNKNOWN_FILES, unknown)
    makes = f" (CITYSCAPES_DATASET={images.parents[1]} {TRAIN_IDS} makes it)"
    findings.add(defects.MISSING_LABELS, missing, lambda path: f"{path}{makes * path.name.endswith('TrainIds.png')}")
    if not listed:
        findings.add(defects.NO_IMAGES, [f"{images}/ (expected are {layout})"])
    return _without_objects(images, listed, classes)


def check_semantic(
    name: str, metadata: Any, model_classes: Sequence[str], requirements: Requirements, findings: Findings
) -> Content | None:
    """Note what is wrong with a folder of images and one of labels, a class for each pixel.

    Args:
        name: of the dataset.
        metadata: with `image_root`, `sem_seg_root`, `stuff_classes`, `ignore_label`, and `image_list` where a file
            names the images that count.
        model_classes: names of the model's classes; empty where they are not known.
        requirements: of the model.
        findings: takes what is found.

    Returns:
        The content, or None if nothing can be read.
    """
    images, labels = Path(metadata.image_root), Path(metadata.sem_seg_root)
    names = metadata.get("image_list")
    layout = f"{images}/*.jpg, {labels}/*.png" + (f" and their names in {names}" if names else "")
    parts = [images, labels, *([Path(names)] if names else [])]
    check_parts(parts, layout, findings)
    check_class_names(metadata.stuff_classes, model_classes, requirements, findings)
    if not all(path.exists() for path in parts):
        return None
    try:
        identities = read_list(Path(names)) if names else sorted(path.stem for path in labels.glob("*.png"))
    except UserError as error:
        findings.add(defects.UNREADABLE, [str(error)])
        return None
    if not identities:
        findings.add(defects.NO_IMAGES, [f"{names or labels} (expected are {layout})"])
    missing = missing_files([f"{each}.png" for each in identities], labels)
    findings.add(defects.MISSING_LABELS, missing, lambda file: str(labels / file))
    _check_label_files(identities, images, labels, requirements.classes, metadata.ignore_label, findings)
    return _without_objects(images, [ListedImage(f"{each}.jpg") for each in identities], metadata.stuff_classes)


def _check_label_files(
    identities: Sequence[str], images: Path, labels: Path, classes: int, ignored: int, findings: Findings
) -> None:
    pairs = [(images / f"{each}.jpg", labels / f"{each}.png") for each in identities]
    pairs = [pair for pair in pairs if all(path.is_file() for path in pair)]
    sizes = map_files(size_or_reason, [path for pair in pairs for path in pair], "reading headers")
    differing = [
        f"{path} ({mine}, the image {image})"
        for (_, path), image, mine in zip(pairs, sizes[::2], sizes[1::2], strict=True)
        if not isinstance(image, str) and image != mine
    ]
    findings.add(defects.LABEL_SIZES, differing)

    def reason(path: Path) -> str:
        try:
            check_labels(read_labels(path), path, classes, ignored)
        except UserError as error:
            return str(error)
        return ""

    read = [path for _, path in pairs]
    reasons = map_files(reason, read if findings.decode else read[:LABELS_READ], "reading labels")
    findings.add(defects.WRONG_LABELS, [each for each in reasons if each])


def _without_objects(folder: Path, images: Sequence[ListedImage], names: Sequence[str]) -> Content:
    none = numpy.zeros(0, dtype=numpy.int64)
    boxes = numpy.zeros((0, 4))
    return Content(folder, images, none, boxes, none, none.astype(bool), [], names)
