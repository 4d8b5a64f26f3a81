"""Checks of annotations in COCO's format, and in LVIS's, which differs in that the URL of an image names its folder.

The records are read in one pass into arrays, so that COCO's 860,000 annotations take seconds.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy

from detection.checks import findings as defects
from detection.checks.content import check_class_names, check_parts
from detection.checks.findings import Content, Findings, ListedImage
from detection.data import datasets, optional_packages
from detection.data.annotations import (
    COMPUTED_AREAS,
    Annotations,
    Fault,
    collector_paused,
    keypoint_names,
    read_annotations,
)
from detection.data.masks import polygon_areas
from detection.data.requirements import Requirements
from foundation.errors import UserError

CHUNK = 20_000  # objects whose polygons are computed on together, to bound the memory
LEAST_AREA = 1e-6  # square pixels that a polygon must enclose

DEFECTS = {
    Fault.VALUE: defects.MALFORMED,
    Fault.MASK: defects.MALFORMED,
    Fault.MASK_SIZE: defects.CODE_SIZES,
    Fault.KEYPOINTS: defects.WRONG_KEYPOINTS,
    Fault.IGNORED: defects.IGNORED,
    Fault.DUPLICATE_IMAGE: defects.DUPLICATE_IMAGES,
    Fault.DUPLICATE_ANNOTATION: defects.DUPLICATE_ANNOTATIONS,
    Fault.DUPLICATE_CATEGORY: defects.DUPLICATE_CATEGORIES,
    Fault.UNKNOWN_IMAGE: defects.UNKNOWN_IMAGES,
    Fault.UNKNOWN_CATEGORY: defects.UNKNOWN_CATEGORIES,
}


@collector_paused()
def check_coco(
    name: str, metadata: Any, model_classes: Sequence[str], requirements: Requirements, findings: Findings
) -> Content | None:
    """Note what is wrong with a dataset in COCO's format.

    Args:
        name: of the dataset.
        metadata: Detectron2's, with `json_file` and `image_root`.
        model_classes: names of the model's classes; empty where they are not known.
        requirements: of the model.
        findings: takes what is found.

    Returns:
        The content, or None if nothing can be read.
    """
    layout = f"{metadata.json_file} and the images in {metadata.image_root}/"
    read = _read(metadata, layout, False, requirements, findings)
    if read is None:
        return None
    names = [each["name"] for each in read.categories]
    registered = list(metadata.get("thing_classes", names))
    differing = [f"{ours!r} for {theirs!r}" for ours, theirs in zip(names, registered, strict=False) if ours != theirs]
    if len(names) != len(registered):
        differing.append(f"{len(names)} for {len(registered)}")
    findings.add(defects.REGISTERED_CLASSES, differing)
    check_class_names(names, model_classes, requirements, findings)
    content = _examine(read, Path(metadata.image_root), names, requirements, findings)
    if requirements.keypoints:
        points = metadata.get("keypoint_names") or keypoint_names(read.categories)
        if not points:
            findings.add(
                defects.HAS_NO_KEYPOINTS,
                [f"no names of keypoints, or different ones, in the categories of {read.path}"],
            )
        elif len(points) != requirements.keypoints:
            key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
            findings.add(defects.KEYPOINT_COUNT, [f"{len(points)}, but {key} is {requirements.keypoints}"])
        elif not findings.training and len(points) != requirements.tolerances:
            key = "TEST.KEYPOINT_OKS_SIGMAS"
            findings.add(defects.TOLERANCES, [f"{len(points)}, but {key} is for {requirements.tolerances}"])
        else:
            _check_keypoints(read, content, requirements, findings)
    findings.add(defects.CONVERTED, [f"{what} ({count:,})" for what, count in read.converted.items()])
    return content


@collector_paused()
def check_lvis(
    name: str, metadata: Any, model_classes: Sequence[str], requirements: Requirements, findings: Findings
) -> Content | None:
    """Note what is wrong with a dataset in LVIS's format, whose images are those of COCO. As `check_coco`.

    Raises:
        UserError: LVIS's package is not installed.
    """
    optional_packages.provide_lvis(name)
    images = metadata.image_root
    layout = f"{metadata.json_file} and COCO's folders {images}/train2017 and {images}/val2017"
    if requirements.keypoints:
        findings.add(defects.HAS_NO_KEYPOINTS, [name])
    read = _read(metadata, layout, True, requirements, findings)
    if read is None:
        return None
    names = metadata.thing_classes
    if len(read.categories) != len(names):
        findings.add(defects.REGISTERED_CLASSES, [f"{len(read.categories)} for {len(names)}"])
    check_class_names(names, model_classes, requirements, findings)
    content = _examine(read, Path(images), names, requirements, findings)
    # LVIS's own package reads the file for the evaluation, and Detectron2's reader for training. Areas do not matter.
    converted = {what: count for what, count in read.converted.items() if what != COMPUTED_AREAS}
    findings.add(defects.CONVERTED_LVIS, [f"{what} ({count:,})" for what, count in converted.items()])
    dropped = [index for index, each in enumerate(read.annotations) if each.get("dropped_polygons")]
    findings.add(defects.CONVERTED_LVIS, dropped, lambda index: f"a polygon of {content.label(index)}")
    return content


def _read(metadata: Any, layout: str, lvis: bool, requirements: Requirements, findings: Findings) -> Annotations | None:
    """Read the file, and note the problems that matter to the model."""
    file, images = Path(metadata.json_file), Path(metadata.image_root)
    own = datasets.CUSTOM in metadata.name
    check_parts([file, images], layout, findings, defects.MISSING_OWN if own else defects.MISSING_PARTS)
    if not file.exists():
        return None
    try:
        read = read_annotations(file, lvis)
    except UserError as error:
        findings.add(defects.UNREADABLE, [str(error)])
        return None
    if not read.images:
        findings.add(defects.NO_IMAGES, [str(file)])
    if not read.categories:
        findings.add(defects.NO_CLASSES, [str(file)])
    if not read.annotated:
        findings.add(defects.NOT_ANNOTATED, [str(file)])
    ignored = {
        Fault.MASK: not requirements.masks,
        Fault.MASK_SIZE: not requirements.masks,
        Fault.KEYPOINTS: not requirements.keypoints,
    }
    for fault, defect in DEFECTS.items():
        if not ignored.get(fault):
            findings.add(defect, [each.text for each in read.problems if each.fault is fault])
    return read


def _examine(
    read: Annotations, folder: Path, names: Sequence[str], requirements: Requirements, findings: Findings
) -> Content:
    """The records as arrays, when their masks have been checked."""
    content = _content(read, folder, names)
    # The reader leaves such an object out, whether the model has masks or not.
    findings.add(defects.SHORT_POLYGONS, content.dropped, content.label)
    if requirements.masks:
        _check_masks(read, content, requirements, findings)
    return content


def _content(read: Annotations, folder: Path, names: Sequence[str]) -> Content:
    rows = {each["id"]: index for index, each in enumerate(read.images)}
    classes = {each["id"]: index for index, each in enumerate(read.categories)}
    boxes = numpy.array([each["bbox"] for each in read.annotations], dtype=numpy.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Content(
        folder=folder,
        images=[ListedImage(each["file_name"], each["width"], each["height"]) for each in read.images],
        owners=numpy.array([rows[each["image_id"]] for each in read.annotations], dtype=numpy.int64),
        boxes=boxes,
        classes=numpy.array([classes[each["category_id"]] for each in read.annotations], dtype=numpy.int64),
        crowds=numpy.array([each["iscrowd"] for each in read.annotations], dtype=bool),
        labels=[f"annotation {each['id']}" for each in read.annotations],
        names=names,
        dropped=[index for index, each in enumerate(read.annotations) if each.get("segmentation") == []],
    )


def _check_masks(read: Annotations, content: Content, requirements: Requirements, findings: Findings) -> None:
    """Of the objects that are not crowds; a crowd's mask is not trained on."""
    broken = sum(each.fault in (Fault.MASK, Fault.MASK_SIZE) for each in read.problems)
    objects = [(i, each) for i, each in enumerate(read.annotations) if not each["iscrowd"]]
    without = [i for i, each in objects if "segmentation" not in each]
    if not broken:  # an object whose mask cannot be used has none either, and is listed already
        findings.add(defects.NO_MASKS, without, content.label)
    coded = [i for i, each in objects if isinstance(each.get("segmentation"), dict)]
    if requirements.polygons or not findings.training:
        findings.add(defects.CODED_MASKS, coded, content.label)
    some = [i for i, each in objects if each.get("dropped_polygons") and each.get("segmentation")]
    findings.add(defects.SOME_SHORT_POLYGONS, some, content.label)
    drawn = [(i, each["segmentation"]) for i, each in objects if isinstance(each.get("segmentation"), list)]
    flat = [index for start in range(0, len(drawn), CHUNK) for index in _flat(drawn[start : start + CHUNK])]
    findings.add(defects.FLAT_POLYGONS, flat, content.label)


