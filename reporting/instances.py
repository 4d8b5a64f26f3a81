"""Ground truth and detections of an evaluation, image by image, and which objects were found.

Files may come from anywhere: an annotation or detection that is malformed is skipped, and one warning tells how many.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from foundation.canvas import Box
from foundation.coco_ids import read_id
from foundation.errors import UserError
from foundation.images import UnreadableImage, read_rgb
from foundation.json_files import as_number, read_json

MATCH_IOU = 0.5  # of the boxes of an object and a detection of its class, from which on it counts as found
MAX_BYTES = 8 * 1024**3  # of annotations or predictions; those of Objects365 have 3 GB
MAX_COORDINATE = 1e6  # pixels
MAX_OUTLINE = 1e6  # pixels: pycocotools' memory for a polygon grows with the length of its outline
logger = logging.getLogger(__name__)
Id = int | str


@dataclass(frozen=True, eq=False)
class Instance:
    """An object or a detection.

    Attributes:
        box: left, top, right, bottom in pixels.
        score: of a detection; 1 for an object.
        segmentation: as COCO has it, not checked; `decode_mask` does.
        keypoints: x, y and visibility or score of each, in COCO's order.
        crowd: whether it is a region with many objects, which is neither found nor missed.
    """

    category: Id
    box: Box
    score: float = 1.0
    segmentation: Any = field(default=None, repr=False)
    keypoints: tuple[float, ...] = ()
    crowd: bool = False


@dataclass(frozen=True)
class GroundTruth:
    """A dataset in COCO's format.

    Attributes:
        files: the path of each image, by image id.
        objects: by image id; an image without objects has no entry.
        names: of the categories, by category id.
        skeletons: by category id: the pairs of keypoints, counted from 0, that are joined by a line.
    """

    files: Mapping[Id, Path]
    objects: Mapping[Id, Sequence[Instance]]
    names: Mapping[Id, str]
    skeletons: Mapping[Id, Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Matches:
    """Which objects of an image were found.

    Attributes:
        found: objects with a detection of their class.
        missed: the other objects, without crowds.
        false: detections without an object, without those on crowds.
    """

    found: Sequence[Instance]
    missed: Sequence[Instance]
    false: Sequence[Instance]


def read_ground_truth(path: Path, image_root: Path) -> GroundTruth:
    """Read annotations in COCO's format.

    Raises:
        UserError: the file is damaged, has no images, or is not in COCO's format.
    """
    content = read_json(path, MAX_BYTES)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not in COCO's format: it holds no object")
    images, annotations, categories = (_records(content, key, path) for key in ("images", "annotations", "categories"))
    files = {
        identity: image_root / image["file_name"]
        for image in images
        if (identity := _id(image, "id")) is not None and isinstance(image.get("file_name"), str)
    }
    if not files:
        raise UserError(f"{path} has no images with an id and a file_name")
    known = {identity: each for each in categories if (identity := _id(each, "id")) is not None}
    names = {identity: str(each.get("name", identity)) for identity, each in known.items()}
    skeletons = {identity: _pairs(each.get("skeleton")) for identity, each in known.items()}
    objects = _by_image(annotations, files, names, path)
    return GroundTruth(files, objects, names, skeletons)


def read_detections(path: Path, ground_truth: GroundTruth, min_score: float) -> dict[Id, list[Instance]]:
    """The detections of at least this score, by image id; the highest-scoring last.

    Raises:
        UserError: the file is damaged, no list of COCO results, or of a dataset with other categories.
    """
    content = read_json(path, MAX_BYTES)
    if not isinstance(content, list):
        raise UserError(f"{path} does not hold COCO results: a list is needed")
    records = [each for each in content if isinstance(each, dict) and _score(each) >= min_score]
    categories = {identity for each in records if (identity := _id(each, "category_id")) is not None}
    unknown = categories - ground_truth.names.keys()
    if unknown:
        raise UserError(
            f"{path}: the dataset has no category {next(iter(unknown))}; these are results of another dataset"
        )
    found = _by_image(records, ground_truth.files, ground_truth.names, path)
    return {identity: sorted(each, key=lambda one: one.score) for identity, each in found.items()}


def match(objects: Sequence[Instance], detections: Iterable[Instance]) -> Matches:
    """Each detection in turn, the highest-scoring first, takes the object of its class that it overlaps most."""
    left = [each for each in objects if not each.crowd]
    crowds = [each for each in objects if each.crowd]
    found, false = [], []
    for detection in sorted(detections, key=lambda each: -each.score):
        same = [each for each in left if each.category == detection.category]
        ious = [iou(detection.box, each.box) for each in same]
        if ious and max(ious) >= MATCH_IOU:
            best = same[int(np.argmax(ious))]
            left.remove(best)
            found.append(best)
        elif not any(
            crowd.category == detection.category and _covered(detection.box, crowd.box) >= MATCH_IOU for crowd in crowds
        ):
            false.append(detection)
    return Matches(found, left, false)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    intersection = _intersection(a, b)
    union = _area(a) + _area(b) - intersection
    return intersection / union if union > 0 else 0.0


def open_image(path: Path) -> Image.Image:
    """An image as RGB. Raises UserError where it cannot be read."""
    try:
        return Image.fromarray(read_rgb(path))
    except UnreadableImage as error:
        raise UserError(f"an image of the evaluation set cannot be read: {error}") from error


def decode_mask(segmentation: Any, height: int, width: int) -> NDArray[np.uint8] | None:
    """A mask (height, width) of 0 and 1, from polygons or from a run-length code, compressed or not.

    None where there is no segmentation, or where it is malformed or of another size.
    """
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in map(_polygon, segmentation) if polygon is not None]
        if not polygons or len(polygons) != len(segmentation):
            return None
        code = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        return np.asarray(coco_mask.decode(code), dtype=np.uint8)
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return None
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not all(isinstance(run, int) and 0 <= run <= height * width for run in counts):
        return None
    if sum(counts) != height * width:
        return None
    values = np.arange(len(counts), dtype=np.uint8) % 2
    return np.repeat(values, counts).reshape(width, height).T


def _records(content: Mapping[str, Any], key: str, path: Path) -> list[Mapping[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise UserError(f"{path} is not in COCO's format: it needs a list of {key}")
    return [each for each in entries if isinstance(each, dict)]


def _id(record: Mapping[str, Any], key: str) -> Id | None:
    """An id in the form in which ids are compared; None where it is neither a whole number nor text."""
    try:
        return read_id(record.get(key))
    except ValueError:
        return None


def _score(record: Mapping[str, Any]) -> float:
    """The score of a detection; 0 where it has none."""
    score = as_number(record.get("score"))
    return 0.0 if score is None else score


def _by_image(
    records: Iterable[Mapping[str, Any]], files: Mapping[Id, Path], names: Mapping[Id, str], path: Path
) -> dict[Id, list[Instance]]:
    """The well-formed records by image id."""
    found: dict[Id, list[Instance]] = {}
    skipped = 0
    for record in records:
        instance, image = _instance(record, names), _id(record, "image_id")
        if instance is None or image is None or image not in files:
            skipped += 1
        else:
            found.setdefault(image, []).append(instance)
    if skipped:
        logger.warning("%s: skipped %d entries without known image, known category or box of numbers", path, skipped)
    return found


def _instance(record: Mapping[str, Any], names: Mapping[Id, str]) -> Instance | None:
    category, box = _id(record, "category_id"), _numbers(record.get("bbox"))
    if category is None or category not in names or len(box) != 4:
        return None
    x, y, width, height = box
    score = as_number(record.get("score", 1.0))
    if score is None or width < 0 or height < 0:
        return None
    keypoints = _numbers(record.get("keypoints"))
    return Instance(
        category,
        (x, y, x + width, y + height),
        score,
        record.get("segmentation"),
        keypoints[: len(keypoints) // 3 * 3],
        record.get("iscrowd") is True or _number(record.get("iscrowd")) == 1,
    )


def _number(value: object) -> float | None:
    """A finite number, which may be given as text, as training and evaluation read it; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return as_number(value)


