"""Checks that every dataset gets, whatever its format: classes, boxes, images without objects, image files."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy
from numpy.typing import NDArray
from tqdm import tqdm

from detection.checks import findings as defects
from detection.checks.findings import Content, Findings, ListedImage
from detection.data.requirements import Requirements
from foundation.images import UnreadableImage, read_rgb, read_size

T = TypeVar("T")
SLACK = 1.0  # pixels that a box may reach out: coordinates are rounded, and some tools count from 1
LEAST_SIDE = 1e-5  # pixels; Detectron2's filter_empty_instances leaves out what has a shorter one
MANY = 0.2  # of the annotations; of COCO's 1 % are crowds
THREADS = 16  # a header costs little computation, but on a network drive long waiting


def check_parts(
    paths: Sequence[Path], layout: str, findings: Findings, defect: defects.Defect = defects.MISSING_PARTS
) -> None:
    """See that the files and folders of a dataset exist; it is a `defect` where they do not."""
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    built_in = any(path.is_relative_to(root) for path in paths)
    where = f"; DETECTRON2_DATASETS, the folder of datasets, is {root!r}" * built_in
    missing = ", ".join(str(path) for path in paths if not path.exists())
    if missing:
        findings.add(defect, [f"{missing} (expected are {layout}{where})"])


def check_class_names(
    names: Sequence[str], model_classes: Sequence[str], requirements: Requirements, findings: Findings
) -> None:
    """Compare a dataset's classes with the model's. An evaluation may have fewer, which are found by name.

    Args:
        names: of the dataset's classes.
        model_classes: names of the model's classes, in its order; empty where they are not known.
        requirements: with their number.
        findings: takes what is found.
    """
    if findings.training or not model_classes:
        if len(names) != requirements.classes:
            findings.add(defects.CLASS_COUNT, [f"{len(names)}, but {requirements.key} is {requirements.classes}"])
        elif model_classes:
            pairs = zip(names, model_classes, strict=True)
            findings.add(defects.OTHER_CLASSES, [f"{mine!r} for {other!r}" for mine, other in pairs if mine != other])
    else:
        findings.add(defects.OTHER_CLASSES, sorted(set(names) - set(model_classes)), repr)


def check_objects(content: Content, requirements: Requirements, findings: Findings) -> None:
    """Boxes, crowds, classes without objects and images without."""
    usable = _check_boxes(content, findings) & ~content.crowds
    usable[list(content.dropped)] = False
    many = content.crowds.sum() >= MANY * max(len(content.crowds), 1)
    findings.add(defects.MANY_CROWDS if many else defects.CROWDS, numpy.flatnonzero(content.crowds), content.label)
    counts = numpy.bincount(content.classes[~content.crowds & (content.classes >= 0)], minlength=len(content.names))
    findings.add(defects.ABSENT_CLASSES, numpy.flatnonzero(counts == 0), lambda index: content.names[index])
    with_objects = numpy.zeros(len(content.images), dtype=bool)
    with_objects[content.owners[~content.crowds]] = True
    empty = defects.EMPTY_IMAGES if requirements.drops_empty else defects.BACKGROUND_IMAGES
    findings.add(empty, numpy.flatnonzero(~with_objects), lambda index: content.images[index].file_name)
    if findings.training and not usable.any():
        findings.add(defects.NOTHING_LEFT, ["all images"])


def _check_boxes(content: Content, findings: Findings) -> NDArray[numpy.bool_]:
    """Whether each box has a part in its image."""
    sizes = numpy.array([(each.width, each.height) for each in content.images], dtype=numpy.float64).reshape(-1, 2)
    limits = sizes[content.owners]
    least, most = content.boxes[:, :2], content.boxes[:, 2:]
    _check_units(least, most, limits, findings)
    empty = ~((most - least) > LEAST_SIDE).all(axis=1)
    clipped = numpy.minimum(most, limits) - numpy.maximum(least, 0)
    outside = ~empty & ~(clipped > LEAST_SIDE).all(axis=1)
    protruding = ((least < -SLACK) | (most > limits + SLACK)).any(axis=1) & ~empty & ~outside
    for defect, chosen in (
        (defects.EMPTY_BOXES, empty),
        (defects.OUTSIDE_BOXES, outside),
        (defects.PROTRUDING_BOXES, protruding),
    ):
        findings.add(defect, numpy.flatnonzero(chosen), content.label)
    return numpy.asarray(~empty & ~outside)


def _check_units(
    least: NDArray[numpy.float64], most: NDArray[numpy.float64], limits: NDArray[numpy.float64], findings: Findings
) -> None:
    """See that boxes are not fractions of the image or two corners, as other formats have them.

    Args:
        least: (A, 2) left and top of A boxes, read as left, top, width and height in pixels.
        most: (A, 2) right and bottom.
        limits: (A, 2) width and height of their images.
        findings: takes what is found.
    """
    if not len(least):
        return
    sides = most - least  # of corners: right and bottom
    if (limits > 1).all() and (least >= 0).all() and (sides > 0).all() and (most <= 1).all():
        findings.add(defects.FRACTIONAL_BOXES, [f"the first is {sides[0, 0]:g} x {sides[0, 1]:g} pixels"])
    protruding = (most > limits + SLACK).any(axis=1)
    if protruding.mean() >= 0.5 and (sides > least).all() and (sides <= limits + SLACK).all():
        findings.add(defects.CORNER_BOXES, [f"{protruding.sum():,} of {len(least):,} reach out of their image"])


def check_files(images: Sequence[ListedImage], folder: Path, max_size: int, findings: Findings) -> None:
    """See that each image's file is there, can be read, and has the size annotated.

    Args:
        images: as listed.
        folder: that their names are relative to.
        max_size: pixels that the longer side of an image is reduced to.
        findings: takes what is found. Unless they ask to decode, headers are read only, which does not find truncated
            files.
    """
    counts = Counter(each.file_name for each in images)
    findings.add(defects.REPEATED_FILES, [name for name, count in counts.items() if count > 1])
    missing = missing_files(counts, folder)
    findings.add(defects.MISSING_FILES, missing, lambda name: f"{folder / name}{_advise_on_backslash(name)}")
    absent = set(missing)
    there = [each for each in images if each.file_name not in absent]
    sizes = map_files(size_or_reason, [folder / each.file_name for each in there], "reading headers")
    unreadable, wrong, strips = [], [], []
    for image, size in zip(there, sizes, strict=True):
        if isinstance(size, str):
            unreadable.append(f"{image.file_name} ({size})")
            continue
        if min(size) * max_size / max(size) < 0.5:  # rounded to 0
            strips.append(f"{image.file_name} ({size[0]}x{size[1]})")
        if image.width and size != (image.width, image.height):
            annotated = f"{image.width}x{image.height}"
            wrong.append(f"{image.file_name} ({size[0]}x{size[1]}, annotated {annotated})")
    findings.add(defects.UNREADABLE_FILES, unreadable)
    findings.add(defects.WRONG_SIZES, wrong)
    findings.add(defects.STRIPS, strips)
    if findings.decode:
        readable = [each.file_name for each, size in zip(there, sizes, strict=True) if not isinstance(size, str)]
        reasons = map_files(_decode, [folder / name for name in readable], "decoding")
        damaged = [f"{name} ({reason})" for name, reason in zip(readable, reasons, strict=True) if reason]
        findings.add(defects.DAMAGED_FILES, damaged)


def _advise_on_backslash(name: str) -> str:
    return " (its file_name has a backslash: write / between folders)" if "\\" in name else ""


def map_files(function: Callable[[Path], T], paths: Sequence[Path], what: str) -> list[T]:
    """The results of a function of files, in their order, by several threads and with a progress bar."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(tqdm(pool.map(function, paths), what, len(paths), unit="img", disable=not sys.stderr.isatty()))


def missing_files(names: Sequence[str] | Counter[str], folder: Path) -> list[str]:
    """The names, relative to `folder`, that are no file. One listing per folder: asking for each takes minutes."""
    listings: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, base = os.path.split(name)
        if parent not in listings:
            place = folder / parent
            listings[parent] = set(os.listdir(place)) if os.path.isdir(place) else set()
        if base not in listings[parent]:
            missing.append(name)
    return missing


def size_or_reason(path: Path) -> tuple[int, int] | str:
    """Width and height of an upright image, from its header; or what is wrong with the file."""
    try:
        return read_size(path)
    except UnreadableImage as error:
        return str(error).removeprefix(f"{path}: ")


def _decode(path: Path) -> str:
    """Why a file cannot be decoded; empty if it can."""
    try:
        read_rgb(path)
    except UnreadableImage as error:
        return str(error).removeprefix(f"{path}: ")
    return ""
