"""Checks that every dataset gets, whatever its format: boxes, classes, images without objects, image files."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from PIL import Image
from tqdm import tqdm

from detection.checks import findings as defects
from detection.checks.findings import Content, Findings, Picture, Use

SLACK = 1.0  # pixels that a box may reach out: coordinates are rounded, and some tools count from 1
LEAST_SIDE = 1e-5  # pixels; Detectron2's filter_empty_instances leaves out what has a shorter one
THREADS = 16  # a header is little to compute, but on a network drive long to wait for
ORIENTATION = 0x0112  # the EXIF field; values from 5 on swap width and height
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def check_objects(content: Content, use: Use, findings: Findings) -> None:
    """Boxes, crowds, classes without objects and images without."""
    _check_boxes(content, findings)
    findings.add(defects.CROWDS, numpy.flatnonzero(content.crowds), content.label)
    counts = numpy.bincount(content.classes[~content.crowds & (content.classes >= 0)], minlength=len(content.names))
    findings.add(defects.ABSENT_CLASSES, numpy.flatnonzero(counts == 0), lambda index: content.names[index])
    with_objects = numpy.zeros(len(content.pictures), dtype=bool)
    with_objects[content.owners[~content.crowds]] = True
    empty = defects.EMPTY_IMAGES if use.drops_empty else defects.BACKGROUND_IMAGES
    findings.add(empty, numpy.flatnonzero(~with_objects), lambda index: content.pictures[index].file_name)
    if use.training and not with_objects.any():
        findings.add(defects.NOTHING_LEFT, ["all images"])


def _check_boxes(content: Content, findings: Findings) -> None:
    sizes = numpy.array([(each.width, each.height) for each in content.pictures], dtype=numpy.float64).reshape(-1, 2)
    limits = sizes[content.owners]
    least, most = content.boxes[:, :2], content.boxes[:, 2:]
    # Written so that a coordinate that is not a number counts as empty, as it does in Detectron2.
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


def check_files(pictures: Sequence[Picture], folder: Path, findings: Findings) -> None:
    """See that each image's file is there, is an image, and has the size annotated. Reads headers only."""
    counts = Counter(each.file_name for each in pictures)
    findings.add(defects.REPEATED_FILES, [name for name, count in counts.items() if count > 1])
    missing = missing_files(counts, folder)
    findings.add(defects.MISSING_FILES, missing)
    absent = set(missing)
    there = [each for each in pictures if each.file_name not in absent]
    broken, wrong = [], []
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = pool.map(read_size, [folder / each.file_name for each in there])
        shown = sys.stderr.isatty()
        for picture, size in zip(tqdm(there, "reading headers", unit="img", disable=not shown), sizes, strict=True):
            if isinstance(size, str):
                broken.append(f"{picture.file_name} ({size})")
            elif picture.width and size != (picture.width, picture.height):
                annotated = f"{picture.width}x{picture.height}"
                wrong.append(f"{picture.file_name} ({size[0]}x{size[1]}, annotated {annotated})")
    findings.add(defects.UNREADABLE_FILES, broken)
    findings.add(defects.WRONG_SIZES, wrong)


def missing_files(names: Sequence[str] | Counter[str], folder: Path) -> list[str]:
    """The names, relative to `folder`, that are no file. A listing per folder: asking for each takes minutes."""
    listings: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, base = os.path.split(name)
        if parent not in listings:
            place = folder / parent
            listings[parent] = set(os.listdir(place)) if place.is_dir() else set()
        if base not in listings[parent]:
            missing.append(name)
    return missing


def read_size(path: Path) -> tuple[int, int] | str:
    """Width and height of an image as Detectron2 will see it, turned as its camera noted; or what is wrong."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION, 1) >= 5
    except UNREADABLE as error:
        return str(getattr(error, "strerror", None) or error).replace(f" '{path}'", "")
    return (height, width) if turned else (width, height)