def _flat(masks: Sequence[tuple[int, Sequence[Sequence[float]]]]) -> Iterable[int]:
    """The indices of the masks whose polygons enclose no area."""
    areas = polygon_areas([polygon for _, polygons in masks for polygon in polygons])
    owners = numpy.repeat(numpy.arange(len(masks)), [len(polygons) for _, polygons in masks])
    totals = numpy.bincount(owners, areas, len(masks))
    return (index for (index, polygons), total in zip(masks, totals, strict=True) if polygons and total < LEAST_AREA)


def _check_keypoints(read: Annotations, content: Content, requirements: Requirements, findings: Findings) -> None:
    """Of the objects that are not crowds."""
    wrong = [
        index
        for index, each in enumerate(read.annotations)
        if not each["iscrowd"] and len(each.get("keypoints", ())) != 3 * requirements.keypoints
    ]
    if not any(each.fault is Fault.KEYPOINTS for each in read.problems):  # listed already
        findings.add(defects.WRONG_KEYPOINTS, wrong, content.label)
    least = requirements.least_keypoints if findings.training else 1
    visible = numpy.bincount(
        content.owners, [each.get("num_keypoints", 0) for each in read.annotations], len(content.images)
    )
    few = sorted({owner for owner in content.owners.tolist() if visible[owner] < least})
    findings.add(defects.FEW_KEYPOINTS, few, lambda index: content.images[index].file_name)
    if findings.training and not (visible[content.owners[~content.crowds]] >= least).any():
        key = "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE"
        findings.add(defects.NO_KEYPOINTS, [f"{key} is {least}"])
