"""Checks of Pascal VOC's boxes: ImageSets/Main/SPLIT.txt, Annotations/NAME.xml, JPEGImages/NAME.jpg."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from tqdm import tqdm

from detection.checks import findings as defects
from detection.checks.content import check_class_names, check_parts, missing_files
from detection.checks.findings import Content, Findings, ListedImage
from detection.data.requirements import Requirements
from detection.data.voc import VocObject, list_path, read_image, read_list, to_box
from foundation.errors import UserError


def check_voc(
    name: str, metadata: Any, model_classes: Sequence[str], requirements: Requirements, findings: Findings
) -> Content | None:
    """Note what is wrong with a dataset in VOC's layout. As `checks.coco.check_coco`.

    Args:
        name: of the dataset.
        metadata: Detectron2's, with `dirname`, `split` and `thing_classes`.
        model_classes: names of the model's classes; empty where they are not known.
        requirements: of the model.
        findings: takes what is found.

    Returns:
        The content, or None if nothing can be read.
    """
    folder, classes = Path(metadata.dirname), list(metadata.thing_classes)
    names = list_path(folder, metadata.split)
    layout = f"{names}, {folder}/JPEGImages/*.jpg and {folder}/Annotations/*.xml"
    check_parts([names, folder / "JPEGImages", folder / "Annotations"], layout, findings)
    if requirements.masks:
        findings.add(defects.HAS_NO_MASKS, [name])
    if requirements.keypoints:
        findings.add(defects.HAS_NO_KEYPOINTS, [name])
    check_class_names(classes, model_classes, requirements, findings)
    if not names.exists():
        return None
    try:
        identities = read_list(names)
    except UserError as error:
        findings.add(defects.UNREADABLE, [str(error)])
        return None
    if not identities:
        findings.add(defects.NO_IMAGES, [str(names)])
    files = [f"{identity}.xml" for identity in identities]
    missing = set(missing_files(files, folder / "Annotations"))
    findings.add(defects.MISSING_PARTS, sorted(missing), lambda file: str(folder / "Annotations" / file))
    images, objects = _read([file for file in files if file not in missing], folder, findings)
    order = {each: index for index, each in enumerate(classes)}
    content = Content(
        folder=folder / "JPEGImages",
        images=images,
        owners=numpy.array([owner for owner, _ in objects], dtype=numpy.int64),
        boxes=numpy.array([to_box(each.corners) for _, each in objects], dtype=numpy.float64).reshape(-1, 4),
        classes=numpy.array([order.get(each.name, -1) for _, each in objects], dtype=numpy.int64),
        crowds=numpy.zeros(len(objects), dtype=bool),
        labels=[each.name for _, each in objects],
        names=classes,
    )
    findings.add(defects.UNKNOWN_CATEGORIES, numpy.flatnonzero(content.classes < 0), content.label)
    difficult = [index for index, (_, each) in enumerate(objects) if each.difficult]
    findings.add(defects.DIFFICULT, difficult, content.label)
    return content


def _read(
    files: Sequence[str], folder: Path, findings: Findings
) -> tuple[list[ListedImage], list[tuple[int, VocObject]]]:
    """The images, and their objects, each with the index of its image."""
    images: list[ListedImage] = []
    objects: list[tuple[int, VocObject]] = []
    broken = []
    for file in tqdm(files, "reading annotations", unit="file", disable=not sys.stderr.isatty()):
        try:
            image = read_image(folder / "Annotations" / file)
        except ValueError as error:
            broken.append(f"{file} ({error})")
            continue
        objects += [(len(images), each) for each in image.objects]
        images.append(ListedImage(f"{file.removesuffix('.xml')}.jpg", image.width, image.height))
    findings.add(defects.MALFORMED, broken)
    return images, objects