def _numbers(value: object) -> tuple[float, ...]:
    """A list of coordinates; empty if one of them is no finite number of a sane size."""
    if not isinstance(value, list):
        return ()
    numbers = [_number(each) for each in value]
    if any(number is None or abs(number) > MAX_COORDINATE for number in numbers):
        return ()
    return tuple(number for number in numbers if number is not None)


def _pairs(value: object) -> list[tuple[int, int]]:
    pairs = value if isinstance(value, list) else []
    return [
        (pair[0] - 1, pair[1] - 1)
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, int) for each in pair)
    ]


def _polygon(value: object) -> list[float] | None:
    """The corners of a polygon as pycocotools takes them; None if it would not."""
    numbers = _numbers(value)
    if len(numbers) < 6 or len(numbers) % 2:
        return None
    corners = np.array(numbers).reshape(-1, 2)
    length = float(np.abs(np.diff(corners, axis=0, append=corners[:1])).sum())
    return list(numbers) if length <= MAX_OUTLINE else None


def _decompressed(text: str) -> list[int] | None:
    """The run lengths of COCO's compressed code; None if it is malformed.

    A number has 5 bits in each character from `0` on, the lowest first; bit 5 says that more follow, and the highest
    bit of the last is the sign. From the fourth number on, they are differences to the number two places before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts if shift == 0 else None


def _intersection(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _covered(box: Box, crowd: Box) -> float:
    """The share of a box that lies in a crowd's box."""
    area = _area(box)
    return _intersection(box, crowd) / area if area > 0 else 0.0
